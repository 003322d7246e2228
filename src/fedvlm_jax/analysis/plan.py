"""Plan a round for devices that need not be there: compile the very program of training, and read what it would take.

Everything is shapes: no data, no weights, nothing runs. A plan has what the compiler says of the program's memory and
what stands in its text; its only time is a bound that no chip has confirmed, the arithmetic at the chip's peak.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from fedvlm_jax.analysis.collectives import Collective, find_collectives
from fedvlm_jax.analysis.flops import count_flops
from fedvlm_jax.analysis.plan_options import Request, check_request
from fedvlm_jax.analysis.tpu_topologies import Chip, open_devices, parse_topology
from fedvlm_jax.config.method_checks import check_rule, declare
from fedvlm_jax.config.method_setup import make_spec
from fedvlm_jax.data.batches import MULTIPLE
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.mesh_option import parse_mesh
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.federation import memory, round_shapes
from fedvlm_jax.federation.cohort import Layout
from fedvlm_jax.models import Vlm, read_size, read_vlm
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.training import round_setup


@dataclass(frozen=True)
class Attempt:
    """A compilation of the round at one width of the wave."""

    wave: int
    clients: int  # side by side on a device
    bytes: int | None  # that a device must have; None where the compiler refused without a number
    fits: bool  # with a tenth left free
    seconds: float  # that it took


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The widest wave that fits, compiled."""

    request: Request
    chip: Chip | None
    mesh: dict[str, int]
    layout: Layout
    parameters: int  # of the base
    image_tokens: int  # of a prompt's pictures
    example: dict[str, tuple[int, ...]]  # name -> shape; image features in place of pixels where they are kept
    clients: int  # side by side on a device, or on the devices that share a base
    memory: dict[str, int]  # bytes of a device, under the names that the report explains
    room: int | None  # bytes of a device; None where they are unknown
    flops: int  # of a device in a round
    seconds: float | None  # of these at the chip's bf16 peak: no round is faster; None without a known peak
    price: float | None  # of that time on all chips; None without a price per hour
    collectives: tuple[Collective, ...]
    unknown_loops: int  # whose turns the program's text does not give: their collectives count once
    attempts: tuple[Attempt, ...]


