"""A finished run's exports in PEFT and in transformers themselves: `pytest -m parity` with the extra `parity`."""

import dataclasses
import importlib.util
import json
from functools import partial

import jax
import numpy as np
import pytest
from tiny_run import tiny_run

from fedvlm_jax.cli.main import main
from fedvlm_jax.config.run_options import LoraOptions
from fedvlm_jax.export.logit_check import make_batch
from fedvlm_jax.export.merged_export import export_merged
from fedvlm_jax.export.peft_export import export_peft
from fedvlm_jax.models import load_vlm
from fedvlm_jax.run_dir.artifacts import load_base, open_adapters
from fedvlm_jax.training import federated_run

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torch", "peft")),
        reason="needs the extra `parity`: pip install -e '.[parity]'",
    ),
]
NAME = "noto-de"


def train(model, loaded, out, **changes):
    run = tiny_run(model, out, **changes)
    fast = dataclasses.replace(run.train, rounds=2, learning_rate_a=0.1, learning_rate_b=0.1)
    evaluation = dataclasses.replace(run.evaluation, examples=0)
    return federated_run.train(dataclasses.replace(run, train=fast, evaluation=evaluation), model=loaded)


def find_logits(folder, model):
    """Of the bare base, and of a client of the run, on a picture of noise; with the batch."""
    vlm, params = load_vlm(model)
    names = list(json.loads((folder / "adapters" / "clients.json").read_text())["clients"])
    stored = open_adapters(folder / "adapters", names)(np.asarray([names.index(NAME)]))
    adapter, batch = jax.tree.map(lambda leaf: leaf[0], stored), make_batch(vlm)
    base = load_base(folder / "adapters", params)
    return np.asarray(vlm.logits(params, None, batch)), np.asarray(vlm.logits(base, adapter, batch)), batch


def open_base(folder):
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def answer(model, batch):
    import torch
    from models.reference import to_torch

    with torch.no_grad():
        return model(**to_torch(batch)).logits.numpy()


def assert_logits(found, bare, wanted, of_base):
    """Within three times what the bare base differs by."""
    error = np.abs(of_base - bare).max()
    assert np.abs(wanted - bare).max() > 100 * error
    np.testing.assert_allclose(found, wanted, atol=3 * max(error, 2e-6), rtol=0)


def test_a_merged_model_with_tied_tables_and_positions_is_transformers_own(model, loaded, tmp_path):
    """What PEFT cannot have: positions that count themselves, and a token table that is the head as well."""
    targets = "(language_model|image_projector|vision_tower)/.*(shared|embed_positions|q_proj|row_embeddings|conv)"
    run = train(model, loaded, tmp_path / "run", lora=LoraOptions(rank=2, targets=targets))
    export_merged(run, tmp_path / "out", clients=[NAME])
    bare, wanted, batch = find_logits(run, model)
    found = answer(open_base(tmp_path / "out" / "clients" / NAME), batch)
    assert_logits(found, bare, wanted, answer(open_base(model), batch))


@pytest.mark.parametrize("method", ["plora", "fedex-lora"])
def test_the_folder_of_a_client_is_peft_s_on_the_base_that_it_names(method, model, loaded, tmp_path):
    """Also where the method moved the base, which lies beside the adapters then."""
    from peft import PeftModel

    run, out = train(model, loaded, tmp_path / "run", method=method), tmp_path / "out"
    export_peft(run, out, clients=[NAME])
    place = out / "clients" / NAME
    named = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(out / "base" if method == "fedex-lora" else model)
    bare, wanted, batch = find_logits(run, model)
    found = answer(PeftModel.from_pretrained(open_base(named), place).eval(), batch)
    assert_logits(found, bare, wanted, answer(open_base(model), batch))


def test_peft_loads_a_client_s_adapter_from_the_hub(model, loaded, tmp_path, hub, monkeypatch):
    """Of a private repository, by the line that the docs have; without a login there is nothing."""
    from peft import PeftModel

    run = train(model, loaded, tmp_path / "run")
    main(["export", str(run), "--base", "owner/base", "--clients", NAME, "--push", "owner/name"])
    bare, wanted, batch = find_logits(run, model)
    load = partial(PeftModel.from_pretrained, model_id="owner/name", subfolder=f"clients/{NAME}")
    found = answer(load(open_base(model), cache_dir=tmp_path / "one").eval(), batch)
    assert_logits(found, bare, wanted, answer(open_base(model), batch))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="Can't find"):
        load(open_base(model), cache_dir=tmp_path / "two")
