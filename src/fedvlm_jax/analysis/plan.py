"""Plans a round for devices that need not be there: compiles the very program of training and says what it would take.

Everything is shapes: no data, no weights, nothing runs. What stands in a plan is what the compiler says of the program,
and sums over its text; what a chip can do is looked up (`runs.chips`).
"""

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from fedvlm_jax.analysis.accelerators import parse_topology
from fedvlm_jax.analysis.collectives import find_collectives
from fedvlm_jax.analysis.costs import count_traffic
from fedvlm_jax.analysis.flops import count_flops
from fedvlm_jax.analysis.hlo import parse_program
from fedvlm_jax.analysis.plan_options import Request, check_request
from fedvlm_jax.analysis.plan_record import Attempt, Costs, Plan
from fedvlm_jax.analysis.topologies import open_devices
from fedvlm_jax.data.tokenization import MULTIPLE
from fedvlm_jax.distributed.mesh_shape import parse_mesh
from fedvlm_jax.distributed.sharding import CLIENTS, make_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.cohort import Layout
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.federation.memory import (
    GIB,
    USABLE,
    Footprint,
    TooLargeError,
    count_unread,
    find_most,
    find_wave,
    measure,
    read_device_bytes,
    read_memory,
)
from fedvlm_jax.federation.round_shapes import shape_examples, shape_round
from fedvlm_jax.models import read_size, read_vlm, resolve_folder
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.training.method_options import check_rule
from fedvlm_jax.training.method_setup import build_programs, choose_arithmetic, deal_ranks, lay_out_sizes, make_spec
from fedvlm_jax.training.session import Note

__all__ = ["plan"]


@dataclass
class _Workshop:
    """Makes and compiles rounds of one request, and keeps account of them."""

    request: Request
    vlm: Any
    mesh: Mesh
    example: dict[str, Any]
    room: int | None
    note: Note
    attempts: list[Attempt] = field(default_factory=list)

    def lay_out(self, cohort: int, wave: int | None) -> Layout:
        run, sizes = self.request.run, self.request.sizes
        examples = sizes.examples or run.train.local_steps * run.train.batch_size
        return lay_out_sizes(run, [examples] * max(self.request.clients, cohort), self.mesh, cohort, wave)

    def build(self, layout: Layout) -> tuple[Programs, tuple[Any, ...]]:
        run, population = self.request.run, max(self.request.clients, layout.cohort)
        programs = build_programs(
            run,
            run.method,
            self.vlm,
            load_objective(run.objective, run.preference),
            self.mesh,
            population=population,
            layout=layout,
            ranks=deal_ranks(run.lora.ranks, population),
            common_start=run.lora.private_a == "common",
            local=run.local,
            server=run.server,
        )
        return programs, shape_round(programs, self.vlm, make_spec(run), layout, self.example)

    def try_layout(self, layout: Layout) -> tuple[Any, Footprint]:
        """Compile it.

        Raises:
            TooLargeError: the compiler refuses.
        """
        groups, began = self.mesh.shape[CLIENTS], time.monotonic()
        clients = layout.wave // groups
        self.note(
            f"compiling for {self.request.topology}: {layout.cohort} clients, {layout.waves} x {layout.wave}, "
            f"{clients} side by side on {_name_share(self.mesh)}"
        )
        programs, arguments = self.build(layout)
        phase = 0 if programs.method.phase is None else programs.method.phase(1)
        try:
            compiled = programs.compile_round(arguments, phase)
        except TooLargeError as error:
            self._account(layout, clients, error.needed, None, False, began)
            raise
        unread = count_unread(compiled, arguments)
        footprint = measure(compiled, arguments[0], self.mesh, layout.wave, unread)
        fits = self.room is None or footprint.total <= USABLE * self.room
        peak = read_memory(compiled).peak + unread
        self._account(layout, clients, footprint.total, peak, fits, began)
        return (layout, programs, arguments, phase, compiled, unread), footprint

    def _account(
        self, layout: Layout, clients: int, needed: int | None, peak: int | None, fits: bool, began: float
    ) -> None:
        seconds = time.monotonic() - began
        self.attempts.append(Attempt(layout.wave, clients, layout.cohort, needed, peak, fits, round(seconds, 1)))
        takes = "more than there is" if needed is None else f"{needed / GIB:.2f} GiB"
        self.note(f"{'fits' if fits else 'does not fit'}: {takes} of a device (compiled in {seconds:.0f} s)")


