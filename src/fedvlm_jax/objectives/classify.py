"""Classification: cross-entropy among the classes of the data, for models that choose among them (CLIP).

It is sft of an answer of one token, a class; asked for by this name it refuses models that write their answers.
"""

from fedvlm_jax.objectives import sft
from fedvlm_jax.objectives.base import Objective
from fedvlm_jax.objectives.config import PreferenceOptions


def make(options: PreferenceOptions) -> Objective:
    """Make classify; none of the preference options concerns it."""
    source = "maximum likelihood of the right class among all that are trained among"
    return sft.make(options)._replace(name="classify", source=source, classes=True)
