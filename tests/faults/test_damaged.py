"""Run folders that a disk, an editor or a copy has damaged: one line that names the file, wherever it is read."""

import copy
import json
import os

import pytest
from made_up import write_comparison, write_run
from make_parquet import draw_image

from fedvlm_jax.cli.main import main
from fedvlm_jax.config.run_options import Run, from_json, to_json
from fedvlm_jax.errors import UserError
from fedvlm_jax.reporting.example_cards import read_cards
from fedvlm_jax.reporting.pages import render
from fedvlm_jax.reporting.score_tables import tabulate_comparison, tabulate_run
from fedvlm_jax.reporting.sentences import describe_comparison, describe_run
from fedvlm_jax.run_dir.reader import read_comparison, read_metrics, read_run
from fedvlm_jax.run_dir.validated_files import read_config
from fedvlm_jax.training import evaluate, federated_run
from fedvlm_jax.training.compare import finish_run
from fedvlm_jax.utils.progress import SilentProgress

NO_OBJECT = {
    "empty": b"",
    "half": b'{"run": {"model": "flor',
    "null": b"null",
    "a list": b"[]",
    "a text": b'"run"',
    "a number": b"7",
    "BOM": b'\xef\xbb\xbf{"run": {}}',
    "UTF-16": '{"run": {}}'.encode("utf-16"),
    "Latin-1": '{"run": "ä"}'.encode("latin-1"),
    "zeros": bytes(4096),
    "brackets": b"[" * 200_000,
    "a long number": b'{"run": ' + b"9" * 5000 + b"}",
    "HTML": b"<!doctype html><title>404</title>",
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
}
"""What no file of JSON objects holds."""

ODD = (None, True, 7, -1, 1e30, 10**400, "", "x", [], [None], [[]], {}, {"a": None}, {"a": {"a": "x"}})
"""What may stand in place of any entry."""


def is_one_line(error):
    return "\n" not in str(error) and len(str(error)) < 700


def read_or_tell(read, path):
    """What a function reads, or None where one line names the file."""
    try:
        return read()
    except UserError as error:
        told = str(error)
    assert is_one_line(told)
    assert str(path) in told or told.startswith("there is no client")  # no damage: nobody has a score
    return None


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", {"a": 0.2, "b": 0.3}, {"a": 0.5, "b": 0.4})


@pytest.fixture
def comparison(tmp_path):
    return write_comparison(tmp_path / "c", {"local": {0: {"a": 0.5, "b": 0.4}}}, {0: {"a": 0.2, "b": 0.1}})


