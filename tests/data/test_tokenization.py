import numpy as np
import pytest
from make_parquet import draw_image, make_row, write_rows

from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.data.tokenization import encode
from fedvlm_jax.data.unique_images import unique_images
from fedvlm_jax.errors import UserError

LENIENT = make_options("rows.parquet", max_bad_share=1.0)


def make_examples(tmp_path, rows, processor, options=LENIENT):
    table = read_table(str(write_rows(tmp_path / "a.parquet", rows)))
    return table, encode(table, federate(table, options, 0), processor, options)


def row(number, client="a", split="train", **changes):
    return make_row(number, client=client, split=split, **changes)


def test_arrays_hold_every_row_of_every_client(tmp_path, processor):
    rows = [
        row(0, "b", question="what is it", chosen="a red box"),
        row(1, "a", "test", question="what", chosen="box"),
        row(2, "b", "validation", picture=0, question="what", chosen="red"),
    ]
    _, examples = make_examples(tmp_path, rows, processor)
    assert examples.rows.tolist() == [1, 0, 2]  # client a, then b: train, validation
    assert [[c.name, c.train.tolist(), c.validation.tolist(), c.test.tolist()] for c in examples.clients] == [
        ["a", [], [], [0]],
        ["b", [1], [2], []],
    ]
    assert examples.answers == ["box", "a red box", "red"]
    assert examples.image.tolist() == [0, 1, 1]
    assert len(examples.images) == 2
    word = lambda text: 10 + sum(map(ord, text)) % 1000  # noqa: E731
    assert examples.input_ids.tolist() == [
        [3, 3, 3, word("what"), 2, 1, 1, 1],
        [3, 3, 3, word("what"), word("is"), word("it"), 2, 1],
        [3, 3, 3, word("what"), 2, 1, 1, 1],
    ]
    assert examples.attention_mask.sum(1).tolist() == [5, 7, 5]
    assert examples.labels[1].tolist() == [word("a"), word("red"), word("box"), 2]
    arrays = (examples.image, examples.input_ids, examples.attention_mask, examples.labels)
    assert {array.dtype for array in arrays} == {np.dtype("int32")}
    assert sorted(processor.asked) == ["what", "what is it"]  # each text once


def test_unusable_rows_are_skipped_with_their_reasons(tmp_path, processor):
    rows = [
        row(0),
        row(1, image={"bytes": draw_image(1)[:60], "path": None}),
        row(2, image=None),
        row(3, question="  "),
        row(4, chosen=None),
        row(5, client=None),
        row(6, question="word " * 40),
        row(7),
    ]
    _, examples = make_examples(tmp_path, rows, processor, LENIENT.replace(max_prompt_tokens=20))
    assert examples.rows.tolist() == [0, 7]
    assert examples.clients[0].train.tolist() == [0, 1]
    assert sorted((s.row, s.idx, s.reason) for s in examples.skipped) == [
        (1, "1", "broken or truncated image"),
        (2, "2", "no image"),
        (3, "3", "empty question"),
        (4, "4", "empty answer"),
        (5, "5", "no client"),
        (6, "6", "prompt too long"),
    ]
    assert examples.input_ids.shape == (2, 12)  # as wide as the longest prompt in use, not the longest there was
    assert len(examples.images) == 2


def test_too_many_unusable_rows_are_an_error_that_counts_them(tmp_path, processor):
    rows = [row(n, chosen="" if n < 2 else "box") for n in range(100)]
    with pytest.raises(UserError, match=r"2 of 100 rows cannot be used \(2 × empty answer\).*row 0 \(idx 0\)"):
        make_examples(tmp_path, rows, processor, make_options("rows.parquet"))
    assert len(make_examples(tmp_path, rows, processor, make_options("rows.parquet", max_bad_share=0.02))[1]) == 98
    with pytest.raises(UserError, match="none of the 1 row can"):
        make_examples(tmp_path, [row(0, chosen="")], processor)


def test_long_answers_are_cut_and_counted(tmp_path, processor):
    rows = [row(0, chosen="a b c"), row(1, chosen="a b c d e f"), row(2, chosen="a b c d e f"), row(3, chosen="a")]
    _, examples = make_examples(tmp_path, rows, processor, LENIENT.replace(max_answer_tokens=4))
    assert examples.truncated == 2
    assert (examples.labels != -100).sum(1).tolist() == [4, 4, 4, 2]
    assert examples.labels[1][3] == 2  # the processor's own end, not a token cut out of the middle
    assert examples.labels.shape == (4, 4)
    assert examples.answers[1] == "a b c d e f"


def test_the_question_in_the_clients_language_needs_its_column(tmp_path, processor):
    _, examples = make_examples(
        tmp_path, [row(0, question_client="was ist das")], processor, LENIENT.replace(prompt="client-language")
    )
    assert processor.asked == ["was ist das"]
    assert len(examples) == 1
    with pytest.raises(UserError, match="needs the column 'question_client'"):
        make_examples(tmp_path, [row(0)], processor, LENIENT.replace(prompt="client-language"))


