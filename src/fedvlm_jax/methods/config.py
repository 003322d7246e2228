"""Options that change the mathematics of a round: local training's extra terms, the server's optimiser, a method's own.

Imports nothing heavy: the command line reads it.
"""

import ast
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedvlm_jax.utils.option_ranges import Chance, NonNegative, Positive

SHARE = "share"
"""The method that a rule alone makes; it has no file in the zoo."""


@dataclass(frozen=True)
class LocalOptions:
    """Terms that are added to local training, for every method that averages"""

    proximal: NonNegative = 0.0
    """FedProx (arXiv 1812.06127): mu of mu/2 times the squared distance of the shared factors from the server's."""
    scaffold: bool = False
    """SCAFFOLD (arXiv 1910.06378): control variates on the shared factors, option II; asks for sgd."""


@dataclass(frozen=True)
class ServerOptions:
    """The optimiser that takes the average update at the server (arXiv 2003.00295)"""

    optimizer: Literal["avg", "momentum", "adam", "yogi", "adagrad"] = "avg"
    """FedAvg(M), FedAdam, FedYogi, FedAdagrad: on the clients' average update as a pseudo-gradient."""
    learning_rate: Positive = 1.0
    """The server's step; adam and its like want far less than 1, for example 0.01."""
    beta1: Chance = 0.9
    """Momentum."""
    beta2: Chance = 0.99
    """Decay of the second moment (adam, yogi)."""
    epsilon: Positive = 1e-3
    """Added to the root of the second moment (the paper's tau)."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that mean something to the optimiser.

        >>> ServerOptions("momentum").reads
        ('optimizer', 'learning_rate', 'beta1')
        """
        own = {"avg": (), "momentum": ("beta1",), "adagrad": ("beta1", "epsilon")}
        return ("optimizer", "learning_rate", *own.get(self.optimizer, ("beta1", "beta2", "epsilon")))


@dataclass(frozen=True)
class MethodOptions:
    """The numbers of the chosen method; a method that has any subclasses this in its own file, as `Options`"""


def find_method_options(name: str) -> type[MethodOptions]:
    """Return the class of a method's numbers; its file, which knows jax, is imported only where it defines one.

    >>> find_method_options("plora").__name__
    'MethodOptions'
    """
    if not list_method_flags(name):
        return MethodOptions
    return importlib.import_module(name_module(name)).Options


@functools.cache
def list_method_flags(name: str) -> tuple[str, ...]:
    """List the flags of a method's numbers, read from its file without importing it.

    >>> list_method_flags("ditto")
    ('--method.lambda',)
    """
    spec = importlib.util.find_spec(name_module(name)) if name.replace("-", "_").isidentifier() else None
    if spec is None or spec.origin is None:
        return ()
    try:
        body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    except SyntaxError:  # who loads the method says so
        return ()
    classes = [node for node in body if isinstance(node, ast.ClassDef) and node.name == "Options"]
    names = [node.target for made in classes for node in made.body if isinstance(node, ast.AnnAssign)]
    return tuple("--method." + name.id.rstrip("_").replace("_", "-") for name in names if isinstance(name, ast.Name))


def name_module(name: str) -> str:
    """Name the module that makes a method.

    >>> name_module("fedavg-lora")
    'fedvlm_jax.methods.zoo.fedavg_lora'
    """
    return f"{__package__}.rule_based" if name == SHARE else f"{__package__}.zoo.{name.replace('-', '_')}"
