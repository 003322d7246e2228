"""What is kept of the base on disk is found again only by whoever would compute the same bits."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fedvlm_jax.config.run_options import Run, SystemOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.training import federated_data, loaded_model
from fedvlm_jax.training.federated_data import FederatedData
from fedvlm_jax.training.loaded_model import LoadedModel

PLAIN = SystemOptions()


def load(processor="64x64", system=PLAIN, **config):
    vlm = SimpleNamespace(fingerprint=repr(config))
    return LoadedModel(vlm, {}, SimpleNamespace(fingerprint=processor), make_mesh(1), system, {})


def name(loaded=None, cache_dir=None):
    return (loaded or load()).name_folder(cache_dir, "features", "weights", 4).name


def test_the_same_model_and_options_find_what_they_left(tmp_path):
    assert name() == name()
    assert load(system=SystemOptions(cache="disk")).name_folder(tmp_path, "features", "weights", 4) == tmp_path / name()


@pytest.mark.parametrize("change", [{"compute": "bfloat16"}, {"remat": True}, {"unroll": 1}])
def test_other_arithmetic_is_another_folder(change):
    assert name(load(system=dataclasses.replace(PLAIN, **change))) != name()


@pytest.mark.parametrize(
    "other", [load(encoder_attention_heads=8), load("48x48")], ids=["the same weights, other heads", "processor"]
)
def test_the_same_weights_in_another_model_are_another_folder(other):
    """Features by weights alone were those of another model."""
    assert name(other) != name()


def test_other_flags_and_other_code_are_another_folder(monkeypatch, tmp_path):
    before = name()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    changed = name()
    assert changed != before
    monkeypatch.setattr(loaded_model, "_hash_sources", lambda: "edited")
    assert name() not in (before, changed)


def test_the_code_that_decides_kept_numbers_is_hashed():
    """A pattern that matches no file, after a move, hashes nothing; products decide the last bits of both models."""
    root = Path(loaded_model.__file__).parents[1]
    found = {pattern: [str(file.relative_to(root)) for file in root.glob(pattern)] for pattern in loaded_model.SOURCES}
    assert [pattern for pattern, files in found.items() if not files] == []
    hashed = {file for files in found.values() for file in files}
    assert {"models/florence2/davit.py", "models/layers.py", "utils/products.py", "data/unique_images.py"} <= hashed


def test_reference_log_probabilities_of_other_shapes_are_kept_apart(monkeypatch):
    """Seeds of one model may have longer prompts; whoever was scored first decided the last bits of both."""
    stores = []
    monkeypatch.setattr(federated_data, "compute_reference", lambda *args, **options: stores.append(args[4]))
    monkeypatch.setattr(LoadedModel, "reference_scorer", None)
    loaded = load()
    for width, batch, pixels in ((4, 32, False), (8, 32, False), (4, 16, False), (4, 32, False), (4, 32, True)):
        arrays = {name: np.zeros((2, width), np.int32) for name in ("input_ids", "labels", "rejected")}
        data = FederatedData(loaded, None, None, 0, True)
        vars(data)["examples"] = SimpleNamespace(**arrays, image_tokens=None)
        data.reference(batch, False, None, pixels, inputs=None, note=print)
    assert len({id(store) for store in stores}) == 4
    assert stores[0] is stores[3]


def test_what_is_memoized_is_made_once_and_dropped_with_its_programs(monkeypatch):
    """Everything that a value depends on is its key; other values outlive the programs that are dropped."""
    made = []
    monkeypatch.setattr(loaded_model, "build_programs", lambda *given: made.append(given[2:]) or object())
    monkeypatch.setattr(loaded_model, "make_neighbours", lambda *given: made.append(given[1:]) or object())
    loaded = load()
    first, other = (loaded.programs(run, 4, 2, 2, 3) for run in (Run(), Run(method="local")))
    assert first is not other
    assert loaded.programs(Run(), 4, 2, 2, 3) is first
    neighbours = loaded.neighbours(5, 1.0)
    loaded.drop_programs()
    assert loaded.programs(Run(), 4, 2, 2, 3) is not first
    assert loaded.neighbours(5, 1.0) is neighbours
    assert load().neighbours(5, 1.0) is not neighbours
    assert made == [
        *((run, 4, 2, 2, 3, None) for run in (Run(), Run(method="local"))),
        (5, 1.0), (Run(), 4, 2, 2, 3, None), (5, 1.0),
    ]  # fmt: skip


def test_a_source_is_read_once_however_its_rows_are_cut(monkeypatch):
    read = []
    monkeypatch.setattr(loaded_model, "read_table", lambda options: read.append(options.source) or object())
    loaded = load()
    neutral, pictures = make_options("emoji", prompt="neutral"), make_options("emoji", images_per_client=20)
    assert loaded.table(neutral) is loaded.table(pictures)
    assert loaded.table(make_options("emoji", "dirichlet", alpha=0.1)) is loaded.table(neutral)
    assert loaded.table(make_options("rows.parquet")) is not loaded.table(neutral)
    assert loaded.table(make_options("emoji", max_image_pixels=100)) is not loaded.table(neutral)
    assert read == ["emoji", "rows.parquet", "emoji"]
