"""Rounds of the shipped model on this machine: interleaved medians and ratios, share of the matmul peak, memory.

    python benchmarks/shipped.py
    python benchmarks/shipped.py --batches 1 --waves 1 16 --peer-python ~/torch/bin/python

Several local batches and waves are run in turn; with --peer-python, a PyTorch + PEFT loop over clients too, whose
adapters are compared after the round. Writes bench.json into a folder under runs/.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from harness.shipped import CLIENTS, IMAGES, BenchOptions, measure_shipped

from fedvlm_jax.errors import UserError
from fedvlm_jax.reporting.tables import Table, show
from fedvlm_jax.run_dir.folder_lock import open_folder
from fedvlm_jax.utils.compilation_cache import keep_programs
from fedvlm_jax.utils.console import Terminal
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.progress_display import open_progress


@dataclass(frozen=True)
class Options:
    """What is measured."""

    batches: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (1, 8)
    """Examples of a local step, each measured by itself."""
    waves: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (1, 16)
    """Clients side by side; each must divide the 16 that ship. All are compared with the first."""
    steps: int = 4
    """Local steps of a client in a round."""
    repeats: int = 5
    """Interleaved runs."""
    peer_python: str | None = None
    """Compare with a PyTorch + PEFT loop over clients, run by this Python (which needs torch, transformers and peft),
    and compare the adapters after the round."""
    out: Path | None = None
    """Folder for bench.json (default: runs/<time>-bench)."""


def main() -> None:
    """Measure, write and print."""
    keep_programs()
    try:
        run(tyro.cli(Options, description=__doc__))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def run(options: Options) -> None:
    """Measure what the options ask for, write bench.json, and print its table.

    Raises:
        UserError: a number that cannot be, a folder that is in use, or a Python without PyTorch and PEFT.
    """
    check_options(options)
    progress = open_progress()
    with open_folder(options.out, "bench") as folder:
        try:
            asked = BenchOptions(options.batches, options.waves, options.steps, options.repeats, options.peer_python)
            found = measure_shipped(asked, progress.note)
        finally:
            progress.finish()
        write_json(folder / "bench.json", found)
    console = Terminal()
    show(console, tabulate(found))
    for line in describe(found):
        console.say(line)
    console.say(f"numbers  {folder / 'bench.json'}")


def check_options(options: Options) -> None:
    """Refuse what the federation that ships cannot do.

    Raises:
        UserError: a number below 1, a wave that does not divide the clients, or more examples than a client has.
    """
    lists = {"--batches": options.batches, "--waves": options.waves}
    for name, values in (*lists.items(), ("--steps", (options.steps,)), ("--repeats", (options.repeats,))):
        if not values or min(values) < 1:
            raise UserError(f"{name} is {' '.join(map(str, values)) or 'empty'}: expected numbers of 1 or more")
    if odd := [wave for wave in options.waves if CLIENTS % wave]:
        raise UserError(f"--waves {odd[0]} does not divide the {CLIENTS} clients: 1, 2, 4, 8 and 16 do")
    batch, steps = max(options.batches), options.steps
    if batch * steps > IMAGES:
        raise UserError(
            f"--batches {batch} x --steps {steps} takes {batch * steps} examples of a client: it has {IMAGES}; take "
            "fewer steps or smaller batches"
        )


def tabulate(found: Mapping[str, Any]) -> Table:
    """Make a row per batch and wave; columns against PyTorch + PEFT where that was measured."""
    rounds = found["rounds"]
    compared = any("theirs" in line for line in rounds)
    first = rounds[0]["wave"]
    columns = ["batch, wave", "s/round", "ms/step", "clients/s", "of peak", f"against wave {first}"]
    rows = []
    for line in rounds:
        row = [
            f"{line['batch']}, {line['wave']}", f"{line['seconds']['median']:.3f}", f"{1e3 * line['step_seconds']:.1f}",
            f"{line['clients_per_second']:.1f}", f"{line['share_of_peak']:.0%}", f"{line['times_first_wave']:.2f}x",
        ]  # fmt: skip
        if compared:
            error = line["theirs"]["adapters"]["error_of_movement"]
            row += [f"{line['times_theirs']:.1f}x", f"{error:.0e}"]
        rows.append(tuple(row))
    columns += ["against PEFT", "apart"] if compared else []
    title = f"{found['model']}: {found['clients']} clients, {found['steps']} local steps, {found['tokens']} tokens"
    return Table(title, tuple(columns), tuple(rows))


def describe(found: Mapping[str, Any]) -> list[str]:
    """Write the lines below the table: machine, peak, host's share, compilations, memory of a client."""
    machine, versions, simulator, memory = (found[key] for key in ("machine", "versions", "simulator", "client_bytes"))
    compiles, room = simulator["compiles"], machine["device_memory_gib"]
    return [
        f"machine  {machine['processor']}, {machine['cores']} cores, {machine['devices'][0]}"
        + (f" of {room} GiB" if room else "")
        + f"; Python {versions['python']}, jax {versions['jax']}, commit {(found['commit'] or 'unknown')[:12]}",
        f"peak     {found['matmul_peak_gflops']:.0f} GFLOP/s in float32 matmuls, measured between the rounds",
        f"host     {simulator['host_share']:.1%} of a round passes outside compiled programs; "
        f"{simulator['health_share']:.1%} measures the aggregation's health",
        f"compiles {compiles['programs_of_the_round']} for {compiles['rounds']} rounds, {compiles['later']} later",
        f"memory   one more client takes {memory['marginal'] / 2**20:.1f} MiB at batch {memory['batch']}, "
        f"{memory['marginal_over_alone']:.2f} times a round of one client without its base",
    ]


if __name__ == "__main__":
    main()