@pytest.mark.parametrize(
    ("prompt", "columns", "asked"),
    [
        (None, {"question_client": "was ist das"}, "was ist das"),
        (None, {}, "what is it"),
        ("neutral", {"question_client": "was ist das"}, "what is it"),
    ],
)
def test_clients_are_asked_in_their_language_where_the_data_have_it(tmp_path, processor, prompt, columns, asked):
    rows = [row(0, question="what is it", **columns)]
    make_examples(tmp_path, rows, processor, LENIENT.replace(prompt=prompt))
    assert processor.asked == [asked]


def test_rejected_answers_are_labels_of_their_own(tmp_path, processor):
    """Without the need for pairs a row counts anyway; what is no pair has no rejected label."""
    rows = [
        row(0, chosen="a red box", rejected="a b c d e f g h i"),
        row(1, chosen="box", rejected=None),
        row(2, chosen="box", rejected=" box "),
        row(3, chosen="a b c d x", rejected="a b c d y"),
        row(4, chosen="ball", rejected="a red box"),
    ]
    _, examples = make_examples(tmp_path, rows, processor, LENIENT.replace(max_answer_tokens=4))
    assert examples.rejected.dtype == np.int32
    assert (examples.rejected != -100).sum(1).tolist() == [4, 0, 0, 0, 4]
    assert examples.rejected[4].tolist() == examples.labels[0].tolist()
    assert examples.rejected_answers == ["a b c d e f g h i", "", "box", "a b c d y", "a red box"]
    assert (examples.truncated, examples.rejected_truncated) == (1, 1)
    _, wide = make_examples(tmp_path, rows, processor)
    assert (wide.labels.shape[1], wide.rejected.shape[1]) == (8, 12), "each as narrow as it can be"
    assert (wide.rejected[3] != -100).sum() == 6


def test_where_pairs_are_needed_rows_without_one_are_skipped(tmp_path, processor):
    rows = [
        row(0),
        row(1, rejected="  "),
        row(2, chosen="box", rejected="box "),
        row(3, chosen="a b c d x", rejected="a b c d y"),
        row(4, chosen="", rejected=""),
        row(5),
    ]
    table = read_table(str(write_rows(tmp_path / "a.parquet", rows)))
    options = LENIENT.replace(max_answer_tokens=4)
    examples = encode(table, federate(table, options, 0), processor, options, pairs=True)
    assert examples.rows.tolist() == [0, 5]
    assert (examples.rejected != -100).any(1).all()
    assert [(s.row, s.reason) for s in examples.skipped] == [
        (1, "empty rejected answer"),
        (2, "chosen equals rejected"),
        (3, "chosen equals rejected once cut"),
        (4, "empty answer"),
    ]


def test_data_without_rejected_answers_has_no_pairs(tmp_path, processor):
    table = read_table(str(write_rows(tmp_path / "a.parquet", [row(0), row(1)], drop=("rejected",))))
    federation = federate(table, LENIENT, 0)
    examples = encode(table, federation, processor, LENIENT)
    assert (examples.rejected, examples.rejected_answers) == (None, None)
    with pytest.raises(UserError, match=r"has no column 'rejected', only .*chosen.*Use --objective sft"):
        encode(table, federation, processor, LENIENT, pairs=True)


def test_texts_are_tokenised_once(tmp_path, processor):
    """Chosen here and rejected there, it is one text."""
    asked = []
    answers = processor.answers
    processor.answers = lambda texts, most: asked.extend(texts) or answers(texts, most)
    rows = [row(n, chosen=("red", "blue")[n % 2], rejected=("blue", "red")[n % 2]) for n in range(6)]
    _, examples = make_examples(tmp_path, rows, processor)
    assert sorted(asked) == ["blue", "red"]
    assert examples.labels[0].tolist() == examples.rejected[1].tolist()


def test_texts_of_several_chunks_join(tmp_path, processor, monkeypatch):
    monkeypatch.setattr("fedvlm_jax.data.tokenization.CHUNK", 2)
    rows = [row(n, question="w " * (n + 1), chosen="v " * (6 - n)) for n in range(6)]
    _, examples = make_examples(tmp_path, rows, processor)
    assert examples.attention_mask.sum(1).tolist() == [5, 6, 7, 8, 9, 10]
    assert (examples.labels != -100).sum(1).tolist() == [7, 6, 5, 4, 3, 2]
    assert set(examples.input_ids[examples.attention_mask == 0].tolist()) == {processor.pad}


def test_example_images_match_their_rows(tmp_path, processor):
    rows = [row(n, ("a", "b")[n % 2], SPLITS[n % 3], picture=n % 5) for n in range(20)]
    rows[4] |= {"image": None}
    table, examples = make_examples(tmp_path, rows, processor)
    for place, number in enumerate(examples.rows):
        key = unique_images(table, [number])[0].keys[0]
        assert examples.images.keys[examples.image[place]] == key
