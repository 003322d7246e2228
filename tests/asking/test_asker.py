"""Answers to a user's questions are those of the evaluation, for every row, model and kind of method."""

import dataclasses
import json
import shutil

import pytest
from models import clip_cases
from models.causal_cases import write_model
from PIL import Image
from tiny_run import tiny_run

from fedvlm_jax.asking.asker import open_asker
from fedvlm_jax.asking.question import Shown
from fedvlm_jax.cli.main import main
from fedvlm_jax.config.run_options import EvaluationOptions, LoraOptions, TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.data.tokenization import find_question_column
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.knn_per import build_datastores
from fedvlm_jax.run_dir.reader import read_finished
from fedvlm_jax.training import federated_run
from fedvlm_jax.utils.progress import SilentProgress

MUCH = TrainOptions(rounds=1, local_steps=2, batch_size=4, learning_rate_a=0.3, learning_rate_b=0.3)
FEW = EvaluationOptions(every=2, max_answer_tokens=4, batch_size=6, examples=0)


@pytest.fixture(scope="module")
def finished(model, loaded, tmp_path_factory):
    """A round that moves much, so that models answer differently."""
    run = tiny_run(model, tmp_path_factory.mktemp("runs") / "run", train=MUCH, evaluation=FEW)
    return federated_run.train(run, model=loaded)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("flora", "hetlora", "local", "finetuned")]


def open_run(folder):
    return open_asker(folder, read_finished(folder), SilentProgress())


@pytest.fixture(scope="module")
def asker(finished):
    return open_run(finished)


def score(asker):
    """Every model's texts of the test rows, client by client, by the evaluation itself."""
    experiment, opened = asker.finished.experiment, asker.finished
    numbers = range(len(asker.clients))
    found = experiment.evaluator(experiment.model.params, {"zero_shot": None}, "test", numbers)
    models = {"personal": opened.personal, "global": opened.general}
    if experiment.neighbours is not None:
        kernel = asker.record.results["neighbours"]["kernel"]
        models["personal"], _, _ = build_datastores(
            experiment.evaluator, experiment.neighbours, opened.params, opened.personal, experiment.scored,
            experiment.run.evaluation.neighbour_capacity, (kernel,),
        )  # fmt: skip
    models = {name: one for name, one in models.items() if one is not None}
    found |= experiment.evaluator(opened.params, models, "test", numbers)
    return {name: scored.texts for name, scored in found.items()}


def ask_all(asker):
    """The same texts by questions, a row at a time, with the bytes of its picture."""
    experiment, told = asker.finished.experiment, {}
    column = find_question_column(experiment.data.table, experiment.run.data)
    for client in experiment.examples.clients:
        for row in client.test.tolist():
            question = experiment.data.table.read_stripped(column, experiment.examples.rows[[row]])[0]
            (answers,) = asker.ask(client.name, question, asker.read_sample(row))
            for name, answer in answers.items():
                told.setdefault(name, {}).setdefault(client.name, []).append(answer.text)
    return told


def test_answers_are_those_of_the_evaluation(asker, finished):
    expected = score(asker)
    assert set(expected) == {"zero_shot", "global", "personal"}
    compiled = asker._program._cache_size()
    told = ask_all(asker)
    assert told == expected
    assert told["personal"] != told["zero_shot"], "models that answer alike would show nothing"
    assert told["personal"] != told["global"]
    assert asker._program._cache_size() - compiled == 2, "one program of the base, and one of all adapters"


def test_the_global_model_is_kept_once_for_all_who_would_begin_alike(finished):
    listed = json.loads((finished / "adapters" / "clients.json").read_text())["clients"]
    (file,) = (finished / "adapters" / "global").iterdir()
    assert {entry["global"] for entry in listed.values()} == {file.stem}


