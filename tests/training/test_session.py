"""What is kept of the base on disk is found again only by whoever would compute the same bits."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import BartConfig

from fedvlm_jax.config.run_options import EvaluationOptions, Run, SystemOptions
from fedvlm_jax.distributed.sharding import make_mesh
from fedvlm_jax.training import session as frozen

PLAIN = SystemOptions()


def session(processor="64x64", **config):
    return SimpleNamespace(
        vlm=SimpleNamespace(config=BartConfig(**config)), processor=SimpleNamespace(fingerprint=processor)
    )


def name(run=None, kept=None):
    run = run or Run()
    return frozen._name_folder(run, "features", "weights", frozen._describe_model(kept or session())).name


def test_the_same_model_and_options_find_what_they_left(tmp_path):
    assert name() == name()
    assert frozen._name_folder(dataclasses.replace(Run(), system=SystemOptions(cache="disk", cache_dir=tmp_path)),
                               "features", "weights").parent == tmp_path  # fmt: skip


@pytest.mark.parametrize("change", [{"compute": "bfloat16"}, {"remat": True}, {"unroll": 1}])
def test_other_arithmetic_is_another_folder(change):
    assert name(Run(system=dataclasses.replace(PLAIN, **change))) != name()


@pytest.mark.parametrize(
    "kept", [session(encoder_attention_heads=8), session("48x48")], ids=["the same weights, other heads", "processor"]
)
def test_the_same_weights_in_another_model_are_another_folder(kept):
    """Features by weights alone were those of another model."""
    assert name(kept=kept) != name()


def test_other_flags_and_other_code_are_another_folder(monkeypatch, tmp_path):
    before = name()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    changed = name()
    assert changed != before
    monkeypatch.setattr(frozen, "_hash_sources", lambda: "edited")
    assert name() not in (before, changed)


def test_reference_log_probabilities_of_other_shapes_are_kept_apart(monkeypatch):
    """Seeds of one session may have longer prompts; whoever was scored first decided the last bits of both."""
    stores = []
    monkeypatch.setattr(frozen, "compute_reference", lambda *args, **options: stores.append(args[4]))
    kept = frozen.Session(SimpleNamespace(), {}, SimpleNamespace(), make_mesh(1), SimpleNamespace(), {})
    for width, batch in ((4, 32), (8, 32), (4, 16), (4, 32)):
        arrays = {name: np.zeros((2, width), np.int32) for name in ("input_ids", "labels", "rejected")}
        run = Run(evaluation=EvaluationOptions(batch_size=batch))
        frozen.reference_of(run, kept, SimpleNamespace(**arrays), None, False, print)
    assert len({id(store) for store in stores}) == 3
    assert stores[0] is stores[3]
