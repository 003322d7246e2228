"""What a model that knows every answer by heart scores: 1.0, or the run says before training why it cannot."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.evaluation.evaluator import Evaluator
from fedvlm_jax.evaluation.gold_answers import Gold, read_gold
from fedvlm_jax.models import read_vlm
from fedvlm_jax.models.beam_search import Settings
from fedvlm_jax.models.florence2 import Processor

LONG = " ".join(f"word{number}" for number in range(12))
JSON = '{"a": 1, "b": 1, "c": 1}'
BOXES = "car<loc_1><loc_2><loc_3><loc_4>"


@pytest.fixture(scope="module")
def processor() -> Processor:
    processor = Processor.from_folder("florence2-nano")
    processor.wrapped.tokenizer.add_tokens([f"<loc_{number}>" for number in range(9)], special_tokens=True)
    return processor


@pytest.fixture(scope="module")
def greedy() -> Settings:
    return read_vlm("florence2-nano").settings()


def tokens(processor: Processor, text: str) -> int:
    return int((processor.answers([text], 500) != IGNORED).sum())


def read(processor: Processor, settings: Settings, answers: list[str], most: int = 128, **changes: Any) -> Gold:
    return read_gold(answers, range(len(answers)), processor, most, settings.__class__(**vars(settings) | changes))


def score_by_heart(processor: Processor, gold: Gold, answers: list[str]) -> dict[str, float]:
    """The mean of every metric for a model whose every answer is the gold one, in the budget that `gold` gives."""
    labels = processor.answers(answers, 500)
    ids = np.full((len(answers), gold.budget), 1, np.int32)
    for row, own in zip(ids, labels, strict=True):
        said = own[own != IGNORED][: gold.budget]
        row[: len(said)] = said
    client = SimpleNamespace(name="one", rows_of=lambda split: np.arange(len(answers)))
    numbers = {name: jnp.ones((1, len(answers))) for name in ("chosen_log_prob", "chosen_correct", "chosen_tokens")}
    evaluator = Evaluator(
        examples=SimpleNamespace(clients=(client,)),
        inputs=lambda rows: {"input_ids": np.zeros((*rows.shape, 4), np.int32)},
        processor=processor,
        wave=1,
        batch=len(answers),
        mesh=make_mesh(1),
        answer=lambda params, adapters, batch: (jnp.asarray(ids)[None], numbers),
        gold=gold.all,
        metrics=("exact_match", "token_f1", "rouge_l"),
        beta=0.1,
        base={},
    )  # type: ignore[arg-type]
    scores = evaluator({}, {"own": None}, "test", [0])["own"].scores
    return {name: scores[name]["one"] for name in evaluator.metrics}


@pytest.mark.parametrize("answers", [["a cat"], [LONG], [JSON], [BOXES], ["a <loc_1> cat <loc_2>", "é 猫", LONG]])
def test_who_knows_all_by_heart_scores_one(processor: Processor, greedy: Settings, answers: list[str]) -> None:
    gold = read(processor, greedy, answers)
    assert gold.unreachable == {}
    assert score_by_heart(processor, gold, answers) == {"exact_match": 1.0, "token_f1": 1.0, "rouge_l": 1.0}


def test_the_budget_follows_the_answers(processor: Processor, greedy: Settings) -> None:
    assert tokens(processor, LONG) > 32
    assert read(processor, greedy, ["a cat"]).budget == 16
    assert read(processor, greedy, ["a cat", LONG]).budget == -(-tokens(processor, LONG) // 16) * 16
    assert read(processor, greedy, ["a cat", LONG], most=20).budget == 20
    assert read_gold(["a cat", LONG], [0], processor, 128, greedy).budget == 16  # the long one is not scored


def test_what_no_model_reaches_is_counted(processor: Processor, greedy: Settings) -> None:
    answers = ["a cat", LONG, LONG, "</s> x <image>"]
    found = read(processor, greedy, answers, most=16)
    assert found.unreachable == {"longer than 16 tokens": 2, "with text that the tokenizer cannot write": 1}
    assert (found.texts, found.scored, found.longest) == (answers, 4, 17)
    assert score_by_heart(processor, found, answers[:2])["exact_match"] == 0.5
    banned = read(processor, greedy, ["a cat", JSON], no_repeat_ngram_size=3)
    assert banned.unreachable == {"repeating 3 tokens, which no_repeat_ngram_size bans": 1}
    assert read(processor, greedy, ["a cat"], min_length=9).unreachable == {
        "shorter than min_length or min_new_tokens": 1
    }


def test_a_text_that_ends_the_processor_is_unreachable_and_ends_nothing_else(
    processor: Processor, greedy: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of several people's answers may be anything."""
    answers = Processor.answers

    def refuse(self: Processor, texts: list[str], most: int) -> Any:
        if "zebra" in texts:
            raise BaseException("a panic")
        return answers(self, texts, most)

    monkeypatch.setattr(Processor, "answers", refuse)
    gold = read(processor, greedy, ["a rose", "zebra"])
    assert sum(gold.unreachable.values()) == 1
    assert gold.texts == ["a rose", "zebra"]


def test_the_bans_are_those_of_the_search(processor: Processor, greedy: Settings) -> None:
    """A search over a model that is certain of a gold answer gives it back exactly where none is counted."""
    from fedvlm_jax.models.beam_search import process_scores

    for text in ("a cat", "a cat a cat a cat", JSON, LONG):
        ids = processor.answers([text], 64)[0]
        for size in (0, 1, 2, 3):
            settings = greedy.__class__(**vars(greedy) | {"no_repeat_ngram_size": size})
            history = np.full((1, 1, 66), settings.pad_token_id, np.int32)
            history[0, 0, 0] = settings.decoder_start_token_id
            allowed = True
            for place, wanted in enumerate(ids.tolist()):
                scores = process_scores(jnp.zeros((1, 1, 4200)), jnp.asarray(history), jnp.int32(place + 1), settings)
                allowed &= bool(np.isfinite(scores[0, 0, wanted]))
                history[0, 0, place + 1] = wanted
            assert allowed == (not read(processor, settings, [text]).unreachable), (text, size)
