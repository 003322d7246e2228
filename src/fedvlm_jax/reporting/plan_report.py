"""A plan as tables, as `plan.json` and as `plan.md`."""

from pathlib import Path

from fedvlm_jax.analysis.plan import Plan
from fedvlm_jax.distributed.mesh import MODEL
from fedvlm_jax.distributed.mesh_option import MeshShape
from fedvlm_jax.errors import format_count
from fedvlm_jax.federation.memory import GIB
from fedvlm_jax.reporting.tables import Table, format_bytes, to_markdown
from fedvlm_jax.run_dir.artifacts import describe_environment
from fedvlm_jax.utils.files import write_json, write_text
from fedvlm_jax.utils.serialization import encode

MEANINGS = {
    "arguments": "what the program is given and reads, as the device lays it out",
    "outputs": "what it returns",
    "aliases": "of that, what is written over arguments",
    "temporaries": "scratch",
    "code": "the program itself",
    "peak": "the most at a time, as the compiler has it",
    "unread": "of the base, what the round does not read; it lies beside the program",
    "needed": "their sum or the peak, and what lies beside",
    "base": "of what is needed: once, whatever the clients",
    "per_client": "the rest by clients side by side",
}


def describe_refusal(plan: Plan) -> str:
    """Say why the wave that was asked for is not the one that was planned; empty where it is."""
    first = plan.attempts[0]
    if first.fits or plan.room is None:
        return ""
    needs = "too much" if first.bytes is None else f"{first.bytes / GIB:.1f}"
    return (
        f"does not fit: {needs} of {plan.room / GIB:.1f} GiB (a tenth stays free); wave {first.wave} → "
        f"{plan.layout.wave} fits, {format_count(plan.clients, 'client')} a {_name_place(plan)} in place "
        f"of {first.clients}"
    )


def _name_place(plan: Plan) -> str:
    chip, together = "chip" if plan.chip else "device", plan.mesh[MODEL]
    return f"group of {together} {chip}s" if together > 1 else chip


def tabulate_plan(plan: Plan) -> list[Table]:
    """Make the tables of the round, its memory, its cost and its collectives."""
    run, layout, chip = plan.request.run, plan.layout, plan.chip
    about = f" ({chip.hbm:g} GiB, {chip.flops:g} TFLOP/s each)" if chip else ""
    pictures = "features, computed once" if "image_features" in plan.example else "pixels, in every step"
    recomputed = ", layers recomputed" if run.system.remat else ""
    tokens, answer = plan.example["input_ids"][0], plan.request.sizes.answer_tokens
    whose = "the picture's" if plan.request.sizes.pictures == 1 else "the pictures'"
    planned = [
        ("devices", f"{plan.request.topology}, {MeshShape(**plan.mesh)}{about}"),
        ("model", f"{run.model}, {plan.parameters / 1e6:.1f} M parameters, {run.system.compute}{recomputed}"),
        ("method", f"{run.method}, rank {run.lora.rank}, {run.objective}"),
        ("clients", f"{layout.cohort} of {plan.request.clients} a round: {layout.waves} × {layout.wave}, "
         f"{plan.clients} side by side on a {_name_place(plan)}"),
        ("local training", f"{format_count(layout.steps, 'step')} of {format_count(layout.batch, 'example')}"),
        ("example", f"{format_count(tokens, 'token')} in, {plan.image_tokens} of them {whose} ({pictures}); "
         f"{answer} out"),
    ]  # fmt: skip
    memory = [(name.replace("_", " "), format_bytes(plan.memory[name]), text) for name, text in MEANINGS.items()]
    if plan.room is not None:
        share = f"{plan.memory['needed'] / plan.room:.0%} of it are needed; a tenth should stay free"
        memory.append(("of a device", format_bytes(plan.room), share))
    cost = [("arithmetic", f"{plan.flops / 1e12:.3f} TFLOP", "matrix products and convolutions, per device")]
    if plan.seconds is not None:
        bound = "that at the chip's bf16 peak: a bound that no chip has confirmed"
        cost.append(("round", f"{1e3 * plan.seconds:.3g} ms or more", bound))
    if plan.price is not None:
        price = f"of that time, at {plan.request.price_per_chip_hour:g} a chip and hour"
        cost.append(("price", f"{plan.price:.4g} or more", price))
    sent = [
        (f"{op.kind} over {' and '.join(op.axes)}", str(op.devices_per_group), str(op.runs_per_round),
         format_bytes(op.bytes_per_round))
        for op in plan.collectives
    ]  # fmt: skip
    note = "" if sent else "None: no device sends another anything."
    if plan.unknown_loops:
        note = (
            f"Those in {format_count(plan.unknown_loops, 'loop')} of unknown length count once: their turns "
            "are not in the program's text."
        )
    return [
        Table("Round", ("", "planned"), tuple(planned), prose=frozenset({1})),
        # The row of what is needed stands out.
        Table("Memory of a device", ("", "", "meaning"), tuple(memory), frozenset({7}), prose=frozenset({2})),
        Table("Cost of a round", ("", "", "meaning"), tuple(cost), prose=frozenset({2})),
        Table("Collectives", ("collective", "devices", "in a round", "bytes a device"), tuple(sent), note=note),
    ]


def write_plan(folder: Path, plan: Plan) -> None:
    """Write `plan.json` and `plan.md`."""
    refusal = describe_refusal(plan)
    write_json(folder / "plan.json", {**encode(plan), "refusal": refusal or None, **describe_environment()})
    parts = [f"# Plan for {plan.request.topology}", refusal, *map(to_markdown, tabulate_plan(plan))]
    write_text(folder / "plan.md", "\n\n".join(filter(None, parts)) + "\n")
