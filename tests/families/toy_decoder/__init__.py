"""A decoder-only family of a few thousand parameters: what a second family is to the package, and all that it needs.

Picture patches and the text's bytes go through one causal transformer. The memory is the prompt's keys and values in
every layer, and its last state, which predicts the answer's first token.
"""

from families.toy_decoder.model import Config, build, read_config
from families.toy_decoder.processor import Processor

from fedvlm_jax.models import Family

FAMILY = Family(
    model_types=("toy_decoder",),
    read_config=read_config,
    build=build,
    open_processor=lambda folder: Processor(),
    read_size=lambda folder: (Config().side, Config().side),
)
