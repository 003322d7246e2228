"""Malformed files and rows: one clear error that names the file, or a row skipped with its reason and no other lost."""

import contextlib
import dataclasses
import hashlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import malformed
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_parquet import IMAGE, RLAIF_V, make_row, make_rows, write_rows
from rlaif_form import REASONS, Form, make_form_rows, write_folder
from words import WordProcessor

from fedvlm_jax.data.federated_dataset import describe_lost, federate
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.tokenization import Examples, encode
from fedvlm_jax.errors import UserError

LENIENT = make_options("rows.parquet", max_bad_share=1.0)
PLACE = 4
"""Where the malformed row stands among eight good ones."""


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError("a malformed input hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def load(path: Path, max_bad_share: float = 1.0, pairs: bool = False) -> tuple[Table, Examples]:
    options = make_options(source=str(path), max_bad_share=max_bad_share)
    table = read_table(options)
    return table, encode(table, federate(table, options, 0), WordProcessor(), options, pairs=pairs)


def check_nothing_lost(examples: Examples, rows: Sequence[dict[str, Any]], reasons: dict[int, str]) -> None:
    """Every row is an example with its own text and image, or skipped with the reason that is expected."""
    assert {entry.row: entry.reason for entry in examples.skipped} == reasons
    assert len(examples.skipped) == len(reasons)
    assert sorted(examples.rows.tolist()) == [row for row in range(len(rows)) if row not in reasons]
    held = [
        row for client in examples.clients for split in ("train", "validation", "test") for row in client.rows_of(split)
    ]
    assert sorted(held) == list(range(len(examples)))
    for place, row in enumerate(examples.rows.tolist()):
        assert examples.answers[place] == rows[row]["chosen"].strip()
        encoded = (rows[row]["image"] or {}).get("bytes")
        if encoded:
            key = examples.images.keys[examples.image[place]]
            assert key == hashlib.blake2b(encoded, digest_size=16).hexdigest()


def make_case_rows(changes: dict[str, Any]) -> list[dict[str, Any]]:
    rows = make_rows(9)
    rows[PLACE] = rows[PLACE] | changes
    return rows


@pytest.mark.parametrize("name", list(malformed.ROW_CASES))
def test_a_malformed_row_costs_itself_only(tmp_path: Path, name: str) -> None:
    changes, reason = malformed.ROW_CASES[name]
    malformed.write_side_files(tmp_path)
    rows = make_case_rows(changes)
    _, examples = load(write_rows(tmp_path / "a.parquet", rows))
    check_nothing_lost(examples, rows, {} if reason is None else {PLACE: reason})


@pytest.mark.parametrize("split_column", [False, True])
def test_all_malformed_rows_at_once(tmp_path: Path, split_column: bool) -> None:
    malformed.write_side_files(tmp_path)
    rows = make_rows(10)
    reasons = {}
    for changes, reason in malformed.ROW_CASES.values():
        if reason is not None:
            reasons[len(rows)] = reason
        rows.append(make_row(len(rows), **changes))
    if split_column:
        rows = [row | {"split": ("train", "test")[number % 2]} for number, row in enumerate(rows)]
    _, examples = load(write_rows(tmp_path / "a.parquet", rows))
    check_nothing_lost(examples, rows, reasons)
    with pytest.raises(UserError, match=rf"a\.parquet: {len(reasons)} of {len(rows)} rows .*--data.max-bad-share 0.01"):
        load(tmp_path / "a.parquet", max_bad_share=0.01)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected": None}, "empty rejected answer"),
        ({"rejected": " \n"}, "empty rejected answer"),
        ({"rejected": make_row(PLACE)["chosen"]}, "chosen equals rejected"),
        ({"rejected": f" {make_row(PLACE)['chosen']}\t"}, "chosen equals rejected"),
        ({"chosen": "a " * 500 + "b", "rejected": "a " * 500 + "c"}, "chosen equals rejected once cut"),
        ({"chosen": None, "rejected": None}, "empty answer"),
    ],
)
def test_a_row_that_is_no_pair_costs_itself_only(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    rows = make_case_rows(changes)
    path = write_rows(tmp_path / "a.parquet", rows)
    check_nothing_lost(load(path, pairs=True)[1], rows, {PLACE: reason})


@pytest.mark.parametrize("spelling", [b"\xff\xfe", b"\xed\xa0\x80", b"caf\xe9", b"\xf8\x88\x80\x80\x80", b"\x80"])
@pytest.mark.parametrize("column", list(malformed.UNREADABLE_COLUMNS))
def test_text_that_is_no_utf_8_costs_its_row_only(tmp_path: Path, column: str, spelling: bytes) -> None:
    rows = make_rows(9)
    texts = [row[column].encode() for row in rows]
    texts[PLACE] = spelling
    pq.write_table(malformed.replace_column(column, pa.array(texts).view(pa.string()), 9), tmp_path / "a.parquet")
    _, examples = load(tmp_path)
    reason = malformed.UNREADABLE_COLUMNS[column]
    check_nothing_lost(examples, rows, {PLACE: reason} if reason else {})


def test_a_path_that_is_no_utf_8_costs_nothing_beside_bytes_and_its_row_without(tmp_path: Path) -> None:
    rows = make_rows(9)
    encoded: list[bytes | None] = [row["image"]["bytes"] for row in rows]
    encoded[PLACE] = None
    paths = pa.array([b"\xff.png"] * 9).view(pa.string())
    image = pa.StructArray.from_arrays([pa.array(encoded, pa.binary()), paths], ["bytes", "path"])
    pq.write_table(malformed.replace_column("image", image, 9), tmp_path / "a.parquet")
    check_nothing_lost(load(tmp_path)[1], rows, {PLACE: malformed.LOST})


def test_a_path_that_is_no_utf_8_stops_no_drawn_client_and_no_summary(tmp_path: Path) -> None:
    """The note that tells where lost images were looked for cannot show such a name, and leaves it out."""
    encoded: list[bytes | None] = [row["image"]["bytes"] for row in make_rows(9)]
    encoded[PLACE] = None
    paths = pa.array([b"\xff.png"] * 9).view(pa.string())
    image = pa.StructArray.from_arrays([pa.array(encoded, pa.binary()), paths], ["bytes", "path"])
    pq.write_table(malformed.replace_column("image", image, 9), tmp_path / "a.parquet")
    options = make_options(str(tmp_path), "iid", clients=2, min_examples=1, validation_share=0.0, test_share=0.2)
    table = read_table(options)
    federation = federate(table, options, seed=0)
    assert sum(len(client.train) + len(client.test) for client in federation.clients) == 8
    assert describe_lost(table, federation.skipped) == ""


def test_a_table_without_answers_is_refused_by_the_column(tmp_path: Path) -> None:
    """Not row by row, as if every answer were empty."""
    table = read_table(str(write_rows(tmp_path / "a.parquet", make_rows(4))))
    options = make_options(str(tmp_path))
    lacking = dataclasses.replace(table, data=table.data.drop_columns(["chosen"]))
    with pytest.raises(UserError, match="has no column 'chosen'; it has: "):
        encode(lacking, federate(table, options, seed=0), WordProcessor(), options)


@pytest.mark.parametrize("name", list(malformed.FILE_CASES))
def test_a_malformed_file_is_one_clear_error(tmp_path: Path, name: str) -> None:
    expected = malformed.FILE_CASES[name](tmp_path)
    with pytest.raises(UserError, match=f"(?s){expected}") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert "\n" not in str(caught.value)  # arrow's own messages have lines


@pytest.mark.parametrize("kind", [kind for kind in malformed.WRONG_TYPES if kind != "list of lists"])
@pytest.mark.parametrize("column", malformed.TEXT_COLUMNS)
def test_a_text_column_of_another_type_is_named(tmp_path: Path, column: str, kind: str) -> None:
    if (column, kind) == ("chosen", "list"):
        kind = "list of lists"  # a list of texts has the answers of several people
    pq.write_table(malformed.replace_column(column, malformed.WRONG_TYPES[kind]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet: column '{column}' is {kind.split()[0]}.*expected text"):
        load(tmp_path)


@pytest.mark.parametrize("kind", list(malformed.READ_AS_TEXT))
@pytest.mark.parametrize("column", ["question", "chosen", "rejected", "idx", "origin_split"])
def test_what_can_be_read_as_text_is(tmp_path: Path, column: str, kind: str) -> None:
    values = malformed.READ_AS_TEXT[kind]
    pq.write_table(malformed.replace_column(column, values), tmp_path / "a.parquet")
    expected = [None if value is None else str(value) for value in values.to_pylist()]
    assert read_table(str(tmp_path)).read_text(column) == expected
    if column not in ("question", "chosen"):
        assert len(load(tmp_path)[1]) == 4
    elif kind != "nulls":
        reason = {"question": "empty question", "chosen": "empty answer"}[column]
        skipped = {entry.row: entry.reason for entry in load(tmp_path)[1].skipped}
        assert skipped == {row: reason for row, text in enumerate(expected) if not text}


@pytest.mark.parametrize("name", list(malformed.ODD_FILES))
def test_an_odd_file_is_read_whole(tmp_path: Path, name: str) -> None:
    malformed.ODD_FILES[name](tmp_path / "a.parquet")
    check_nothing_lost(load(tmp_path)[1], make_rows(4), {})


@pytest.mark.parametrize("kind", list(malformed.EXTRA_COLUMNS))
def test_columns_nobody_asked_for_disturb_nothing(tmp_path: Path, kind: str) -> None:
    extra = malformed.EXTRA_COLUMNS[kind]
    pq.write_table(malformed.GOOD.append_column("extra", extra), tmp_path / "a.parquet")
    # Nor does it matter that the next shard has another type there, or no such column.
    pq.write_table(malformed.GOOD.append_column("extra", pa.array(["x"] * 4)), tmp_path / "b.parquet")
    pq.write_table(malformed.GOOD.append_column("other", pa.array([1] * 4)), tmp_path / "c.parquet")
    assert len(load(tmp_path)[1]) == 12


@pytest.mark.parametrize(
    "metadata", [{"huggingface": "{cut"}, {"huggingface": '{"info": {"features": {"question": 3}}}'}, {"pandas": "{"}]
)
def test_metadata_that_is_wrong_is_not_believed(tmp_path: Path, metadata: dict[str, str]) -> None:
    pq.write_table(malformed.GOOD.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    assert len(load(tmp_path)[1]) == 4


def test_shards_may_differ_in_what_does_not_matter(tmp_path: Path) -> None:
    write_rows(tmp_path / "train" / "a.parquet", make_rows(5))
    (tmp_path / "train" / "more.parquet").mkdir()  # a folder, as other systems name theirs
    write_rows(tmp_path / "train" / "more.parquet" / "part-0.parquet", [make_row(n) for n in range(5, 9)])
    other_order = pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])
    reversed_columns = pa.schema([RLAIF_V.field(name) for name in reversed(RLAIF_V.names)])
    rows = [make_row(n) for n in range(9, 12)]
    pq.write_table(pa.Table.from_pylist(rows, reversed_columns), tmp_path / "train" / "z1.parquet")
    write_rows(tmp_path / "train" / "z2.parquet", [make_row(12)], image=other_order)
    pq.write_table(malformed.GOOD.slice(0, 0), tmp_path / "train" / "z3.parquet")
    numbers = malformed.replace_column("idx", pa.array([13, 14, 15, 16]))
    pq.write_table(numbers, tmp_path / "train" / "z4.parquet")
    _, examples = load(tmp_path)
    check_nothing_lost(examples, [make_row(n) for n in range(13)] + make_rows(4), {})


KINDS = ("cut", "flip", "overwrite", "flip near the end", "remove", "double")


def corrupt(content: bytes, kind: str, rng: np.random.Generator) -> bytes:
    spoilt = bytearray(content)
    at = int(rng.integers(4, len(content) - 80))
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        for place in rng.integers(0, len(content), int(rng.integers(1, 5))):
            spoilt[place] ^= 1 << int(rng.integers(8))
    elif kind == "overwrite":
        spoilt[at : at + 64] = rng.bytes(64)
    elif kind == "flip near the end":
        spoilt[len(content) - int(rng.integers(1, 3000))] ^= 1 << int(rng.integers(8))
    elif kind == "remove":
        del spoilt[at : at + int(rng.integers(1, 60))]
    else:
        spoilt[at:at] = content[at : at + 40]
    return bytes(spoilt)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_damage_anywhere_is_an_error_or_every_row_is_accounted_for(tmp_path: Path, codec: str, kind: str) -> None:
    """Bits can turn inside a text without anybody noticing; rows cannot go missing, and nothing else may be raised."""
    rows = make_rows(24)
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.Table.from_pylist(rows, RLAIF_V), whole, compression=codec, row_group_size=8)
    for number in range(8):
        seed = [number, KINDS.index(kind), len(codec)]
        spoilt = tmp_path / f"spoilt-{number}" / "a.parquet"
        spoilt.parent.mkdir()
        spoilt.write_bytes(corrupt(whole.read_bytes(), kind, np.random.default_rng(seed)))
        # Which of the two it is, nobody can foresee; that the error names the file is tested above.
        with contextlib.suppress(UserError):
            _, examples = load(spoilt)
            seen = [*examples.rows.tolist(), *(entry.row for entry in examples.skipped)]
            assert sorted(seen) == list(range(len(rows)))


TEXT = st.one_of(st.none(), st.text(st.characters(exclude_categories=("Cs",)), max_size=40), st.just("word " * 1500))
BYTES = st.one_of(st.none(), st.binary(max_size=60), st.binary(max_size=20).map(malformed.SMALL.__add__))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    odd=st.lists(
        st.fixed_dictionaries(
            {
                "image": st.one_of(st.none(), st.fixed_dictionaries({"bytes": BYTES, "path": TEXT})),
                **{name: TEXT for name in RLAIF_V.names if name != "image"},
            }
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_rows_are_used_or_skipped_with_a_reason(tmp_path_factory: pytest.TempPathFactory, odd: list[Any]) -> None:
    rows = [*make_rows(6), *odd]
    _, examples = load(write_rows(tmp_path_factory.mktemp("any") / "a.parquet", rows))
    seen = [*examples.rows.tolist(), *(entry.row for entry in examples.skipped)]
    assert sorted(seen) == list(range(len(rows)))
    assert set(range(6)) <= set(examples.rows.tolist())
    assert all(entry.reason for entry in examples.skipped)


def test_folders_of_the_maker_are_skipped_as_it_says(tmp_path: Path) -> None:
    form = Form(rows=400, spoil=dict.fromkeys(REASONS, 5))
    write_folder(tmp_path, form)
    _, examples = load(tmp_path)
    rows = make_form_rows(form)
    counted: dict[str, int] = {}
    for entry in examples.skipped:
        counted[entry.reason] = counted.get(entry.reason, 0) + 1
    expected: dict[str, int] = {}
    for reason in REASONS.values():
        expected[reason] = expected.get(reason, 0) + 5
    assert counted == expected
    check_nothing_lost(examples, rows, {entry.row: entry.reason for entry in examples.skipped})


REFUSED = (
    (
        {"question": "<image><image> what is it"},
        "prompt refused: the text holds <image>, which stands for a picture",
    ),
    (
        {"question": "<OD> find the car"},
        "prompt refused: the task <OD> takes no input, but stands beside other text",
    ),
)
"""What Florence-2's own processor makes no prompt of."""


def test_the_model_s_own_tokenizer_takes_any_text(tmp_path: Path) -> None:
    from fedvlm_jax.models.florence2.processor import Processor

    about_text = ("question", "answer", "rejected")
    odd = [case for name, case in malformed.ROW_CASES.items() if name.startswith(about_text)]
    odd = [case for case in odd if "<image>" not in (case[0].get("question") or "")] + list(REFUSED)
    rows = make_rows(6) + [make_row(6 + n, **changes) for n, (changes, _) in enumerate(odd)]
    table = read_table(str(write_rows(tmp_path / "a.parquet", rows)))
    examples = encode(table, federate(table, LENIENT, 0), Processor.from_folder("florence2-nano"), LENIENT)
    reasons = {6 + n: reason for n, (_, reason) in enumerate(odd) if reason}
    assert {entry.row: entry.reason for entry in examples.skipped} == reasons


class Panic(BaseException):
    """What ends a tokenizer written in Rust; no `Exception`."""


class Picky(WordProcessor):
    """Ends at one word, in questions and answers alike."""

    def prompts(self, texts):
        return super().prompts(self._look(texts))

    def answers(self, texts, max_tokens):
        return super().answers(self._look(texts), max_tokens)

    def _look(self, texts):
        if any("zebra" in text for text in texts):
            raise Panic("no zebra")
        return texts


def test_a_text_that_ends_the_processor_is_its_row_s_fault(tmp_path: Path) -> None:
    rows = make_rows(12)
    rows[3]["question"] = rows[5]["chosen"] = rows[8]["rejected"] = "a zebra"
    table = read_table(str(write_rows(tmp_path / "a.parquet", rows)))
    examples = encode(table, federate(table, LENIENT, 0), Picky(), LENIENT)
    found = {entry.row: entry.reason for entry in examples.skipped}
    assert found == {3: "prompt refused: no zebra", **dict.fromkeys((5, 8), "answer refused: no zebra")}
    check_nothing_lost(examples, rows, found)


def test_one_endless_text_does_not_make_all_arrays_as_wide_as_itself(tmp_path: Path) -> None:
    import tracemalloc

    rows = make_rows(300, pictures=20)
    rows[7]["question"] = rows[9]["chosen"] = "w " * 2_000_000
    path = write_rows(tmp_path / "a.parquet", rows)
    table = read_table(str(path))
    federation = federate(table, LENIENT, 0)
    tracemalloc.start()
    examples = encode(table, federation, WordProcessor(), LENIENT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(entry.row, entry.reason) for entry in examples.skipped] == [(7, "prompt too long")]
    assert examples.truncated == 1
    assert peak < 100 * 2**20  # the two texts are 4 MB each; 300 rows as wide as one of them would be 5 GB


def test_there_are_two_hundred_cases() -> None:
    rows = len(malformed.ROW_CASES) + 5 * len(malformed.UNREADABLE_COLUMNS)
    types = len(malformed.TEXT_COLUMNS) * len(malformed.WRONG_TYPES) + 5 * len(malformed.READ_AS_TEXT)
    damaged = 3 * 8 * len(KINDS)
    assert rows + len(malformed.FILE_CASES) + types + len(malformed.EXTRA_COLUMNS) + damaged > 400
    assert IMAGE.num_fields == 2
