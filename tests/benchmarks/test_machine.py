"""What Linux says of a processor, and what is made of it."""

import pytest
from harness import machine

INTEL = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu {more}\n\nprocessor\t: 1\nmodel name\t: Another\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd i8mm bf16\nCPU part\t: 0xd4f\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (INTEL.format(more="amx_bf16 amx_tile"), True),
        (INTEL.format(more="avx512_bf16"), True),
        (INTEL.format(more="bf16x"), False),
        (INTEL.format(more=""), False),
        (ARM, True),
        (ARM.replace("bf16", ""), False),
        (None, False),
    ],
)
def test_bfloat16_is_measured_where_the_processor_has_units_for_it(monkeypatch, tmp_path, text, expected):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", file)
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    assert machine.has_bfloat16_units() is expected
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert machine.has_bfloat16_units()


def test_the_processor_is_called_as_linux_does(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(INTEL)
    monkeypatch.setattr(machine, "CPUINFO", file)
    assert machine.describe_machine()["machine"]["processor"] == "Some Xeon"