def test_the_command_prints_a_table_and_json(finished, asker, tmp_path, capsys):
    """A folder of two pictures and one that is broken, with a question in the place where people put it."""
    first, second = (
        asker.read_sample(row).contents[0] for row in asker.finished.experiment.examples.clients[1].test[:2]
    )
    for name, content in {"b.png": first, "a.png": second, "c.png": b"broken"}.items():
        (tmp_path / name).write_bytes(content)
    client = asker.clients[1]
    asked = ["--client", client, "--image", str(tmp_path), "Was ist das?"]
    main(["ask", str(finished), *asked, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["client"], told["question"], told["run"]) == (client, "Was ist das?", str(finished))
    assert told["notes"] == ["c.png is left out: broken or truncated image"]
    assert [each["images"] for each in told["asked"]] == [[str(tmp_path / name)] for name in ("a.png", "b.png")]
    shown = [Shown((("x",),), contents=(content,)) for content in (second, first)]
    alone = [asker.ask(client, "Was ist das?", one)[0] for one in shown]
    for entry, answers in zip(told["asked"], alone, strict=True):
        assert {name: each["answer"] for name, each in entry["answers"].items()} == {
            name: answer.text for name, answer in answers.items()
        }


def test_what_the_model_does_not_take_is_told(asker):
    picture = asker.read_sample(int(asker.finished.experiment.examples.clients[0].test[0])).contents[0]
    one, two = (Shown((("x",) * count,), contents=(picture,) * count) for count in (1, 2))
    client = asker.clients[0]
    with pytest.raises(UserError, match="takes 1 picture in a question and there are 2: ask about each alone"):
        asker.ask(client, "What?", two)
    with pytest.raises(UserError, match="cannot be asked that: prompt too long"):
        asker.ask(client, "What? " * 500, one)
    with pytest.raises(UserError, match="there is no client 'eve'"):
        asker.ask("eve", "What?", one)


def test_samples_are_test_rows_with_distinct_pictures(asker):
    experiment = asker.finished.experiment
    for client in experiment.examples.clients:
        found = asker.list_samples(client.name, 2)
        assert len(found) == 2
        assert {sample.number for sample in found} <= set(client.test.tolist())
        assert len({int(experiment.examples.image[sample.number]) for sample in found}) == 2
        assert [sample.answer for sample in found] == [experiment.examples.answers[sample.number] for sample in found]


@pytest.mark.broad
@pytest.mark.parametrize("method", ["fedex-lora", "fedalt", "knn", *SLOW])
def test_methods_that_keep_more_than_an_adapter(method, model, loaded, tmp_path):
    """Moved bases, gates, ranks, neighbours, and what follows the federation: by the path of the evaluation."""
    run = tiny_run(model, tmp_path / "run", train=MUCH, evaluation=FEW)
    if method == "knn":
        run = dataclasses.replace(run, evaluation=dataclasses.replace(FEW, neighbours=3))
    elif method == "finetuned":
        run = dataclasses.replace(run, train=dataclasses.replace(MUCH, finetune_steps=2))
    else:
        run = tiny_run(model, tmp_path / "run", train=MUCH, evaluation=FEW, method=method)
    asker = open_run(federated_run.train(run, model=loaded))
    assert ask_all(asker) == score(asker)
    notes = asker.list_notes()
    none = f"{method} has no part that all clients share, so there is no global model"
    assert notes == ([none] if method in ("local", "fedalt") else [])


@pytest.mark.broad
def test_classes_are_told_with_their_probabilities(tmp_path):
    write_model("clip", tmp_path / "clip", cases=clip_cases.CASES)
    data = make_options(
        languages=("en",), vendors=("noto", "fluent"), tasks=("subgroup",), images_per_client=6,
        validation_per_client=3, test_per_client=6,
    )  # fmt: skip
    run = tiny_run(tmp_path / "clip", tmp_path / "run", data=data, cohort=None, train=MUCH, evaluation=FEW)
    asker = open_run(federated_run.train(run))
    assert ask_all(asker) == score(asker)
    sample = asker.read_sample(int(asker.finished.experiment.examples.clients[0].test[0]))
    (answers,) = asker.ask(asker.clients[0], "?", sample)
    assert asker.list_notes() == ["the model chooses among the classes of its run, and reads no question"]
    for answer in answers.values():
        shares = [share for _, share in answer.classes]
        assert answer.text == answer.classes[0][0]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1 + 1e-5
        assert len(shares) == min(10, len(asker.finished.experiment.model.vlm.classes))


@pytest.mark.broad
@pytest.mark.parametrize("case", ["smolvlm", pytest.param("qwen3-vl", marks=pytest.mark.slow)])
def test_chat_models_are_asked_as_their_rows_are_and_about_several_pictures(case, tmp_path):
    write_model(case, tmp_path / "model")
    lines = []
    for number in range(16):
        Image.new("RGB", (40, 30), (15 * number, 40, 90)).save(tmp_path / f"{number}.jpg")
        pictures = [f"{number}.jpg"] if number % 2 else [f"{number}.jpg", f"{(number + 3) % 16}.jpg"]
        line = {
            "images": pictures,
            "question": "red?",
            "answer": ["yes", "no"][number % 2],
            "client": "ab"[number // 2 % 2],
        }
        lines.append(json.dumps(line) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    data = make_options(str(tmp_path / "rows.jsonl"), columns=("chosen=answer",), max_answer_tokens=16)
    run = tiny_run(
        tmp_path / "model", tmp_path / "run", data=data, cohort=None, train=MUCH, evaluation=FEW,
        lora=LoraOptions(rank=2),
    )  # fmt: skip
    asker = open_run(federated_run.train(run))
    assert asker.most_pictures > 1
    counts = (asker.finished.experiment.examples.pictures >= 0).sum(1)
    assert set(counts.tolist()) == {1, 2}
    assert ask_all(asker) == score(asker)


@pytest.mark.broad
def test_a_run_of_a_version_that_kept_no_global_model(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "old")
    listed = json.loads((folder / "adapters" / "clients.json").read_text())
    for entry in listed["clients"].values():
        del entry["global"]
    (folder / "adapters" / "clients.json").write_text(json.dumps(listed))
    asker = open_run(folder)
    sample = asker.read_sample(int(asker.finished.experiment.examples.clients[0].test[0]))
    assert set(asker.ask(asker.clients[0], "What?", sample)[0]) == {"zero_shot", "personal"}
    assert asker.list_notes() == ["the run was made by a version that kept no global model, so that one is not asked"]
