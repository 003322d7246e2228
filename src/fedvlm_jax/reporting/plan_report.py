"""A plan in words, tables and files: `plan.json` with all that the compiler said, `plan.md` to read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedvlm_jax.analysis.collectives import Collective
from fedvlm_jax.analysis.plan_record import Plan, estimate
from fedvlm_jax.distributed.sharding import CLIENTS
from fedvlm_jax.errors import naming
from fedvlm_jax.federation.memory import GIB
from fedvlm_jax.reporting.tables import Table, format_bytes, to_markdown
from fedvlm_jax.training.config import to_json
from fedvlm_jax.training.run_dir.artifacts import describe_environment, write_json
from fedvlm_jax.utils.serialization import encode

__all__ = ["describe_plan", "tabulate_plan", "word_most", "word_refusal", "write_plan"]

MEANINGS = {
    "arguments": "what the program is given and reads, as the device lays it out",
    "outputs": "what it returns",
    "aliases": "of that, what is written over arguments",
    "temporaries": "scratch",
    "code": "the program itself",
    "peak": "the most at a time, as the compiler has it",
}


def word_refusal(plan: Plan) -> str:
    """Why the wave that was asked for is not the one that was planned; empty where it is."""
    first = plan.refused
    if first is None or plan.room is None:
        return ""
    needs = "too much" if first.bytes is None else f"{first.bytes / GIB:.1f}"
    return (
        f"does not fit: {needs} of {plan.room / GIB:.1f} GiB (a tenth stays free); wave {first.wave} → "
        f"{plan.layout.wave} fits, {plan.footprint.clients} clients a {_name_place(plan)} in place of {first.clients}"
    )


def word_most(plan: Plan) -> str:
    """How many clients fit side by side, as far as it was tried."""
    if plan.most is None:
        return "unknown: nobody says how much memory there is"
    fits, refused = plan.most
    if refused == fits + 1:
        return f"{fits} (compiled; {refused} do not fit)"
    return f"{fits} or more (compiled" + (f"; {refused} do not fit)" if refused else ")")


def _name_place(plan: Plan) -> str:
    together = plan.mesh.devices.size // plan.mesh.shape[CLIENTS]
    chip = "chip" if plan.topology.chip else "device"
    return chip if together == 1 else f"group of {together} {chip}s"


def tabulate_plan(plan: Plan) -> list[Table]:
    """The round, its memory, its cost and its collectives."""
    return [_tabulate_round(plan), _tabulate_memory(plan), _tabulate_costs(plan), _tabulate_collectives(plan)]


def _tabulate_round(plan: Plan) -> Table:
    run, layout = plan.request.run, plan.layout
    place, chip = _name_place(plan), plan.topology.chip
    devices = f"{plan.mesh.devices.size} of {plan.topology}, clients={plan.mesh.shape[CLIENTS]}"
    devices += "" if place.count(" ") == 0 else f",model={plan.mesh.devices.size // plan.mesh.shape[CLIENTS]}"
    if chip is not None:
        devices += f" ({chip.hbm:g} GiB, {chip.flops:g} TFLOP/s, {chip.bandwidth:g} GB/s each)"
    pictures = "features, computed once" if plan.cached else "pixels, in every step"
    rows = [
        ("devices", devices),
        ("model", f"{run.model}, {plan.parameters / 1e6:.1f} M parameters, {run.system.compute}"
         + (", layers recomputed" if run.system.remat else "")),
        ("method", f"{run.method}, rank {run.lora.rank}, {run.objective}"),
        ("clients", f"{layout.cohort} of {plan.request.clients} a round: {layout.waves} × {layout.wave}, "
         f"{plan.footprint.clients} side by side on a {place}"),
        ("local training", f"{layout.steps} steps of {layout.batch} examples"),
        ("example", f"{plan.prompt} tokens in, {plan.image_tokens} of them the picture's ({pictures}); "
         f"{plan.request.sizes.answer_tokens} out"),
    ]  # fmt: skip
    return Table("Round", ("", "planned"), tuple(rows), prose=frozenset({1}))


def _tabulate_memory(plan: Plan) -> Table:
    rows = [(name, format_bytes(value), MEANINGS[name]) for name, value in plan.memory._asdict().items()]
    rows.append(("beside it", format_bytes(plan.unread), "of the base, what the round does not read"))
    room = "" if plan.room is None else f" of {plan.room / GIB:.1f} GiB, {plan.footprint.total / plan.room:.0%}"
    rows.append(
        ("needed", f"{plan.footprint.total / GIB:.2f} GiB{room}", "their sum or the peak, and what lies beside")
    )
    rows.append(("of it the base", format_bytes(plan.footprint.base), "once, whatever the clients"))
    rows.append(("a client", format_bytes(plan.footprint.per_client), "the rest by clients side by side"))
    rows.append(("clients that fit", word_most(plan), f"side by side on a {_name_place(plan)}"))
    return Table("Memory of a device", ("", "", "meaning"), tuple(rows), frozenset({7}), prose=frozenset({2}))


def _tabulate_costs(plan: Plan) -> Table:
    costs, seconds = plan.costs, estimate(plan)
    rows = [
        ("arithmetic", f"{costs.flops / 1e12:.3f} TFLOP", "matrix products and convolutions, per device"),
        ("memory traffic", format_bytes(costs.traffic.bytes), "what instructions read and write, per device"),
    ]
    if seconds is not None:
        by = max(("arithmetic", "memory", "network"), key=lambda name: getattr(seconds, name))
        parts = ", ".join(f"{name} {_time(getattr(seconds, name))}" for name in ("arithmetic", "memory", "network"))
        rows.append(("roofline", _time(seconds.roofline), f"{parts}: bound by {by}"))
        told = "none" if seconds.compiler is None else _time(seconds.compiler)
        rows.append(("compiler's estimate", told, "its cycles; without network and hand-written kernels"))
        rows.append(("round", f"{_time(seconds.round)} or more", "the longer of the two"))
        rows.append(("share of the peak", f"{seconds.share:.1%}", "of the chip's bf16 arithmetic, in that time"))
        if plan.request.price is not None:
            price = f"per round, at {plan.request.price:g} a chip and hour"
            rows.append(("cost", f"{price_round(plan):.4g} or more", price))
    note = f"{costs.unknown_loops} loops count once: their turns are not told." if costs.unknown_loops else ""
    return Table("Cost of a round", ("", "", "meaning"), tuple(rows), note=note, prose=frozenset({2}))


def price_round(plan: Plan) -> float | None:
    """What a round costs at the price given; None without one."""
    seconds = estimate(plan)
    if seconds is None or plan.request.price is None:
        return None
    return seconds.round / 3600 * plan.mesh.devices.size * plan.request.price


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _tabulate_collectives(plan: Plan) -> Table:
    rows = []
    for (axes, kind, devices), members in _group(plan.collectives):
        size = sum(one.bytes * one.runs for one in members)
        rows.append((f"{kind} over {axes}", str(devices), str(len(members)), str(sum(one.runs for one in members)),
                     format_bytes(size)))  # fmt: skip
    columns = ("collective", "devices", "in the program", "in a round", "bytes a device, round")
    note = "" if rows else "None: no device tells another anything."
    return Table("Collectives", columns, tuple(rows), note=note)


def _group(found: Iterable[Collective]) -> list[tuple[tuple[str, str, int], list[Collective]]]:
    groups: dict[tuple[str, str, int], list[Collective]] = {}
    for one in found:
        groups.setdefault((" and ".join(one.axes), one.kind, one.devices), []).append(one)
    return sorted(groups.items())


def describe_plan(plan: Plan) -> dict[str, Any]:
    """All of a plan, for `plan.json`."""
    chip, seconds, request = plan.topology.chip, estimate(plan), plan.request
    return {
        "topology": {"name": str(plan.topology), "devices": plan.mesh.devices.size, "chip": chip and encode(chip)},
        "mesh": {str(name): size for name, size in plan.mesh.shape.items()},
        "clients": request.clients,
        "sizes": encode(request.sizes),
        "layout": encode(plan.layout),
        "model": {
            "name": request.run.model,
            "parameters": plan.parameters,
            "image_tokens": plan.image_tokens,
            "prompt_tokens": plan.prompt,
            "features_cached": plan.cached,
        },
        "memory_bytes": {
            **plan.memory._asdict(),
            "unread": plan.unread,
            "needed": plan.footprint.total,
            "base": plan.footprint.base,
            "per_client": plan.footprint.per_client,
            "of_device": plan.room,
        },
        "fit": {
            "attempts": [encode(one) for one in plan.attempts],
            "refusal": word_refusal(plan) or None,
            "clients_that_fit": plan.most and plan.most[0],
            "clients_that_do_not": plan.most and plan.most[1],
        },
        "cost": {
            "flops": plan.costs.flops,
            "bytes": plan.costs.traffic.bytes,
            "cycles": plan.costs.traffic.cycles,
            "cost_analysis": plan.costs.compiler,
            "unknown_loops": plan.costs.unknown_loops,
        },
        "seconds": seconds
        and {
            "arithmetic": seconds.arithmetic,
            "memory": seconds.memory,
            "network": seconds.network,
            "roofline": seconds.roofline,
            "compiler": seconds.compiler,
            "round": seconds.round,
            "share_of_peak": seconds.share,
        },
        "price_per_chip_hour": request.price,
        "cost_per_round": price_round(plan),
        "collectives": [one.to_json() for one in plan.collectives],
        "run": to_json(request.run),
        **describe_environment(),
    }


def write_plan(folder: Path, plan: Plan) -> None:
    """Write `plan.json` and `plan.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", describe_plan(plan))
    parts = [f"# Plan for {plan.topology}", *([word_refusal(plan)] if plan.refused else [])]
    parts += [to_markdown(table) for table in tabulate_plan(plan)]
    with naming(folder / "plan.md"):
        (folder / "plan.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
