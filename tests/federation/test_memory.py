"""How wide a wave may be, with a compiler that is made up; what a real one says is compared with what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.memory import GIB, USABLE, Footprint, TooLargeError, count_device_bytes, find_wave, measure
from fedvlm_jax.sharding import make_mesh, place_waves, replicate


def make_compiler(base, per_client, devices=1, breaks_at=None):
    """A compiler for rounds of so many GiB, and the list of the waves that it was asked for."""
    asked = []

    def compile_wave(wave):
        asked.append(wave)
        clients = wave // devices
        if breaks_at is not None and clients >= breaks_at:
            raise TooLargeError("RESOURCE_EXHAUSTED: 21.3G of 15.7G hbm")
        return f"program of {wave}", Footprint(int(base * GIB), int((base + per_client * clients) * GIB), clients)

    return compile_wave, asked


def test_what_fits_is_compiled_once():
    compile_wave, asked = make_compiler(1.0, 0.5)
    made, footprint = find_wave(compile_wave, 16, 1, 16 * GIB)
    assert (made, asked, footprint.per_client) == ("program of 16", [16], GIB // 2)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_widest_that_fits_is_found_from_the_first_footprint(devices):
    """15 GiB of which 90 % may be used: (13.5 - 1) / 2 = 6 clients a device."""
    compile_wave, asked = make_compiler(1.0, 2.0, devices)
    made, footprint = find_wave(compile_wave, 16 * devices, devices, 15 * GIB)
    assert asked == [16 * devices, 6 * devices]
    assert made == f"program of {6 * devices}"
    assert footprint.total <= USABLE * 15 * GIB


def test_where_the_compiler_refuses_waves_are_halved():
    compile_wave, asked = make_compiler(1.0, 0.1, breaks_at=5)
    assert find_wave(compile_wave, 16, 1, 16 * GIB)[0] == "program of 4"
    assert asked == [16, 8, 4]


def test_where_nobody_says_how_large_a_device_is_what_compiles_fits():
    compile_wave, _ = make_compiler(1.0, 100.0)
    assert find_wave(compile_wave, 16, 1, None)[0] == "program of 16"


def test_not_even_one_client():
    compile_wave, asked = make_compiler(14.0, 3.0)
    with pytest.raises(UserError, match=r"one client on a device of 16.0 GiB does not fit: it takes 17.0 GiB, 14.0 of"):
        find_wave(compile_wave, 16, 1, 16 * GIB)
    assert asked == [16, 1]
    with pytest.raises(UserError, match=r"does not fit: RESOURCE_EXHAUSTED: 21.3G of 15.7G"):
        find_wave(make_compiler(1.0, 1.0, breaks_at=1)[0], 4, 1, None)


def test_a_compiled_program_s_bytes_are_those_of_its_arrays():
    """[4, 256] x [256, 512] in float32: nothing donated, no scratch worth speaking of."""
    mesh = make_mesh(1)
    base = replicate(mesh, {"w": np.ones((256, 512), np.float32)})
    rows = place_waves(mesh, np.ones((1, 4, 256), np.float32))
    compiled = jax.jit(lambda base, rows: jnp.einsum("wvi,io->wvo", rows, base["w"])).lower(base, rows).compile()
    assert count_device_bytes(base) == 4 * 256 * 512
    found = measure(compiled, base, mesh, 4)
    arrays = 4 * (256 * 512 + 4 * 256 + 4 * 512)
    assert found.base == 4 * 256 * 512
    assert arrays <= found.total <= 1.1 * arrays
    assert found.per_client == (found.total - found.base) // 4
