import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import tyro

from fedvlm_jax.data.options import DataOptions
from fedvlm_jax.errors import UserError


@dataclass(frozen=True)
class _Run:
    data: DataOptions = field(default_factory=DataOptions)


def test_the_source_is_the_flag_data_itself():
    words = "--data x.parquet --data.prompt client-language --data.partition dirichlet --data.alpha inf"
    options = tyro.cli(_Run, args=words.split()).data
    assert (options.source, options.prompt, options.alpha) == ("x.parquet", "client-language", float("inf"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_client": -1}, "--data.images-per-client is -1"),
        ({"alpha": 0.0}, "--data.alpha is 0.0"),
        ({"alpha": float("nan")}, "--data.alpha is nan"),
        ({"validation_share": 0.6, "test_share": 0.4}, "together with --data.test-share"),
        ({"languages": ()}, "at least one name"),
        ({"vendors": ("noto", "noto")}, "every name once"),
        ({"max_answer_tokens": 0}, "1 or more"),
        ({"max_bad_share": 1.5}, "between 0 and 1"),
    ],
)
def test_impossible_values_are_refused_at_once(changes, message):
    with pytest.raises(UserError, match=message):
        DataOptions(**changes)


def test_options_and_listing_import_nothing_heavy():
    code = (
        "import sys, fedvlm_jax.data.options, fedvlm_jax.data.registry as r; r.find_sets();"
        "print([m for m in ('jax', 'transformers', 'datasets', 'pyarrow', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
