"""Explain a method on a model's tensors: from shapes alone, no data, no weights, no training.

Its functions are traced (`trace_method`), so a new file in `methods/zoo/` is explained without being known.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.analysis.noise_size import NoiseSize, measure_noise
from fedvlm_jax.analysis.trace_method import OPTIMIZER, Stage, Tracer, differs_by_client
from fedvlm_jax.config.method_checks import check_rule
from fedvlm_jax.config.method_setup import make_method, make_setup
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.federation.round_shapes import shape_key
from fedvlm_jax.federation.traced_update import flatten_state
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.methods import Method, Setup, load_method
from fedvlm_jax.methods.base import is_factor
from fedvlm_jax.methods.config import ServerOptions
from fedvlm_jax.models import Vlm, read_vlm
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.privacy.accounting import choose_noise
from fedvlm_jax.privacy.sampling import plan_sampling
from fedvlm_jax.training.round_setup import deal_ranks
from fedvlm_jax.utils import tree


@dataclass(frozen=True)
class Explanation:
    """A method on a model."""

    name: str  # the method's
    source: str
    model: str  # as the user named it
    base: int  # numbers in the frozen base
    stages: tuple[Stage, ...]  # by phase
    state: int  # bytes that a client keeps from round to round
    optimizer: int  # of them its optimisers'
    moves_base: bool
    own_download: bool  # whether clients receive something that differs from client to client
    population: int
    cohort: int
    layer: str  # a virtual path, to show how a rule names a single layer; empty where nothing is stacked
    noise: NoiseSize | None = None  # under differential privacy
    unreached: str = ""  # see `Method.unreached`


def explain(run: Run, population: int = 16) -> Explanation:
    """Explain `run.method` on `run.model`; options of data and evaluation play no part.

    Raises:
        UserError: the model is not there, or targets, ranks or the rule do not fit it.
    """
    vlm = read_vlm(run.model)
    check_rule(run, vlm)
    return explain_method(vlm, run, population, lambda setup: make_method(run, setup))


def explain_method(vlm: Vlm, run: Run, population: int, make: Callable[[Setup], Method]) -> Explanation:
    """Explain a method that need not be among the installed ones, but is made by `make`."""
    train, cohort = run.train, min(run.cohort or population, population)
    ranks = deal_ranks(run.lora.ranks, population)
    trainer = make_local_trainer(vlm, load_objective("sft"), optimizer=train.optimizer, weight_decay=train.weight_decay)

    def start_marked(factors: PyTree, trained: Callable[[str], bool] = is_factor) -> PyTree:
        return {OPTIMIZER: trainer.start(factors, trained)}

    setup = replace(
        make_setup(run, vlm, start_marked),
        population=population,
        cohort=cohort,
        places=cohort,
        local_steps=train.local_steps,
        ranks=ranks,
    )
    method = make(setup)
    compressed = run.messages.compress != "none"
    plain = make_method(replace(run, messages=MessageOptions()), setup) if compressed else method
    adapter = jax.eval_shape(setup.draw, shape_key())
    server = jax.eval_shape(lambda adapter: method.init(adapter=adapter), adapter)
    personal = jax.eval_shape(
        lambda key, server: method.init_client(key=key, server=server, number=jnp.int32(0)), shape_key(), server
    )
    rounds: dict[int, list[int]] = {}
    for number in range(1, train.rounds + 1):
        rounds.setdefault(method.phase(number), []).append(number)
    flat = tree.flatten(adapter)
    sites = {path: len(site.stack) for path, site in vlm.sites.items()}
    sites |= {path.rpartition("/")[0]: leaf.ndim - 2 for path, leaf in flat.items() if leaf.ndim > 1}
    noise = None
    tracer = Tracer(method, plain, vlm, train.local_steps, train.batch_size, server, personal, cohort, ranks, sites)
    if run.privacy.on:
        bare = load_method(run.method, replace(setup, server=ServerOptions()))
        drawn = plan_sampling(run.privacy, population, run.cohort)
        options = replace(run.privacy, noise=choose_noise(run.privacy, drawn, train.rounds))
        start = jax.jit(setup.draw)(jax.random.key(run.seed))
        noise = measure_noise(bare, start, tracer.message(method.phase(1)), options, drawn, train.rounds)
    state = flatten_state(personal)
    stacked = next((path for path, count in sites.items() if count and f"{path}/b" in flat), "")
    return Explanation(
        name=method.name,
        source=method.source,
        model=run.model,
        base=sum(leaf.size for leaf in jax.tree.leaves(vlm.shapes())),
        stages=tuple(tracer.stage(phase, tuple(numbers)) for phase, numbers in rounds.items()),
        state=tree.count_bytes(personal),
        optimizer=tree.count_bytes({path: leaf for path, leaf in state.items() if OPTIMIZER in path}),
        moves_base=method.base is not None,
        own_download=method.mixes or differs_by_client(method, server),
        population=population,
        cohort=cohort,
        layer=lora.virtual_paths(adapter, f"{stacked}/b", vlm.sites)[0] if stacked else "",
        noise=noise,
        unreached=method.unreached,
    )
