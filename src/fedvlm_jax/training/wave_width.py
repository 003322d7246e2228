"""The number of clients that train side by side: as many as the compiled round leaves room for on a device."""

import dataclasses
import time
from functools import partial

from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.mesh import CLIENTS
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.federation.memory import GIB, USABLE, Footprint, TooLargeError, find_wave, read_device_bytes
from fedvlm_jax.training.experiment import Experiment, make_simulator
from fedvlm_jax.utils.progress import COMPILING, working


def fit(experiment: Experiment) -> Experiment:
    """Choose the wave, unless the run names one, and compile its first round; says what it takes of a device.

    Raises:
        UserError: not even one client fits on a device, or not as many as the run asks for.
    """
    mesh, show, asked = experiment.model.mesh, experiment.show, experiment.run.system.wave
    # All processes must choose alike, so the smallest device decides.
    began, limit = time.monotonic(), processes.smallest(read_device_bytes(mesh))

    def try_wave(wave: int) -> tuple[Experiment, Footprint]:
        candidate = dataclasses.replace(experiment, wave=wave)
        simulator = make_simulator(candidate)
        # Compiling takes shapes: whoever waits for the first round waits for its pictures once it is compiled.
        simulator.inputs = candidate.blank_inputs
        simulator.compiling = partial(working, show, COMPILING)
        return candidate, simulator.measure_round(simulator.read_round(1))

    if asked is None:
        layout = experiment.layout
        fitted, footprint = find_wave(try_wave, layout.wave, layout.cohort, mesh.shape[CLIENTS], limit)
    else:
        try:
            fitted, footprint = try_wave(asked)
        except TooLargeError as error:
            raise UserError(f"--wave {asked} does not fit on a device ({error}): leave it out, or try fewer") from error
    room = f" of {limit / GIB:.1f}" if limit else ""
    layout = fitted.layout
    show.note(
        f"a round takes {footprint.total / GIB:.2f}{room} GiB of a device: the base {footprint.base / GIB:.2f}, each "
        f"client {footprint.per_client / 2**20:.0f} MiB; {format_count(layout.cohort, 'client')} in "
        f"{format_count(layout.waves, 'wave')} of {layout.wave} (compiled in {time.monotonic() - began:.0f} s)"
    )
    if asked is not None and limit and footprint.total > USABLE * limit:
        show.note(f"--wave {asked} may be too wide for the device: it is used because it was asked for")
    return fitted
