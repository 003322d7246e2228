"""Names of clients, and numbers of the data's options, as strangers write them."""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_table import as_lists, make_table
from make_parquet import make_row, write_rows

from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.partitioning.algorithms import cut_dirichlet, cut_quantity
from fedvlm_jax.data.partitioning.emoji_topics import draw_mix
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.reporting.data_report import describe_data, word_findings

ALL_TRAIN = make_options(source="made-up", validation_share=0, test_share=0)
NAMES = {
    "two hundred and fifty bytes": "k" * 250,
    "four thousand bytes": "名" * 1400,
    "Chinese": "北京协和医院",
    "Japanese and Korean": "東京大学 서울",
    "Arabic": "مستشفى",
    "a path": "../../etc/passwd",
    "a device": "CON",
    "control characters": "a\x1b[31mb\nc",
    "an emoji family": "👩‍👩‍👧‍👦",
    "a zero-width space": "a\u200bb",
    "a number": "0",
}


@pytest.mark.parametrize("name", list(NAMES))
def test_any_name_is_a_client_s(name: str) -> None:
    table = make_table([0, 1, 2], client=[NAMES[name], "b", NAMES[name]])
    federation = federate(table, ALL_TRAIN, 0)
    held = {client.name: client.train.tolist() for client in federation.clients}
    assert held == {NAMES[name]: [0, 2], "b": [1]}


def test_names_that_are_none_are_rows_without_a_client() -> None:
    names = ["a", None, "", "   ", "\u3000\t", "\N{REPLACEMENT CHARACTER}", "a "]
    federation = federate(make_table(range(7), client=names), ALL_TRAIN, 0)
    assert as_lists(federation) == [["a", [0, 6], [], []]]
    assert [(entry.row, entry.reason) for entry in federation.skipped] == [(row, "no client") for row in range(1, 6)]


def test_the_same_letters_are_the_same_client_and_other_cases_are_another() -> None:
    forms = [unicodedata.normalize(form, "Zürich") for form in ("NFC", "NFD")]
    assert forms[0] != forms[1]
    table = make_table(range(4), client=[*forms, "zürich", "ZÜRICH"], origin_dataset=[*forms, "x", "x"])
    assert as_lists(federate(table, ALL_TRAIN, 0)) == [
        ["ZÜRICH", [3], [], []], ["Zürich", [0, 1], [], []], ["zürich", [2], [], []],
    ]  # fmt: skip
    for form in forms:
        federation = federate(table, ALL_TRAIN.replace(origins=(form,)), 0)
        assert as_lists(federation) == [["Zürich", [0, 1], [], []]]


def test_names_that_look_like_a_slip_are_told(tmp_path: Path) -> None:
    names = ["Zürich", "ZÜRICH", "nan", "b"]
    rows = [make_row(number, client=name, split="train") for number, name in enumerate(names)]
    rows.append(make_row(4, client="c" * 300, split="test"))
    options = make_options(source=str(write_rows(tmp_path / "data" / "a.parquet", rows)))
    findings = word_findings(describe_data(options, 0, tmp_path / "out"))
    assert "A client is called 'nan', as missing values are that were turned into text." in findings
    assert any("1 name is written in more than one way" in one and "'ZÜRICH' and 'Zürich'" in one for one in findings)
    assert (tmp_path / "out" / "data.png").stat().st_size


EMOJI = ("images_per_client", "validation_per_client", "test_per_client", "min_examples", "max_prompt_tokens")
COUNTS = {
    **dict.fromkeys((*EMOJI, "max_answer_tokens", "clients"), ("emoji", "natural")),
    "limit": ("x.parquet", "natural"),
    "classes_per_client": ("x.parquet", "pathological"),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [-1, 2**31, 2**63, 2**64, 10**23, -(10**23)])
def test_counts_that_cannot_be_are_one_line(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"^--data\.{name.replace('_', '-')} is {value}: it must be ") as caught:
        make_options(*COUNTS[name], **{name: value})
    assert "\n" not in str(caught.value)


SHARES = ("held_out_clients", "validation_share", "test_share", "max_bad_share", "alpha")


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1.0, -1e-300, -1e308])
def test_numbers_that_are_none_are_one_line(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^--data\.{name.replace('_', '-')} is .*: it must be ") as caught:
        make_options("x.parquet", "dirichlet", **{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**40])
def test_seeds_that_cannot_be_are_one_line(seed: int) -> None:
    table = make_table([0, 1], client=["a", "b"])
    with pytest.raises(UserError, match=rf"--seed is {seed}; expected an integer from 0 to 9223372036854775807"):
        federate(table, ALL_TRAIN, seed)
    assert len(federate(table, ALL_TRAIN, 2**63 - 1).clients) == 2


def draw(alpha: float, **more: Any) -> list[list[int]]:
    rng = np.random.default_rng(0)
    owners = (cut_quantity(1000, 4, alpha, rng), cut_dirichlet(np.zeros(1000, np.int64), 4, alpha, rng))
    return [np.bincount(own, minlength=4).tolist() for own in owners]


@pytest.mark.parametrize("alpha", [1e12, 1e16, 1e300, 1.7e308, float("inf")])
def test_a_concentration_without_end_makes_clients_alike(alpha: float) -> None:
    assert draw(alpha) == [[250] * 4] * 2  # beyond 1e305 all went to the last client
    prior = np.asarray([0.5, 0.3, 0.2])
    np.testing.assert_array_equal(draw_mix(np.random.default_rng(0), alpha, prior), prior)


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-9])
def test_a_concentration_near_none_gives_all_to_one(alpha: float) -> None:
    assert all(sorted(counts) == [0, 0, 0, 1000] for counts in draw(alpha))
