"""How wide a wave may be, with a compiler that is made up; what a real one says is compared with what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import place_waves, replicate
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.memory import (
    GIB,
    USABLE,
    Footprint,
    TooLargeError,
    count_device_bytes,
    count_unread,
    find_wave,
    measure,
    read_memory,
)


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
    made, footprint = find_wave(compile_wave, 16, 1000, 1, 16 * GIB)
    assert (made, asked, footprint.per_client) == ("program of 16", [16], GIB // 2)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_widest_that_fits_is_found_from_the_first_footprint(devices):
    """15 GiB of which 90 % may be used: (13.5 - 1) / 2 = 6 clients a device."""
    compile_wave, asked = make_compiler(1.0, 2.0, devices)
    made, footprint = find_wave(compile_wave, 16 * devices, 1000, devices, 15 * GIB)
    assert asked == [16 * devices, 6 * devices]
    assert made == f"program of {6 * devices}"
    assert footprint.total <= USABLE * 15 * GIB


def test_a_cohort_that_weighs_whatever_the_wave_is_found_along_two_footprints():
    """1 GiB of base, 10 of data, 0.25 a client, in 14.4 GiB: 13 fit. The first guess takes the data for the
    clients' own and comes to 15; the line through 16 and 15 is right."""
    compile_wave, asked = make_compiler(11.0, 0.25)
    clients = find_wave(lambda wave: (wave, compile_wave(wave)[1]._replace(base=GIB)), 16, 1000, 1, 16 * GIB)[0]
    assert (clients, asked) == (13, [16, 15, 13])


def test_a_line_that_is_too_flat_is_followed_half_way():
    """Florence-2-base for a v5e without recomputation: the line through 16 and 14 leads to 2, and 7 fit."""
    sizes, asked = {16: 16.18, 14: 15.92, 7: 7.9}, []

    def compile_wave(clients):
        asked.append(clients)
        return clients, Footprint(int(0.86 * GIB), int(sizes[clients] * GIB), clients)

    assert find_wave(compile_wave, 16, 1000, 1, 16 * GIB)[0] == 7
    assert asked == [16, 14, 7]


def test_what_is_narrowed_leaves_few_places_empty():
    """14 a device would fit, but then 64 clients are two waves, as with 8 a device, and 48 places empty."""
    compile_wave, asked = make_compiler(1.0, 0.95, devices=4)
    assert find_wave(compile_wave, 64, 64, 4, 16 * GIB)[0] == "program of 32"
    assert asked == [64, 32]


def test_where_the_compiler_refuses_waves_are_halved():
    compile_wave, asked = make_compiler(1.0, 0.1, breaks_at=5)
    assert find_wave(compile_wave, 16, 1000, 1, 16 * GIB)[0] == "program of 4"
    assert asked == [16, 8, 4]


def test_where_nobody_says_how_large_a_device_is_what_compiles_fits():
    compile_wave, _ = make_compiler(1.0, 100.0)
    assert find_wave(compile_wave, 16, 1000, 1, None)[0] == "program of 16"


def test_not_even_one_client():
    compile_wave, asked = make_compiler(14.0, 3.0)
    with pytest.raises(UserError, match=r"one client on a device of 16.0 GiB does not fit: it takes 17.0 GiB, 14.0 of"):
        find_wave(compile_wave, 16, 1000, 1, 16 * GIB)
    assert asked == [16, 1]
    with pytest.raises(UserError, match=r"does not fit: RESOURCE_EXHAUSTED: 21.3G of 15.7G"):
        find_wave(make_compiler(1.0, 1.0, breaks_at=1)[0], 4, 1000, 1, None)


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


def test_what_a_refusing_compiler_needed():
    error = TooLargeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm.")
    assert error.needed == int(21.5 * GIB)
    error = TooLargeError(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (32.00G) exceeds "
        "available HBM (15.75G)."
    )
    assert error.needed == 32 * GIB
    assert TooLargeError("RESOURCE_EXHAUSTED: so it is").needed is None


def test_what_a_program_does_not_read_is_counted_beside_it():
    """The compiler leaves `idle` out of its arguments; it lies on the device all the same."""
    mesh = make_mesh(1)
    base = replicate(mesh, {"idle": np.ones((64, 32), np.float32), "w": np.ones((8, 4), np.float32)})
    compiled = jax.jit(lambda base, x: x @ base["w"]).lower(base, jnp.ones((2, 8))).compile()
    assert count_unread(compiled, (base, jnp.ones((2, 8)))) == 4 * 64 * 32
    memory = read_memory(compiled)
    assert memory.arguments == 4 * (8 * 4 + 2 * 8)
    assert memory.total >= memory.arguments + memory.outputs
    with_idle = measure(compiled, base, mesh, 2, unread=4 * 64 * 32)
    assert with_idle.total == measure(compiled, base, mesh, 2).total + 4 * 64 * 32
