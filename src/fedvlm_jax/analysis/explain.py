"""Explain a method on a model's tensors: from shapes alone, no data, no weights, no training.

Its functions are traced (`trace_method`), so a new file in `methods/zoo/` is explained without being known.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.analysis.trace_method import OPTIMIZER, Stage, Tracer, flatten_state
from fedvlm_jax.config.method_options import check_rule
from fedvlm_jax.config.method_setup import make_setup
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.federation.round_shapes import shape_key
from fedvlm_jax.methods import Method, Setup, load_method
from fedvlm_jax.methods.base import is_factor
from fedvlm_jax.models import Vlm, read_vlm
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.training.round_setup import deal_ranks
from fedvlm_jax.utils import tree


@dataclass(frozen=True)
class Explanation:
    """A method on a model.

    Attributes:
        name, source: the method's.
        model: as the user named it.
        base: numbers in the frozen base.
        stages: by phase.
        state, optimizer: bytes that a client keeps from round to round, and how many of them are its optimisers'.
        moves_base: does the method change the base?
        own_download: do clients receive something that is each client's own?
        population, cohort: clients, and how many of them a round has.
        layer: a virtual path, to show how a rule names a single layer; empty where nothing is stacked.
    """

    name: str
    source: str
    model: str
    base: int
    stages: tuple[Stage, ...]
    state: int
    optimizer: int
    moves_base: bool
    own_download: bool
    population: int
    cohort: int
    layer: str


def explain(run: Run, population: int = 16) -> Explanation:
    """Explain `run.method` on `run.model`.

    Args:
        run: the options; what they say of data and evaluation is not looked at.
        population: clients that there are.

    Raises:
        UserError: the model is not there, or targets, ranks or the rule do not fit it.
    """
    vlm = read_vlm(run.model)
    check_rule(run, vlm)
    return explain_method(vlm, run, population, lambda setup: load_method(run.method, setup))


def explain_method(vlm: Vlm, run: Run, population: int, make: Callable[[Setup], Method]) -> Explanation:
    """Explain a method that need not be among the installed ones.

    Args:
        vlm: the model; of its weights only shapes are asked for.
        run: the options.
        population: clients that there are.
        make: of the method.
    """
    cohort = min(run.cohort or population, population)
    ranks = deal_ranks(run.lora.ranks, population)
    trainer = make_local_trainer(
        vlm, load_objective("sft"), optimizer=run.train.optimizer, weight_decay=run.train.weight_decay
    )

    def start_marked(factors: PyTree, trained: Callable[[str], bool] = is_factor) -> PyTree:
        return {OPTIMIZER: trainer.start(factors, trained)}

    setup = replace(
        make_setup(run, vlm, start_marked),
        population=population,
        cohort=cohort,
        places=cohort,
        local_steps=run.train.local_steps,
        ranks=ranks,
    )
    method = make(setup)
    adapter = jax.eval_shape(setup.draw, shape_key())
    server = jax.eval_shape(lambda adapter: method.init(adapter=adapter), adapter)
    personal = jax.eval_shape(
        lambda key, server: method.init_client(key=key, server=server, number=jnp.int32(0)), shape_key(), server
    )
    rounds: dict[int, list[int]] = {}
    for number in range(1, run.train.rounds + 1):
        rounds.setdefault(method.phase(number), []).append(number)
    sites = {path: len(site.stack) for path, site in vlm.sites.items() if f"{path}/a" in tree.flatten(adapter)}
    tracer = Tracer(method, vlm, run.train.local_steps, run.train.batch_size, server, personal, cohort, ranks, sites)
    state = flatten_state(personal)
    stacked = next((path for path, count in sites.items() if count), "")
    return Explanation(
        name=method.name,
        source=method.source,
        model=run.model,
        base=sum(leaf.size for leaf in jax.tree.leaves(vlm.shapes())),
        stages=tuple(tracer.stage(phase, tuple(numbers)) for phase, numbers in rounds.items()),
        state=tree.count_bytes(personal),
        optimizer=tree.count_bytes({path: leaf for path, leaf in state.items() if OPTIMIZER in path}),
        moves_base=method.base is not None,
        own_download=method.mixes,
        population=population,
        cohort=cohort,
        layer=lora.virtual_paths(adapter, f"{stacked}/b", vlm.sites)[0] if stacked else "",
    )
