"""Work spread over processes: each with its own cores, and a comparison that comes out as in one process."""

import os

import jax
import pytest
from tiny_run import make_folder, tiny_run

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.run_options import SystemOptions, TrainOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.reader import read_comparison
from fedvlm_jax.training import compare as comparing
from fedvlm_jax.utils.parallel import spread
from fedvlm_jax.utils.progress import SilentProgress

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="processes share cores, and this is an accelerator")
needs_two_cores = pytest.mark.skipif(CORES < 2, reason="this machine lends a single core, and the test needs two")


def report(task):
    if task < 0:
        raise UserError("a negative task")
    return task, os.getpid(), sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


@pytest.mark.broad
@on_cpu
@needs_two_cores
def test_every_process_has_its_own_cores():
    done = list(spread(report, range(8), 2))
    assert sorted(task for task, _, _ in done) == list(range(8))
    cores = {process: own for _, process, own in done}
    assert os.getpid() not in cores
    if len(cores) == 2:  # one may have done all before the other was there
        first, second = cores.values()
        assert first is None or not set(first) & set(second)


@pytest.mark.broad
@on_cpu
@needs_two_cores
def test_what_a_task_raises_is_raised():
    with pytest.raises(UserError, match="a negative task"):
        list(spread(report, [1, -1, 2], 2))


@on_cpu
def test_more_processes_than_cores_are_refused():
    with pytest.raises(UserError, match=rf"there are {CORES} cores"):
        next(spread(report, [1], CORES + 1))


@on_cpu
@needs_two_cores
@pytest.mark.slow
def test_a_comparison_comes_out_as_in_one_process(tmp_path):
    model = make_folder(tmp_path / "tiny")
    found = []
    for processes in (1, 2):
        base = tiny_run(
            model,
            tmp_path / str(processes),
            train=TrainOptions(rounds=1, local_steps=2, batch_size=4),
            system=SystemOptions(cache="disk", cache_dir=tmp_path / f"features-{processes}"),
        )
        comparison = Compare(
            methods=("plora", "local", "local+ft"), seeds=2, finetune_steps=2, processes=processes, base=base
        )
        show = SilentProgress()
        found.append(read_comparison(comparing.compare(comparison, show)))
        assert bool(show.lines) == (processes == 1)  # the others' rounds are told in their folders alone
    one, two = found
    assert [(run["method"], run["seed"]) for run in one.runs] == [(run["method"], run["seed"]) for run in two.runs]
    for ours, theirs in zip(one.runs, two.runs, strict=True):
        assert ours["test"]["loss"] == pytest.approx(theirs["test"]["loss"], rel=1e-4)
