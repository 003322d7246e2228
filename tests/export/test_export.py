"""`fedvlm export` of finished tiny runs: what is written, what is checked, what is refused; and the way back in."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from hub_server import Repository
from safetensors.numpy import load_file
from tiny_run import tiny_run

from fedvlm_jax import lora
from fedvlm_jax.cli.main import main
from fedvlm_jax.errors import UserError
from fedvlm_jax.export.exported_run import choose_clients, open_run
from fedvlm_jax.export.hub_upload import upload
from fedvlm_jax.export.merged_export import export_merged
from fedvlm_jax.export.peft_export import export_peft
from fedvlm_jax.models import load_vlm
from fedvlm_jax.peft import read_peft
from fedvlm_jax.run_dir.artifacts import open_adapters, open_global, save_adapters
from fedvlm_jax.run_dir.config_seal import seal
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.evaluate import evaluate_adapter
from fedvlm_jax.utils import tree


def read_general(run):
    """The global model, which all clients of these runs would begin with."""
    names = list(json.loads((run / "adapters" / "clients.json").read_text())["clients"])
    return jax.tree.map(lambda leaf: leaf[0], open_global(run / "adapters", names)(np.asarray([0])))


@pytest.fixture(scope="module")
def run(model, loaded, tmp_path_factory):
    """The folder of a finished run."""
    return federated_run.train(tiny_run(model, tmp_path_factory.mktemp("runs") / "plora"), model=loaded)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "peft"
    return out, *export_peft(run, out)


def names_of(run):
    return json.loads((run / "config.json").read_text())["resolved"]["clients"]


def product(adapter):
    sites = lora.sites_of(adapter)
    return {path: np.asarray(s)[..., None, None] * np.asarray(a) @ np.asarray(b) for path, (a, b, s) in sites}


def test_every_client_and_the_shared_part_have_a_folder(run, exported, model):
    out, count, worst = exported
    names = names_of(run)
    manifest = json.loads((out / "manifest.json").read_text())
    assert count == len(names) + 1
    assert manifest["method"] == "plora"
    assert manifest["module_names"].startswith("transformers 5.")
    assert manifest["base"]["moved"] is False
    folders = manifest["folders"]
    assert sorted(entry["client"] for entry in folders.values() if "client" in entry) == sorted(names)
    assert worst.error == 0  # float32 factors come back bit for bit
    assert worst.largest > 0.1
    vlm, _ = load_vlm(model)
    read = open_adapters(run / "adapters", names)
    for inside, entry in folders.items():
        found = read_peft(out / inside, vlm)
        assert found.base == str(model)
        if inside == "shared":
            stored = read_general(run)
        else:
            stored = jax.tree.map(lambda leaf: leaf[0], read(np.asarray([names.index(entry["client"])])))
            results = json.loads((run / "results.json").read_text())
            loss = results["personal"]["test"]["loss"][entry["client"]]
            assert entry["scores"]["test"]["loss"] == loss
            assert (
                f"| loss | {results['zero_shot']['validation']['loss'][entry['client']]:.3f} |"
                in (out / inside / "README.md").read_text()
            )
        for path, leaf in tree.flatten(stored).items():
            np.testing.assert_array_equal(tree.flatten(found.adapter)[path], leaf)
        for file in (out / inside).iterdir():
            assert file.stat().st_mode & 0o777 == 0o644


def test_cards_of_all_and_of_the_shared_part_have_every_client_s_scores(run, exported, model):
    out, results = exported[0], json.loads((run / "results.json").read_text())
    scores = {name: results[name]["test"][results["selected_by"]] for name in ("zero_shot", "global", "personal")}
    for file, name in ((out / "README.md", "personal"), (out / "shared" / "README.md", "global")):
        card = file.read_text()
        for client in names_of(run):
            row = next(line for line in card.splitlines() if line.startswith(f"| {client} |"))
            shown = [scores[column][client] for column in ("zero_shot", name)]
            assert row.endswith(" | ".join(f"{100 * score:.1f} %" for score in shown) + " |")
        assert "No score" not in card
        assert f"- Base: {model.name}\n" in card, "no path, which is nobody else's to know"
    assert json.loads((out / "manifest.json").read_text())["base"]["name"] == model.name


@pytest.mark.broad
def test_a_shared_part_with_a_start_of_one_client_s_says_so(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    change_options(tmp_path / "run", lambda options: options["lora"].update(private_a="per-client"))
    export_peft(tmp_path / "run", tmp_path / "out", clients=names_of(run)[:1])
    card = (tmp_path / "out" / "shared" / "README.md").read_text()
    assert f"the private part that one of the clients, {names_of(run)[0]}, began with" in card
    assert "No score was kept of it" in card


def test_the_shared_part_is_that_of_the_server(run):
    stored, shared = tree.flatten(read_general(run)), load_file(run / "adapters" / "shared.safetensors")
    assert shared
    for path, leaf in shared.items():
        np.testing.assert_array_equal(stored[path], leaf)


@pytest.mark.broad
def test_a_run_begins_with_a_client_s_adapter(run, exported, model, loaded, tmp_path):
    """Nothing is trained away: with learning rates of nearly nothing every client ends with what it began with."""
    out, *_ = exported
    inside = next(iter(json.loads((out / "manifest.json").read_text())["folders"]))
    start = out / inside
    again = dataclasses.replace(
        tiny_run(model, tmp_path / "again"), start=start, lora=type(tiny_run(model, tmp_path).lora)()
    )
    slow = dataclasses.replace(again.train, learning_rate_a=1e-30, learning_rate_b=1e-30, rounds=1)
    folder = federated_run.train(dataclasses.replace(again, train=slow), model=loaded)
    vlm, _ = load_vlm(model)
    wanted = product(read_peft(start, vlm).adapter)
    config = json.loads((folder / "config.json").read_text())
    assert config["run"]["lora"]["rank"] == 2
    assert config["fingerprint"]["start"]
    adapters = open_adapters(folder / "adapters", names_of(folder))(np.arange(len(names_of(folder))))
    for path, matrix in product(adapters).items():
        for client in matrix:
            np.testing.assert_allclose(client, wanted[path], rtol=1e-6, atol=1e-7)
    record = evaluate_adapter(dataclasses.replace(again, out=None, method="local"))
    results = json.loads((folder / "results.json").read_text())
    for client, loss in results["personal"]["test"]["loss"].items():
        assert record.scores("personal", "loss")[client] == pytest.approx(loss, rel=1e-5)


@pytest.mark.broad
@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_a_base_that_moved_goes_out_once_beside_the_adapters(method, model, loaded, tmp_path):
    """Who opens that base with a client's folder scores what the run's client scored."""
    run = tiny_run(model, tmp_path / "run", method=method)
    fast = dataclasses.replace(run.train, rounds=2, learning_rate_a=0.03, learning_rate_b=0.03)
    run = dataclasses.replace(run, train=fast, evaluation=dataclasses.replace(run.evaluation, examples=0))
    folder, out = federated_run.train(run, model=loaded), tmp_path / "out"
    _, worst = export_peft(folder, out)
    manifest, results = (json.loads(file.read_text()) for file in (out / "manifest.json", folder / "results.json"))
    assert manifest["base"]["moved"]
    assert manifest["base_model_name_or_path"] == str(out / "base")
    assert worst.error < 1e-5
    inside, client = next((path, entry["client"]) for path, entry in manifest["folders"].items() if "client" in entry)
    again = dataclasses.replace(run, out=None, method="local", start=out / inside, lora=type(run.lora)())
    record = evaluate_adapter(dataclasses.replace(again, model=str(out / "base")))
    wanted = results["personal"]["test"]["loss"][client]
    assert record.scores("personal", "loss")[client] == pytest.approx(wanted, rel=1e-5)
    assert abs(results["zero_shot"]["test"]["loss"][client] - wanted) > 1e-3


def test_a_merged_model_gives_the_logits_of_base_and_adapter(run, tmp_path, model):
    name = names_of(run)[0]
    count, worst = export_merged(run, tmp_path / "merged", clients=[name])
    assert count == 1
    assert 0 <= worst.error < 1e-5
    (entry,) = json.loads((tmp_path / "merged" / "manifest.json").read_text())["folders"]
    folder = tmp_path / "merged" / entry
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        file.name for file in folder.iterdir()
    }
    assert json.loads((folder / "config.json").read_text()).get("dtype", "float32") == "float32"
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_scale_of_a_layer_in_no_stack_is_a_number_again(tmp_path):
    """Files had [1] for it, and such an adapter could not be merged: of token tables, positions, projectors."""
    layer = {"a": np.ones((4, 2), np.float32), "b": np.ones((2, 3), np.float32), "scale": np.float32(2)}
    stacked = {"a": np.ones((1, 4, 2), np.float32), "b": np.ones((1, 2, 3), np.float32), "scale": np.ones(1)}
    before = {"fc": {**layer, "scale": np.full(1, 2, np.float32)}, "qkv": stacked}  # as earlier versions wrote them
    for number, adapter in enumerate(({"fc": layer, "qkv": stacked}, before)):
        folder = tmp_path / str(number)
        save_adapters(folder, [("ann", adapter)], {}, {})
        found = jax.tree.map(lambda leaf: leaf[0], open_adapters(folder, ["ann"])(np.asarray([0])))
        assert found["fc"]["scale"].shape == ()
        assert found["qkv"]["scale"].shape == (1,)
        weights = {"fc": {"kernel": np.zeros((4, 3), np.float32)}, "qkv": {"kernel": np.zeros((1, 4, 3), np.float32)}}
        assert np.asarray(lora.merge(weights, found)["fc"]["kernel"]).tolist() == [[4.0] * 3] * 4
    assert load_file(tmp_path / "0" / "clients" / "ann.safetensors")["fc/scale"].shape == ()


def test_merged_models_of_many_are_refused_with_their_size(run, tmp_path):
    with pytest.raises(
        UserError, match=r"a merged model takes 315 KiB, those of all 4 clients take 1.2 MiB: .*--clients NAME"
    ):
        export_merged(run, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_all_is_everybody_whatever_is_written(run):
    opened = open_run(run)
    for asked in ((), ("all",)):
        assert choose_clients(opened, asked) == tuple(names_of(run))
    assert choose_clients(opened, ("noto-en", "noto-de", "noto-en")) == ("noto-en", "noto-de")


def unfinish(folder):
    (folder / "results.json").unlink()


def change_options(folder, change):
    """As a run with other options has them."""
    content = json.loads((folder / "config.json").read_text())
    change(content["run"])
    (folder / "config.json").write_text(json.dumps(seal(content)))


def remember(folder):
    change_options(folder, lambda options: options["evaluation"].update(neighbours=4))


def damage(folder):
    file = next((folder / "adapters" / "clients").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize(
    ("change", "words", "reason"),
    [
        (unfinish, [], "this run is not finished"),
        (remember, [], "ask what they remember"),
        (damage, [], "is not as it was written"),
        (lambda folder: (folder / "peft").mkdir() or (folder / "peft" / "x").touch(), [], "is not empty"),
        (lambda folder: (folder / "peft").touch(), [], "is no folder"),
        (lambda folder: None, ["--clients", "nobody"], "there is no client 'nobody'; did you mean noto-de?"),
        (lambda folder: None, ["--to", "merged", "--uniform"], "--uniform is for --to peft"),
        (lambda folder: None, ["--push", "x"], "expected a hub id"),
        (lambda folder: None, ["--push", "owner/"], "expected a hub id"),
        (lambda folder: None, ["--push", "owner/name"], "by its place on this machine, where nobody else finds it"),
        (lambda folder: shutil.rmtree(folder), [], "there is no such folder"),
    ],
)
def test_bad_input_ends_in_a_line_and_leaves_nothing(run, tmp_path, capsys, change, words, reason):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    change(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["export", str(folder), *words])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert reason in said[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_hub_that_cannot_be_reached_is_a_line(exported, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"--push owner/name: the hub did not take it"):
        upload(exported[0], "owner/name")


def read_files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("to", "words"), [("peft", ["--base", "owner/base"]), ("merged", ["--clients", "noto-de"])], ids=["peft", "merged"]
)
def test_what_is_pushed_is_what_was_written(run, tmp_path, hub, capsys, model, to, words):
    out = tmp_path / "out"
    main(["export", str(run), "--to", to, "--out", str(out), "--push", "owner/name", *words])
    assert capsys.readouterr().out.splitlines()[-1] == f"pushed  {hub.address}/owner/name"
    repository = hub.repositories["owner/name"]
    assert repository.private
    assert repository.files == read_files(out)
    assert {path for path in repository.files if path.endswith(".safetensors")}
    for path, content in repository.files.items():
        assert str(model).encode() not in content, f"{path} names a place on this machine"
        assert str(run).encode() not in content, f"{path} names a place on this machine"


def test_a_repository_that_is_there_stays_as_open_as_it_is(exported, hub):
    hub.repositories["owner/name"] = Repository(private=False, files={"LICENSE": b"mine", "README.md": b"old"})
    upload(exported[0] / "shared", "owner/name")
    files = hub.repositories["owner/name"].files
    assert files == {"LICENSE": b"mine", **read_files(exported[0] / "shared")}
    assert not hub.repositories["owner/name"].private


@pytest.mark.parametrize("fault", ["/create", "/validate-yaml", "/preupload/main", "/batch", "/commit/main", "token"])
def test_a_push_that_fails_is_a_line_and_the_folder_stays(exported, hub, monkeypatch, fault):
    if fault == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    else:
        hub.broken.add(fault)
    before = read_files(exported[0])
    with pytest.raises(UserError, match=r"--push owner/name: the hub did not take it") as told:
        upload(exported[0], "owner/name")
    assert f"hf upload owner/name {exported[0]}" in str(told.value)
    assert "\n" not in str(told.value)
    assert not hub.repositories.get("owner/name", Repository(True)).files
    assert read_files(exported[0]) == before


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["train", "--start", "nowhere"], "nowhere: there is no such folder"),
        (["train", "--start", "nowhere", "--lora.ranks", "2", "8"], "exclude each other"),
        (["train", "--start", "nowhere", "--method", "flora"], "draw fresh factors in every round"),
        (["evaluate", "--adapter", "nowhere"], "nowhere: there is no such folder"),
        (["evaluate"], "say what to evaluate"),
        (["evaluate", "nowhere", "--seed", "3"], "--seed goes with --adapter"),
        (["evaluate", "nowhere", "--adapter", "nowhere"], "exclude each other"),
    ],
)
def test_starts_that_cannot_be_are_refused(words, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err