def list_places(stored, path=()):
    """Where an entry of nested JSON can be replaced: paths of keys."""
    items = stored.items() if isinstance(stored, dict) else enumerate(stored) if isinstance(stored, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from list_places(value, (*path, key))


def put(stored, path, value):
    changed = copy.deepcopy(stored)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


def drop(stored, path):
    changed = copy.deepcopy(stored)
    at = changed
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return changed


# --- Files that are no JSON objects ---


@pytest.mark.parametrize("kind", NO_OBJECT)
@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_run_s_file_is_no_object(run, name, kind, capsys):
    (run / name).write_bytes(NO_OBJECT[kind])
    commands = [["report", str(run)]]
    if name == "config.json":
        commands += [["train", "--resume", str(run)], ["evaluate", str(run)]]
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main(command)
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert str(run / name) in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("kind", NO_OBJECT)
def test_a_file_of_examples_is_no_object(run, kind):
    (run / "examples.json").write_bytes(NO_OBJECT[kind])
    assert read_or_tell(lambda: read_cards(run), run / "examples.json") is None


@pytest.mark.parametrize("kind", NO_OBJECT)
def test_a_comparison_s_file_is_no_object(comparison, kind, capsys):
    (comparison / "comparison.json").write_bytes(NO_OBJECT[kind])
    with pytest.raises(SystemExit) as stop:
        main(["report", str(comparison)])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert "comparison.json" in said


def test_a_file_that_is_a_folder(run):
    (run / "results.json").unlink()
    (run / "results.json").mkdir()
    with pytest.raises(UserError, match="not finished"):
        read_run(run)


# --- Entries ---


def test_every_entry_of_the_options(run):
    """Replaced, dropped or added: either the options are as they were meant to be, or one line names what is wrong."""
    path = run / "config.json"
    stored = json.loads(path.read_text())
    told = 0
    for number, place in enumerate(list_places(stored["run"])):
        changes = [put(stored["run"], place, ODD[(number + turn) % len(ODD)]) for turn in range(3)]
        changes += [drop(stored["run"], place), put(stored["run"], (*place[:-1], "new"), 1)] if _is_key(place) else []
        for changed in changes:
            path.write_text(json.dumps({**stored, "run": changed}))
            read = read_or_tell(lambda: read_config(run), path)
            told += read is None
            assert read is None or from_json(to_json(read.run)) == read.run
    assert told > 200


def _is_key(place):
    return isinstance(place[-1], str)


def test_every_entry_of_what_was_resolved(run):
    path = run / "config.json"
    stored = json.loads(path.read_text())
    for place in list_places({name: stored[name] for name in ("run", "resolved")}):
        if place[:1] == ("run",) and len(place) > 1:
            continue
        for changed in [*(put(stored, place, value) for value in ODD), drop(stored, place)]:
            path.write_text(json.dumps(changed))
            read = read_or_tell(lambda: read_config(run), path)
            assert read is None or min(read.mesh.devices, read.wave) >= 1


def test_every_entry_of_the_results(run):
    """What is read is shown: as tables and sentences."""
    path = run / "results.json"
    matrix = {"clients": ["a", "b"], "exact_match": [[0.1, 0.2], [0.3, 0.4]]}
    stored = json.loads(path.read_text()) | {
        "selected_by": "exact_match",
        "held_out": {"cold_start": "mean", "zero_shot": {}, "personal": {"test": {"exact_match": {"c": 0.5}}}},
        "gain_intervals": {"exact_match": {"a": [0.1, 0.2], "b": [0.1, 0.3]}},
        "neighbours": {"share": {"a": 0.5}},
        "cross_clients": matrix,
    }
    path.write_text(json.dumps(stored))
    assert tabulate_run(read_run(run))
    _replace_all(path, stored, lambda: _show_run(run))


def _show_run(run):
    record = read_run(run)
    return [*tabulate_run(record), *describe_run(record)]


def test_every_entry_of_a_comparison(comparison):
    path = comparison / "comparison.json"

    def show():
        record = read_comparison(comparison)
        return [*tabulate_comparison(record), *describe_comparison(record)]

    show()
    _replace_all(path, json.loads(path.read_text()), show)


def test_every_entry_of_a_line(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    second = json.loads(lines[1])

    def write(changed):
        path.write_text("\n".join([lines[0], json.dumps(changed), *lines[2:]]) + "\n")

    told = 0
    for place in list_places(second):
        for changed in [*(put(second, place, value) for value in ODD), drop(second, place)]:
            write(changed)
            told += not read_or_tell(lambda: _show_run(run), f"{path}, line 2: ")
    assert told > 100


def test_every_entry_of_the_examples(run):
    path = run / "examples.json"
    (run / "examples").mkdir()
    (run / "examples" / "00.png").write_bytes(draw_image(1))
    said = {"text": "a cat", "exact_match": 0.0, "token_f1": 0.5}
    entry = {"client": "a", "row": 1, "picture": "examples/00.png", "question": "who?", "answer": "a dog"}
    stored = {"looked_at": {"a": 4}, "examples": [{**entry, "answers": {"zero_shot": said, "personal": said}}]}

    def show():
        cards, _ = read_cards(run)
        return "".join(render(f"cards.{kind}.j2", cards=cards, note="note", folder=run) for kind in ("html", "md"))

    path.write_text(json.dumps(stored))
    assert "a cat" in show()
    _replace_all(path, stored, show, least=30)


def _replace_all(path, stored, show, least=50):
    told = 0
    for number, place in enumerate(list_places(stored)):
        odd = [ODD[(5 * number + turn) % len(ODD)] for turn in range(5)]
        for changed in [*(put(stored, place, value) for value in odd), drop(stored, place)]:
            path.write_text(json.dumps(changed))
            told += not read_or_tell(show, path)
    assert told > least


# --- Lines ---


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"loss": 1.0}', "the entry 'round' is missing"),
        (b"[1, 2]", "expected a JSON object"),
        (b"7", "expected a JSON object"),
        (b"", "not readable as JSON"),
        (b'{"round": 2', "not readable as JSON"),
        (b'{"round": "2"}', "round = '2'; expected int"),
        (b'{"round": 2.0}', "round = 2.0; expected int"),
        (b'{"round": -3}', "there is no round -3"),
        (b'{"round": 1' + b"0" * 300 + b"}", "there is no round 1000"),
        (b'{"round": 2, "validation": []}', "validation = […]; expected"),
        (b'{"round": 2, "loss": "low"}', "loss = 'low'; expected float"),
    ],
)
def test_a_line_that_is_no_round_s(run, line, told):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(UserError) as found:
        read_metrics(run)
    assert f"{path}, line 2: " in str(found.value)
    assert told in str(found.value)


