import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tyro

from fedvlm_jax.data.config import DataOptions
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
        ({"max_answer_tokens": 0}, "a count of 1 to"),
        ({"max_bad_share": 1.5}, "between 0 and 1"),
        ({"clients": 0}, "--data.clients is 0"),
        ({"limit": 0, "source": "x"}, "--data.limit is 0"),
        ({"held_out_clients": 1.0}, "--data.held-out-clients is 1.0"),
        ({"origins": ("a", "a"), "source": "x"}, "every name once"),
    ],
)
def test_impossible_values_are_refused_at_once(changes, message):
    with pytest.raises(UserError, match=message):
        DataOptions(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": Path("d")}, "--data.path means nothing for --data emoji; it is for --data rlaif-v. Leave it out"),
        ({"limit": 5}, "--data.limit means nothing for --data emoji; it is for --data rlaif-v, parquet files"),
        ({"source": "x", "vendors": ("noto",)}, "--data.vendors means nothing for --data x; it is for --data emoji"),
        ({"source": "rlaif-v", "tasks": ("name",)}, "--data.tasks means nothing for --data rlaif-v"),
        ({"source": "x", "revision": "main"}, "--data.revision means nothing for --data x"),
        ({"source": "rlaif-v", "path": Path("d"), "revision": "a"}, "--data.revision a is the hub's"),
        (
            {"source": "rlaif-v", "clients": 4},
            "--data.clients means nothing with --data.partition natural; it is for dirichlet, patho",
        ),
        ({"source": "x", "alpha": 1.0}, "--data.alpha means nothing with --data.partition natural"),
        (
            {"partition": "iid", "partition_by": "language"},
            "--data.partition-by means nothing with --data.partition iid",
        ),
        ({"partition": "dirichlet", "classes_per_client": 3}, "--data.classes-per-client means nothing"),
        ({"partition_by": "language", "alpha": 1.0}, "--data.alpha means nothing"),
    ],
)
def test_what_would_do_nothing_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DataOptions(**changes)


def test_what_means_something_is_taken():
    DataOptions(alpha=1.0, vendors=("noto",))
    DataOptions(source="rlaif-v", path=Path("d"), limit=9, origins=("a",), test_share=0.3)
    DataOptions(partition="quantity", alpha=2.0, clients=3)
    DataOptions(source="x", partition="pathological", partition_by="language", classes_per_client=1)


def test_options_and_listing_import_nothing_heavy():
    code = (
        "import sys, fedvlm_jax.data.config, fedvlm_jax.data.sources.registry as r; r.find_sets();"
        "print([m for m in ('jax', 'transformers', 'datasets', 'pyarrow', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
