import subprocess
import sys
from pathlib import Path

import pytest

from fedvlm_jax.cli import main
from fedvlm_jax.data.config import Dirichlet
from fedvlm_jax.data.forms import parquet
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError


def test_the_source_is_the_flag_data_itself(monkeypatch):
    seen = []
    monkeypatch.setattr(main, "_check_and_run", lambda command, args, kwargs: seen.append(kwargs["data"]))
    words = "--data x.parquet --data.prompt client-language --data.partition dirichlet --data.alpha inf"
    main.main(["data", *words.split()])
    partition = Dirichlet(alpha=float("inf"))
    assert seen == [parquet.Options(source="x.parquet", prompt="client-language", partition=partition)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_client": -1}, "--data.images-per-client is -1"),
        ({"alpha": 0.0}, "--data.alpha is 0.0"),
        ({"alpha": float("nan")}, "--data.alpha is nan"),
        ({"source": "x", "validation_share": 0.6, "test_share": 0.4}, "together with --data.test-share"),
        ({"languages": ()}, "at least one name"),
        ({"vendors": ("noto", "noto")}, "every name once"),
        ({"max_answer_tokens": 0}, "must be 1 or more"),
        ({"max_bad_share": 1.5}, "from 0 to 1"),
        ({"clients": 0}, "--data.clients is 0"),
        ({"limit": 0, "source": "x"}, "--data.limit is 0"),
        ({"held_out_clients": 1.0}, "--data.held-out-clients is 1.0"),
        ({"origins": ("a", "a"), "source": "x"}, "every name once"),
    ],
)
def test_impossible_values_are_refused_at_once(changes, message):
    with pytest.raises(UserError, match=message):
        make_options(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": Path("d")}, "--data.path belongs to --data photos, --data rlaif-v, and not to emoji"),
        ({"limit": 5}, "--data.limit belongs to --data photos, --data rlaif-v, one's own data, and not to emoji"),
        ({"source": "x", "vendors": ("noto",)}, "--data.vendors belongs to --data emoji, and not to x"),
        ({"source": "rlaif-v", "tasks": ("name",)}, "--data.tasks belongs to --data emoji, and not to rlaif-v"),
        (
            {"source": "x", "revision": "main"},
            "--data.revision belongs to --data rlaif-v, --data.form hub, and not to x",
        ),
        ({"source": "rlaif-v", "path": Path("d"), "revision": "a"}, "--data.revision a is the hub's"),
        (
            {"source": "rlaif-v", "clients": 4},
            "--data.clients belongs to --data emoji, --data.partition dirichlet, --data.partition patho",
        ),
        ({"source": "x", "alpha": 1.0}, "--data.alpha belongs to --data emoji, --data.partition dirichlet"),
        (
            {"partition": "iid", "partition_by": "language"},
            "--data.partition-by belongs to .*--data.partition natural",
        ),
        ({"partition": "dirichlet", "classes_per_client": 3}, "belongs to --data.partition pathological"),
        ({"partition_by": "language", "alpha": 1.0}, "--data.alpha mean nothing with --data.partition-by language"),
    ],
)
def test_what_would_do_nothing_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_options(**changes)


def test_what_means_something_is_taken():
    make_options(alpha=1.0, vendors=("noto",))
    make_options(source="rlaif-v", path=Path("d"), limit=9, origins=("a",), test_share=0.3)
    make_options(partition="quantity", alpha=2.0, clients=3)
    make_options(source="x", partition="pathological", partition_by="language", classes_per_client=1)


def test_options_and_listing_import_nothing_heavy():
    code = (
        "import sys, fedvlm_jax.data.config, fedvlm_jax.data.sources.registry as r; r.list_owners('--data.alpha');"
        "print([m for m in ('jax', 'transformers', 'datasets', 'pyarrow', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
