"""A user's own parquet in RLAIF-V's form: unequal sources as clients, broken rows, adapters in the vision tower."""

import numpy as np
import pytest
from make_parquet import make_row, make_rows, write_rows
from safetensors.numpy import load_file
from tiny_run import tiny_run

from fedvlm_jax.config.run_options import LoraOptions, SystemOptions, TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.loaded_model import load_model
from fedvlm_jax.utils.progress import SilentProgress

TRAIN = TrainOptions(rounds=1, local_steps=2, batch_size=4)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Seven sources of unequal sizes, one of them a single row; two rows that cannot be used."""
    rows = [row for row in make_rows(60) if row["origin_dataset"] != "textvqa"]
    rows += [make_row(1000, origin_dataset="textvqa")]
    rows += [make_row(n, origin_dataset="coco") for n in range(2000, 2020)]
    rows[3]["image"] = {"bytes": rows[3]["image"]["bytes"][:40], "path": "cut.png"}
    rows[9]["chosen"] = ""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    write_rows(path, rows)
    return path


def test_from_parquet_to_results(model, rows, tmp_path):
    data = make_options(source=str(rows), max_bad_share=0.1)
    run = tiny_run(model, tmp_path / "run", data=data, cohort=None, train=TRAIN)
    show = SilentProgress()
    folder = federated_run.train(run, show)
    record = read_run(folder)
    resolved = record.config["resolved"]
    assert len(resolved["clients"]) == 7
    assert {row["reason"] for row in resolved["skipped"]} == {"broken or truncated image", "empty answer"}
    assert any("left out: 1 × " in note for note in show.notes)
    assert record.rounds[0]["clients"] == 7
    assert np.isfinite(record.rounds[0]["loss"])
    assert len(list((folder / "adapters" / "clients").iterdir())) == 7


@pytest.mark.broad
def test_adapters_in_the_vision_tower_read_pixels(model, rows, tmp_path):
    """Frozen features would silently leave such adapters untrained."""
    targets = LoraOptions(rank=2, targets=r"vision_tower/.*qkv|decoder/.*fc1")
    data = make_options(source=str(rows), max_bad_share=0.1)
    run = tiny_run(model, tmp_path / "run", data=data, cohort=None, train=TRAIN, lora=targets)
    folder = federated_run.train(run)
    shared = load_file(folder / "adapters" / "shared.safetensors")
    tower = [array for path, array in shared.items() if path.startswith("vision_tower/")]
    assert len(tower) == 2
    assert all(np.abs(array).max() > 0 for array in tower)


def test_cached_features_are_what_the_tower_computes(model, rows, tmp_path):
    data = make_options(source=str(rows), max_bad_share=0.1)
    taken = []
    for cache in ("memory", "disk", "disk", "off"):
        system = SystemOptions(cache=cache, cache_dir=tmp_path / "cache" if cache == "disk" else None)
        run = tiny_run(model, tmp_path / "unused", data=data, cohort=None, system=system)
        loaded, show = load_model(run), SilentProgress()
        experiment = open_experiment(run, loaded, show)
        batch = experiment.inputs(np.arange(8))
        if "pixel_values" in batch:
            batch["image_features"] = loaded.vlm.image_features(loaded.params, None, batch["pixel_values"])
        taken.append(np.asarray(batch["image_features"]))
        said = [note for note in show.notes if note.startswith("image features")]
        assert len(said) == (cache != "off"), "the size is said before anything is computed"
        found = any("there already" in note for note in said)
        assert found == (len(taken) == 3), "only the second run on disk finds what it needs"
    for other in taken[1:]:
        np.testing.assert_allclose(other, taken[0], atol=1e-5)


def test_a_cache_cut_short_by_a_kill_is_mended(model, rows, tmp_path):
    data = make_options(source=str(rows), max_bad_share=0.1)
    run = tiny_run(
        model, tmp_path / "unused", data=data, cohort=None, system=SystemOptions(cache="disk", cache_dir=tmp_path)
    )
    whole = open_experiment(run, load_model(run)).inputs(np.arange(20))["image_features"]
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("features-"))
    for number, file in enumerate([*folder.glob("*.keys"), *folder.glob("*.rows")]):
        file.write_bytes(file.read_bytes()[: -((5 + 32 * 4), 3)[number]])
    mended = open_experiment(run, load_model(run)).inputs(np.arange(20))["image_features"]
    np.testing.assert_array_equal(mended, whole)


def test_a_missing_column_is_told_before_the_model_is_loaded(tmp_path):
    path = tmp_path / "rows.parquet"
    write_rows(path, make_rows(4), drop=("chosen",))
    run = tiny_run(tmp_path / "no-such-model", tmp_path / "run", data=make_options(source=str(path)))
    with pytest.raises(UserError, match="chosen"):
        load_model(run)


def test_a_question_in_the_client_s_language_needs_its_column(model, rows, tmp_path):
    data = make_options(source=str(rows), prompt="client-language")
    run = tiny_run(model, tmp_path / "run", data=data, cohort=None)
    with pytest.raises(UserError, match="question_client"):
        federated_run.train(run)
    assert not (tmp_path / "run").exists()


def test_too_many_bad_rows_are_an_error(model, rows, tmp_path):
    data = make_options(source=str(rows), max_bad_share=0.01)
    run = tiny_run(model, tmp_path / "run", data=data, cohort=None, train=TRAIN)
    with pytest.raises(UserError, match="max-bad-share"):
        federated_run.train(run)
