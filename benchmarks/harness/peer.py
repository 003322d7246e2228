"""A PyTorch + PEFT process that runs the same world, asked line by line; this package itself never imports PyTorch."""

import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.malloc_settings import SETTINGS
from harness.ours import Vision
from harness.world import World, write_world

SCRIPT = Path(__file__).parents[1] / "pytorch_peft.py"
NEEDS = "torch, transformers and peft"

FORMS = {"float32": ("float32",), "bfloat16": ("bfloat16", "autocast")}
"""Arithmetic -> the forms in which PyTorch may be asked to do it; the fastest counts."""

Choice = tuple[int, str]
"""Threads, form."""


class Peer:
    """The process; ends with the `with` block."""

    def __init__(self, python: str, model: Path, world: World, script: Path | None = None, needs: str = NEEDS) -> None:
        """Start it.

        Args:
            python: an interpreter that has what is needed.
            model: a Hugging Face folder.
            world: what is to be done.
            script: what it runs; a loop over clients by default.
            needs: packages, for messages.

        Raises:
            UserError: there is no such interpreter.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="fedvlm-bench-")
        file = Path(self._scratch.name) / "world.npz"
        self._said = file.with_name("said.txt")  # a file, because nobody would empty a pipe
        write_world(world, file)
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        command = [python, str(script or SCRIPT), str(model), str(file)]
        try:
            with self._said.open("w") as said:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
                    env={name: value for name, value in os.environ.items() if name not in SETTINGS} | quiet,
                )  # fmt: skip
        except OSError as error:
            self._scratch.cleanup()
            raise UserError(f"--peer-python {python}: {error.strerror}; name a Python that has {needs}") from None
        self._python, self._needs = python, needs

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()
        self._scratch.cleanup()

    def ask(self, choice: Choice, vision: Vision, **more: Any) -> float:
        """Run a round; returns its seconds. Arguments and errors are those of `describe_round`."""
        return float(self.describe_round(choice, vision, **more)["seconds"])

    def describe_round(self, choice: Choice, vision: Vision, **more: Any) -> dict[str, Any]:
        """Run a round; returns what the script says of it, its `seconds` among it.

        Args:
            choice: threads and form.
            vision: are features given, or computed in every step?
            more: `clients`, to run so many of them only; `save`, a file for the mean of their adapters; what else
                the script knows.

        Raises:
            UserError: the process ended, with what it last said.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"threads": choice[0], "form": choice[1], "vision": vision, **more}
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.communicate()
            said = self._said.read_text().strip().splitlines()[-1:] or ["it said nothing"]
            raise UserError(f"--peer-python {self._python} ended: {said[0]}; it needs {self._needs}")
        return json.loads(answer)

    def choose(self, vision: Vision, arithmetic: str, threads: Sequence[int] = (1, 2)) -> Choice:
        """Its best number of threads, and of the ways to do this arithmetic, by one client's round after a warm-up.

        What took half as long again as the quickest in the warm-up is not tried further.
        """
        choices = itertools.product(threads, FORMS[arithmetic])
        first = {choice: self.ask(choice, vision, clients=1) for choice in choices}
        left = [choice for choice, seconds in first.items() if seconds <= 1.5 * min(first.values())]
        if len(left) == 1:
            return left[0]
        return min(left, key=lambda choice: min(self.ask(choice, vision, clients=1) for _ in range(2)))

    def runner(self, choice: Choice, vision: Vision) -> Callable[[], float]:
        """A contestant for `timing.interleave`."""
        return lambda: self.ask(choice, vision)

    def give_factors(self, choice: Choice, vision: Vision, **more: Any) -> dict[str, np.ndarray]:
        """Run a round; the mean of the clients' factors, by path."""
        file = Path(self._scratch.name) / "after.npz"
        self.ask(choice, vision, save=str(file), **more)
        with np.load(file) as found:
            return dict(found)
