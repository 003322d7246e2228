"""An audit's tables and sentences, from numbers that are written here; and files that are not what they should be."""

import copy
import json

import pytest

from fedvlm_jax.errors import UserError
from fedvlm_jax.reporting.audit_report import describe_audit, read_audit, tabulate_audit
from fedvlm_jax.reporting.figures.audit_figures import draw_audit
from fedvlm_jax.reporting.tables import cut_to_width


def make_tested(name, knows, auroc):
    scores = {"auroc": list(auroc), "tpr": [0.1, 0.05, 0.2], "members": 40, "others": 60}
    curve = [[0.0, 0.0], [0.0, 0.1], [0.5, 0.6], [1.0, 1.0]]
    return {"test": name, "knows": knows, **scores, "curve": curve, "clients": {"noto-de": scores}}


FOUND = {
    "version": 1,
    "method": "plora",
    "shares": "B",
    "private_a": "common",
    "seed": 0,
    "rounds": [1, 4],
    "clients": ["noto-de"],
    "others": "test",
    "membership": [
        make_tested("base", "", (0.52, 0.4, 0.6)),
        make_tested("loss", "start", (0.6, 0.55, 0.65)),
        make_tested("projection", "own", (0.9, 0.85, 0.95)),
    ],
    "attribution": [{"test": "loss", "knows": "start", "top": [0.5, 0.2, 0.8], "chance": 0.25, "rankings": 8}],
    "reconstruction": [
        {
            "knows": "own",
            "batch": 0.4,
            "unrelated": 0.3,
            "random": 0.06,
            "dimension": 8.0,
            "above_unrelated": 7,
            "spans": 8,
        }
    ],
    "epsilon": {"lower": 0.5, "accounted": 8.0, "delta": 1e-5, "correct": 90, "guesses": 128, "canaries": 256},
}


def test_tables_say_what_was_found():
    tables = {table.title: table for table in tabulate_audit(FOUND)}
    assert next(iter(tables)) == "Was a row trained on? plora, B shared"
    rows = tables["Was a row trained on? plora, B shared"].rows
    assert rows[1] == ("loss", "the start", "0.600 [0.550, 0.650]", "10.0 % [5.0, 20.0]")
    assert tables["Which row was in the batch?"].rows[0][2:4] == ("50.0 % [20.0, 80.0]", "25.0 %")
    assert tables["Layer inputs in the update's span"].rows[0][-1] == "7 of 8"
    assert tables["ε from canaries"].rows[0][:3] == ("0.5", "8", "1e-05")
    assert "By client: projection, the client's own" in tables
    for table in tables.values():
        assert len(cut_to_width(table, 80)) == 1, f"{table.title} does not fit into 80 columns"


def test_sentences_name_the_servers_best_and_who_knows_more():
    said = " ".join(describe_audit(FOUND))
    assert "best test of membership (loss) has an AUROC of 0.600" in said
    assert "Who knows the private factor has up to 0.900" in said
    assert "members and others are alike to begin with" in said
    assert "proves no privacy" in said
    apart = copy.deepcopy(FOUND)
    apart["membership"][0]["auroc"] = [0.6, 0.55, 0.65]
    assert "not alike to begin with" in " ".join(describe_audit(apart))


def test_of_a_run_with_noise_it_says_that_messages_have_none():
    said = "before the server clipped them and added noise"
    assert said in " ".join(describe_audit(FOUND))
    assert said not in " ".join(describe_audit(FOUND | {"epsilon": None}))


def test_where_nothing_is_private_there_is_nothing_to_guess():
    alone = {**FOUND, "membership": FOUND["membership"][:2]}
    assert tabulate_audit(alone)[0].rows[1][1] == "none to guess"


def test_the_picture(tmp_path):
    (picture,) = draw_audit(FOUND, tmp_path)
    assert (tmp_path / "figures" / "audit.png").stat().st_size > 1000
    assert "server 0.60" in picture.svg
    assert draw_audit({**FOUND, "membership": FOUND["membership"][:1]}, tmp_path) == []


def test_a_run_without_an_audit_has_none(tmp_path):
    assert read_audit(tmp_path) is None


def test_a_file_is_read_as_it_was_written(tmp_path):
    (tmp_path / "audit.json").write_text(json.dumps(FOUND))
    assert read_audit(tmp_path) == FOUND


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda found: found.pop("membership"), "membership"),
        (lambda found: found["membership"][1].update(auroc=[0.5, 0.4]), "shares"),
        (lambda found: found["membership"][1].update(auroc=[7.0, 0.4, 0.5]), "shares"),
        (lambda found: found["membership"][1].update(curve=[[0.0, -3.0]]), "shares"),
        (lambda found: found["attribution"][0].update(top="x"), "top"),
        (lambda found: found["reconstruction"][0].update(batch="much"), "batch"),
        (lambda found: found.update(epsilon=3), "epsilon"),
        (lambda found: found["epsilon"].pop("lower"), "lower"),
    ],
)
def test_damage_is_one_line(tmp_path, change, named):
    found = copy.deepcopy(FOUND)
    change(found)
    (tmp_path / "audit.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=named) as refused:
        read_audit(tmp_path)
    assert "\n" not in str(refused.value)
    assert "audit.json" in str(refused.value)