@pytest.mark.parametrize("name", ["config.json", "results.json", "metrics.jsonl"])
def test_a_file_of_gigabytes_is_not_read(run, name):
    os.truncate(run / name, 20 << 30)  # a hole, which takes no place on the disk
    with pytest.raises(UserError, match="21,474,836,480 bytes, more than a run ever writes there"):
        read_run(run)


def test_a_bad_byte(run):
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + b"\xff" + whole[101:])
    with pytest.raises(UserError, match=r"metrics\.jsonl: not UTF-8 at byte 100; is the file damaged\?"):
        read_metrics(run)


@pytest.mark.parametrize("left", [b'{"round": 7, "lo', b'{"round"', b"\0\0\0", b"{"])
def test_what_a_kill_leaves_of_the_last_line_is_no_damage(run, left):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + left)
    assert [line["round"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_an_editor_may_take_the_last_end_of_line(run):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    assert [line["round"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


# --- Options that were edited ---


@pytest.mark.parametrize(
    ("part", "name", "value", "told"),
    [
        ("train", "rounds", 0, "--train.rounds is 0: it must be 1 or more"),
        ("train", "learning_rate_a", "nan", "--train.learning-rate-a is nan"),
        ("lora", "targets", "(", "is not a regular expression"),
        ("evaluation", "metrics", ["nonsense"], "--evaluation.metrics nonsense"),
        (None, "method", "plorra", "did you mean plora?"),
        (None, "seed", -1, "--seed is -1"),
    ],
)
def test_a_resumed_run_s_options_are_judged(run, part, name, value, told, tmp_path):
    path = run / "config.json"
    stored = json.loads(path.read_text())
    (stored["run"][part] if part else stored["run"])[name] = value
    path.write_text(json.dumps(stored))
    (run / "results.json").unlink()
    with pytest.raises(UserError) as found:
        federated_run.resume(run)
    assert str(path) in str(found.value)
    assert told in str(found.value)
    assert is_one_line(found.value)


def test_other_ways_to_a_damaged_run_name_it_too(run, tmp_path):
    """A comparison that finds it in its folder, a run that continues it, its evaluation."""
    (run / "config.json").write_text("{}")
    inside = tmp_path / "c" / "runs" / "local-seed0"
    inside.parent.mkdir(parents=True)
    run.rename(inside)
    for command in (
        lambda: finish_run(Run(method="local", out=inside), SilentProgress(), None),
        lambda: federated_run.extend(inside, Run(method="local", out=tmp_path / "other")),
        lambda: evaluate.evaluate(inside),
    ):
        with pytest.raises(UserError, match=r"local-seed0/config\.json: the entry 'run' is missing"):
            command()