def plan_round(request: Request, note: Callable[[str], None] = lambda text: None) -> Plan:
    """Compile the round that the request describes, narrower where it does not fit, and read what it takes.

    The request's run must have passed `validate`; `note` receives progress in words.

    Raises:
        UserError: the topology, the mesh, the model or the sizes cannot be, not even one client fits, or the objective
            draws answers.
    """
    check_request(request)
    run, sizes, topology, clients = request.run, request.sizes, parse_topology(request.topology), request.clients
    if (objective := load_objective(run.objective, run.preference)).samples:
        raise UserError(
            f"--objective {run.objective} draws answers, whose length nobody knows before, so its round cannot be "
            "planned: leave it out; a run says how long its rounds take"
        )
    # Devices come first: jax settles their number when it is first asked.
    mesh, chip = make_mesh(*(parse_mesh(run.system.mesh) or ()), devices=open_devices(topology)), topology.chip
    vlm = read_vlm(run.model, **round_setup.choose_arithmetic(run.system))
    check_rule(run, vlm)
    if vlm.see_patches is not None and declare(run.method, run).patches:
        vlm = vlm.see_patches()
    spec = make_spec(run, vlm)
    size, grid_tokens = _choose_size(request, vlm)
    tokens = sizes.pictures * (grid_tokens or vlm.image_tokens(*size))
    # Sequences are padded as batches are.
    prompt, answer = (-(-n // MULTIPLE) * MULTIPLE for n in (tokens + sizes.prompt_tokens, sizes.answer_tokens))
    most = {"prompt": max(vlm.most_prompt_tokens(answer), 0), "answer": vlm.positions}
    for name, length in (("prompt", prompt), ("answer", answer)):
        if length > most[name]:
            makes = (
                f"that makes {format_count(length, 'token')} with the picture's, and the model has "
                f"{most[name]} positions"
            )
            raise UserError(f"--sizes.{name}-tokens: {makes}")
    cached = run.system.cache != "off"
    example = round_shapes.shape_examples(
        vlm, objective, spec, size=size, views=sizes.pictures, prompt=prompt, answer=answer, cached=cached,
        grid_tokens=grid_tokens,
    )  # fmt: skip
    room = memory.read_device_bytes(mesh) if chip is None else int(chip.hbm * memory.GIB)
    groups, together, cohort = *mesh.devices.shape, request.cohort or clients
    examples = [sizes.examples or run.train.local_steps * run.train.batch_size] * clients
    lay_out = partial(round_setup.lay_out_sizes, run, examples, mesh, cohort)
    attempts: list[Attempt] = []

    def account(layout: Layout, needed: int | None, began: float) -> None:
        seconds = time.monotonic() - began
        fits = needed is not None and (room is None or needed <= memory.USABLE * room)
        attempts.append(Attempt(layout.wave, layout.wave // groups, needed, fits, round(seconds, 1)))
        takes = "more than there is" if needed is None else f"{needed / memory.GIB:.2f} GiB"
        note(f"{'fits' if fits else 'does not fit'}: {takes} of a device (compiled in {seconds:.0f} s)")

    def try_wave(wave: int) -> tuple[tuple[Any, ...], memory.Footprint]:
        layout, began = lay_out(wave), time.monotonic()
        share = "a device" if together == 1 else f"{together} devices with one base"
        waves = f"{layout.waves} x {layout.wave}, {layout.wave // groups} side by side on {share}"
        note(f"compiling for {topology.name}: {format_count(layout.cohort, 'client')}, {waves}")
        programs = round_setup.build_programs(vlm, mesh, run, clients, layout.cohort, layout.places, layout.steps)
        arguments = round_shapes.shape_round(programs, vlm, spec, layout, example)
        phase = programs.method.phase(1)
        try:
            compiled = programs.compile_round(arguments, phase)
        except memory.TooLargeError as error:
            account(layout, error.needed, began)
            raise
        unread = memory.count_unread(compiled, arguments)
        footprint = memory.measure(compiled, arguments.params, mesh, layout.wave, unread)
        account(layout, footprint.total, began)
        return (layout, compiled, unread, partial(programs.round, phase=phase), arguments), footprint

    widest = lay_out(run.system.wave)
    (layout, compiled, unread, program, arguments), footprint = memory.find_wave(
        try_wave, widest.wave, widest.cohort, groups, room
    )
    needs = {"needed": footprint.total, "base": footprint.base, "per_client": footprint.per_client}
    flops, hourly = count_flops(program, *arguments) // mesh.devices.size, request.price_per_chip_hour
    seconds = None if chip is None else flops / (chip.flops * 1e12)
    collectives, unknown_loops = find_collectives(compiled.as_text(), mesh)
    return Plan(
        request=request,
        chip=chip,
        mesh=dict(mesh.shape),
        layout=layout,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(vlm.shapes())),
        image_tokens=tokens,
        example={name: array.shape for name, array in example.items()},
        clients=footprint.clients,
        memory={**memory.read_memory(compiled)._asdict(), "unread": unread, **needs},
        room=room,
        flops=flops,
        seconds=seconds,
        price=None if seconds is None or hourly is None else seconds / 3600 * mesh.devices.size * hourly,
        collectives=collectives,
        unknown_loops=unknown_loops,
        attempts=tuple(attempts),
    )


def _choose_size(request: Request, vlm: Vlm) -> tuple[tuple[int, int], int | None]:
    """Choose height and width of pictures, and of those on grids of their own the most image tokens.

    Raises:
        UserError: the model does not say its size, or has no such grids.
    """
    sizes = request.sizes
    if (pixels := sizes.image_pixels) is not None:
        round_setup.check_grids(request.run, vlm, pixels, "--sizes.image-pixels")
        assert vlm.grids is not None
        side = math.isqrt(vlm.grids.pixels)
        return (side, side), pixels // vlm.grids.pixels
    size = (sizes.image_size, sizes.image_size) if sizes.image_size else read_size(request.model)
    if size is None:
        raise UserError(f"{request.model} does not say how large its pictures are: say --sizes.image-size, say 768")
    return size, None
