"""`fedvlm bench`: how fast this machine trains clients side by side, and what each takes."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from fedvlm_jax.errors import UserError
from fedvlm_jax.training.run_dir.folder_lock import open_folder

__all__ = ["bench"]

IMAGES, CLIENTS = 60, 16  # of the federation that ships; bench.shipped has them too, but imports jax


def bench(
    batches: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (1, 8),
    waves: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (1, 16),
    steps: int = 4,
    repeats: int = 5,
    peer_python: Annotated[
        str | None, tyro.conf.arg(metavar="PYTHON", help_behavior_hint="(default: no comparison)")
    ] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/<time>-bench)")] = None,
) -> None:
    """Measure rounds of the shipped model here: interleaved medians and ratios, share of the matmul peak, memory.

    Args:
        batches: examples of a local step, each measured by itself.
        waves: clients side by side; each must divide the 16 that ship. All are compared with the first.
        steps: local steps of a client in a round.
        repeats: interleaved runs.
        peer_python: compare with a PyTorch + PEFT loop over clients, run by this Python (which needs torch,
            transformers and peft), and compare the adapters after the round.
        out: folder for bench.json.
    """
    for name, values in (("--batches", batches), ("--waves", waves), ("--steps", (steps,)), ("--repeats", (repeats,))):
        if not values or min(values) < 1:
            raise UserError(f"{name} is {' '.join(map(str, values)) or 'empty'}: expected numbers of 1 or more")
    if odd := [wave for wave in waves if CLIENTS % wave]:
        raise UserError(f"--waves {odd[0]} does not divide the {CLIENTS} clients: 1, 2, 4, 8 and 16 do")
    if max(batches) * steps > IMAGES:
        raise UserError(
            f"--batches {max(batches)} x --steps {steps} takes {max(batches) * steps} examples of a client: it has "
            f"{IMAGES}; take fewer steps or smaller batches"
        )
    from fedvlm_jax.bench import shipped
    from fedvlm_jax.reporting import tables
    from fedvlm_jax.training import progress
    from fedvlm_jax.training.run_dir.artifacts import write_json
    from fedvlm_jax.utils.console import open_console

    show = progress.open_progress()
    with open_folder(out, "bench") as folder:
        try:
            found = shipped.measure_shipped(
                shipped.BenchOptions(tuple(batches), tuple(waves), steps, repeats, peer_python), show.note
            )
        finally:
            show.finish()
        write_json(folder / "bench.json", found)
    console = open_console()
    tables.show(console, _tabulate(found, tables.Table))
    for line in _say(found):
        console.say(line)
    console.say(f"numbers  {folder / 'bench.json'}")


def _tabulate(found: dict[str, Any], table: Any) -> Any:
    compared = any("theirs" in line for line in found["rounds"])
    columns = ["batch, wave", "s/round", "ms/step", "clients/s", "of peak", "against wave " + str(_first_wave(found))]
    rows = []
    for line in found["rounds"]:
        row = [
            f"{line['batch']}, {line['wave']}", f"{line['seconds']['median']:.3f}", f"{1e3 * line['step_seconds']:.1f}",
            f"{line['clients_per_second']:.1f}", f"{line['share_of_peak']:.0%}", f"{line['times_first_wave']:.2f}x",
        ]  # fmt: skip
        if compared:
            theirs = line["theirs"]
            row += [f"{line['times_theirs']:.1f}x", f"{theirs['adapters']['error_of_movement']:.0e}"]
        rows.append(tuple(row))
    columns += ["against PEFT", "apart"] if compared else []
    title = f"{found['model']}: {found['clients']} clients, {found['steps']} local steps, {found['tokens']} tokens"
    return table(title, tuple(columns), tuple(rows))


def _first_wave(found: dict[str, Any]) -> int:
    return found["rounds"][0]["wave"]


def _say(found: dict[str, Any]) -> list[str]:
    machine, versions, driver, memory = (found[key] for key in ("machine", "versions", "driver", "client_bytes"))
    compiles = driver["compiles"]
    room = machine["device_memory_gib"]
    return [
        f"machine  {machine['processor']}, {machine['cores']} cores, {machine['devices'][0]}"
        + (f" of {room} GiB" if room else "")
        + f"; Python {versions['python']}, jax {versions['jax']}, commit {(found['commit'] or 'unknown')[:12]}",
        f"peak     {found['matmul_peak_gflops']:.0f} GFLOP/s in float32 matmuls, measured between the rounds",
        f"host     {driver['host_share']:.1%} of a round passes outside compiled programs; "
        f"{driver['health_share']:.1%} measures the aggregation's health",
        f"compiles {compiles['programs_of_the_round']} for {compiles['rounds']} rounds, {compiles['later']} later",
        f"memory   one more client takes {memory['marginal'] / 2**20:.1f} MiB at batch {memory['batch']}, "
        f"{memory['marginal_over_alone']:.2f} times a round of one client without its base",
    ]
