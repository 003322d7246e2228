"""`benchmarks/shipped.py`: its refusals, and a measurement from start to end in small."""

import json

import pytest
import shipped

from fedvlm_jax.errors import UserError


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"waves": (1, 2**40)}, f"--waves {2**40} does not divide the 16 clients"),
        ({"waves": ()}, "--waves is empty"),
        ({"repeats": 0}, "--repeats is 0: expected numbers of 1 or more"),
        ({"batches": (1, 16)}, "--batches 16 x --steps 4 takes 64 examples of a client: it has 60"),
    ],
)
def test_what_the_shipped_federation_cannot_do(changes, expected):
    with pytest.raises(UserError) as told:
        shipped.run(shipped.Options(**changes))
    assert str(told.value).startswith(expected)


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="choose"):
        shipped.run(shipped.Options(out=tmp_path / "file"))


@pytest.mark.slow
def test_a_measurement_in_small(tmp_path, capsys):
    shipped.run(shipped.Options(batches=(1,), waves=(16,), steps=1, repeats=1, out=tmp_path))
    (line,) = json.loads((tmp_path / "bench.json").read_text())["rounds"]
    assert (line["batch"], line["wave"]) == (1, 16)
    assert line["seconds"]["median"] > 0
    assert 0 < line["share_of_peak"] < 1.5
    shown = capsys.readouterr().out
    assert "16 clients, 1 local steps" in shown
    assert "GFLOP/s in float32 matmuls" in shown
