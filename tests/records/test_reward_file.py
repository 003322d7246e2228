"""A file of rewards as somebody wrote it: what it says, and what is refused in one line."""

import json
import os

import pytest

from fedvlm_jax.cli.main import main
from fedvlm_jax.errors import UserError
from fedvlm_jax.records import reward_file
from fedvlm_jax.records.reward_file import Judged, read_rewards


def write(tmp_path, *records, name="rewards.jsonl"):
    file = tmp_path / name
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in records))
    return file


def test_json_lines_say_what_they_mean(tmp_path):
    file = write(
        tmp_path,
        {"answer": " a bus ", "reward": 1},
        {"answer": "a bus", "reward": 0.5, "question": "What is it? ", "client": "ann"},
        {"reward": 0.25},
        {"answer": "a bus", "reward": 1.0, "client": None},
        {"answer": "", "reward": 0},
    )
    listed = {Judged("a bus"): 1.0, Judged("a bus", "What is it?", "ann"): 0.5, Judged(""): 0.0}
    assert read_rewards(file) == (listed, 0.25)


def test_csv_says_the_same(tmp_path):
    file = write(tmp_path, "reward;answer;client", "0.5;a bus;", '1;"a, bus";ann', "0.1;;", name="rewards.CSV")
    assert read_rewards(file) == ({Judged("a bus"): 0.5, Judged("a, bus", None, "ann"): 1.0}, 0.1)


GOOD = {"answer": "a", "reward": 1}
BAD = {
    "no JSON": (["{"], "record 1: line is no JSON object"),
    "a list in a line": ([GOOD, '"a"'], "record 2: line is no JSON object"),
    "no reward": ([{"answer": "a"}], "has the reward None: expected a number from 0 to 1"),
    "NaN": (['{"answer": "a", "reward": NaN}'], "has the reward nan"),
    "infinity": (['{"answer": "a", "reward": 1e999}'], "has the reward inf"),
    "a huge number": (['{"answer": "a", "reward": 1' + "0" * 5000 + "}"], "record 1: line is no JSON object"),
    "beyond one": ([{"answer": "a", "reward": 1.5}], "has the reward 1.5"),
    "below zero": ([{"answer": "a", "reward": -0.1}], "has the reward -0.1"),
    "a truth": ([{"answer": "a", "reward": True}], "has the reward True"),
    "a text": ([{"answer": "a", "reward": "1"}], "has the reward '1'"),
    "another name": ([{**GOOD, "rewad": 1}], "has 'rewad': expected answer, reward, question, client"),
    "an answer that is a number": ([{**GOOD, "answer": 3}], "the answer is no text: 3"),
    "a list of questions": ([{**GOOD, "question": ["a"]}], "the question is no text"),
    "a long answer": ([{**GOOD, "answer": "a" * 20_000}], "the answer has 20,000 characters: 16,384 are the most"),
    "an escape": ([{**GOOD, "answer": "a\x1b[31m"}], "characters that nobody sees"),
    "half a pair": (['{"answer": "\\ud800", "reward": 1}'], "characters that nobody sees, or is no UTF-8"),
    "two rewards": ([GOOD, GOOD, {**GOOD, "reward": 0}], "record 3 has the reward 0 for the answer 'a', and one .* 1:"),
    "two defaults": ([GOOD, {"reward": 0}, {"reward": 1}], "record 3 has no answer, as one before it"),
    "a default for one": ([GOOD, {"reward": 0, "client": "ann"}], "record 2 has no answer, so it is for all"),
    "a default alone": ([{"reward": 0}], "has no answer: expected records of"),
    "nothing": ([], "has no answer: expected records of"),
    "too many": ([GOOD] * 4, "has more than 3 records"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_means_nothing_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.setattr(reward_file, "MOST", 3)
    records, message = BAD[case]
    with pytest.raises(UserError, match=message) as refused:
        read_rewards(write(tmp_path, *records))
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["answer,reward", "a,many"], "has the reward 'many'"),
        (["answer,reward", "a,nan"], "has the reward 'nan'"),
        (["answer,reward", "a,1,2"], "more or fewer cells"),
        (["answer,reward", '"a,1'], "quotes that are never closed"),
        (["answer,answer", "a,1"], "more than one column"),
    ],
)
def test_csv_is_refused_alike(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_rewards(write(tmp_path, *lines, name="rewards.csv"))


def test_no_file_and_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("nothing.jsonl", "pipe", ""):
        with pytest.raises(UserError, match="there is no such file"):
            read_rewards(tmp_path / name)


def test_the_command_says_so_in_a_line_before_anything_is_made(tmp_path, capsys):
    file = write(tmp_path, {"answer": "a\x1b[31m", "reward": 1})
    words = ["train", "--objective", "reward", "--preference.rewards", "file", "brevity", "--out", str(tmp_path / "r")]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--preference.reward-file", str(file)])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "record 1: the answer has characters" in told
    assert "\x1b" not in told
    assert told.count("\n") == 1
    assert not (tmp_path / "r").exists()
