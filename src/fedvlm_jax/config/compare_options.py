"""Options of `fedvlm compare`: methods, seeds and what their runs have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.methods.config import MethodOptions
from fedvlm_jax.utils.option_ranges import Count


@dataclass(frozen=True)
class Compare:
    """Several methods on the same clients, cohorts and initial adapter, several seeds each."""

    methods: tuple[str, ...] = ("local", "fedavg-lora", "fedavg-lora+ft", "plora")
    """What is compared, beside zero-shot; with "+ft" after a name every client then fine-tunes on its own, with "+knn"
    it mixes in what it remembers of its training answers."""
    seeds: Count = 2
    """How many seeds: --seed, the next, and so on."""
    finetune_steps: Count = 20
    """Local steps of the methods with "+ft"."""
    neighbours: Count = 10
    """Neighbours of the methods with "+knn"."""
    processes: Count = 1
    """Share the methods out over so many processes, each with its own cores and a base of its own: a quarter faster on
    two cores. Not with an accelerator."""
    base: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)
    """What all the runs have in common."""
    method_options: Annotated[Mapping[str, MethodOptions], tyro.conf.arg(name="method")] = field(default_factory=dict)
    """Method -> its numbers; its defaults where it is not named."""

    @property
    def out(self) -> Path | None:
        """The comparison's folder, `base.out`: so `--out` is one option and not two."""
        return self.base.out