def plan(request: Request, note: Note = lambda text: None) -> Plan:
    """Compile the round that the request describes, narrower where it does not fit, and read what it takes.

    Args:
        request: what is planned; its run must have passed `validate`.
        note: is told what goes on.

    Raises:
        UserError: the topology, the mesh, the model or the sizes cannot be, or not even one client fits.
    """
    check_request(request)
    run, topology = request.run, parse_topology(request.topology)
    mesh = make_mesh(*(parse_mesh(run.system.mesh) or ()), devices=open_devices(topology))
    vlm = read_vlm(run.model, **choose_arithmetic(run.system))
    check_rule(run, vlm.sites)
    objective, spec = load_objective(run.objective, run.preference), make_spec(run)
    size = _find_size(request)
    image_tokens = vlm.image_tokens(*size)
    prompt, answer = (
        -(-length // MULTIPLE) * MULTIPLE
        for length in (image_tokens + request.sizes.prompt_tokens, request.sizes.answer_tokens)
    )
    _check_positions(vlm, prompt, answer)
    example = shape_examples(
        vlm, objective, spec, size=size, prompt=prompt, answer=answer, cached=run.system.cache != "off"
    )
    chip = topology.chip
    room = read_device_bytes(mesh) if chip is None else int(chip.hbm * GIB)
    shop = _Workshop(request, vlm, mesh, example, room, note)
    groups, cohort = mesh.shape[CLIENTS], run.cohort or request.clients
    first = shop.lay_out(cohort, run.system.wave)
    (layout, programs, arguments, phase, compiled, unread), footprint = find_wave(
        lambda wave: shop.try_layout(shop.lay_out(cohort, wave)), first.wave, cohort, groups, room
    )
    most = None
    if room is not None:
        refused = min((one.clients for one in shop.attempts if not one.fits), default=None)

        def try_clients(clients: int) -> Footprint:
            wave = clients * groups
            return shop.try_layout(shop.lay_out(max(cohort, wave), wave))[1]

        most = find_most(try_clients, footprint, room, refused, request.tries)
    program = parse_program(compiled.as_text())
    told = compiled.cost_analysis() or {}
    costs = Costs(
        flops=count_flops(partial(programs.round, phase=phase), *arguments) // mesh.devices.size,
        traffic=count_traffic(program),
        compiler={name: told[name] for name in ("flops", "bytes accessed", "optimal_seconds") if name in told},
        unknown_loops=len(program.unknown),
    )
    return Plan(
        request=request,
        topology=topology,
        mesh=mesh,
        layout=layout,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(vlm.shapes())),
        image_tokens=image_tokens,
        prompt=prompt,
        cached="image_features" in example,
        memory=read_memory(compiled),
        unread=unread,
        footprint=footprint,
        room=room,
        costs=costs,
        collectives=tuple(find_collectives(program, mesh)),
        attempts=tuple(shop.attempts),
        most=most,
    )


def _name_share(mesh: Mesh) -> str:
    together = mesh.devices.size // mesh.shape[CLIENTS]
    return "a device" if together == 1 else f"{together} devices with one base"


def _find_size(request: Request) -> tuple[int, int]:
    side = request.sizes.image_size
    found = (side, side) if side else read_size(resolve_folder(request.run.model, weights=False))
    if found is None:
        raise UserError(f"{request.run.model} does not say how large its pictures are: say --sizes.image-size, say 768")
    return found


def _check_positions(vlm: Any, prompt: int, answer: int) -> None:
    most = vlm.config.text_config.max_position_embeddings
    for flag, length in (("--sizes.prompt-tokens", prompt), ("--sizes.answer-tokens", answer)):
        if length > most:
            raise UserError(
                f"{flag}: that makes {length} tokens with the picture's, and the model has {most} positions"
            )
