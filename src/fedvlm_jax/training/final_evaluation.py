"""The numbers a run ends with: of every client's own model, the global one, newcomers, and each on others' data."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.data.config import Split
from fedvlm_jax.distributed.sharding import fetch
from fedvlm_jax.evaluation.evaluator import Adapters, Scored, Scores
from fedvlm_jax.evaluation.gold_answers import read_gold
from fedvlm_jax.evaluation.knn_per import KERNELS, build_datastores
from fedvlm_jax.evaluation.metrics.text_metrics import exact_match
from fedvlm_jax.evaluation.statistics.over_clients import bootstrap_interval
from fedvlm_jax.training.experiment import Experiment
from fedvlm_jax.utils.progress import working

ScoredModels = dict[str, Mapping[Split, Scored]]
"""model -> split -> how it does for everybody."""

MATRIX = ("exact_match", "token_accuracy", "loss", "preference_accuracy")
"""The metrics of the cross-client matrix."""


def score_base(experiment: Experiment) -> dict[Split, Scored]:
    """Return split -> how the bare base does, for everybody. From then on the evaluator knows what is rewarded."""
    return _evaluate(experiment, experiment.model.params, {"zero_shot": None})["zero_shot"]


def ask_base(experiment: Experiment) -> dict[Split, Scored]:
    """Return what `score_base` finds, asked once for all runs on the same data that score alike."""

    def ask() -> dict[Split, Scored]:
        with working(experiment.show, "asking the bare base (zero-shot), which compiles first"):
            return score_base(experiment)

    return experiment.data.zero_shot(experiment.base_scoring, ask=ask)


def score_models(
    experiment: Experiment,
    params: PyTree,
    personal: Adapters,
    general: Adapters | None,
    zero_shot: Mapping[Split, Scored],
) -> tuple[ScoredModels, dict[str, Any]]:
    """Score the models that a run ends with, for everybody.

    Args:
        experiment: the run.
        params: the base, with what the method added to it.
        personal: every client's own adapters; a held-out client's as it starts.
        general: the shared part with what each client started from; None where nothing is shared.
        zero_shot: what `score_base` found.

    Returns:
        `zero_shot`, `personal` and, where something is shared, `global`: split -> how it does.

        For `results.json`, `neighbours`, where the options ask for them: `share`, how much they count, by client, and
        `kernel`, how by their distance. `generation`: how the answers were generated, and what no model could answer.
        The models' names: split -> metric -> client -> value, of the clients that train. `gain_intervals`: metric ->
        client -> the ends of the 95 % interval of what it gains over zero-shot on test, for the metric that the run is
        judged by. `held_out`, where there are any: their `zero_shot` and `personal`, and the `cold_start`.
        `attack`, where there is one: its kind, and of a backdoor its answer and how often each client's model gives it.
        `cross_clients`, where it is asked for: the clients, and metric -> rows of values, by model down and by data
        across.
    """
    options, results = experiment.run.evaluation, dict[str, Any]()
    if experiment.neighbours is not None:
        kernels = KERNELS if options.neighbour_kernel == "validation" else (options.neighbour_kernel,)
        evaluator, capacity = experiment.evaluator, options.neighbour_capacity
        personal, share, kernel = build_datastores(
            evaluator, experiment.neighbours, params, personal, experiment.scored, capacity, kernels
        )
        results["neighbours"] = {"share": share, "kernel": kernel}
    models: dict[str, Adapters | None] = {"personal": personal}
    same = False
    if general is not None and options.global_model:
        # A single client, as often as a wave has places: programs of this shape are compiled already.
        same = _is_same(personal, general, experiment.scored[:1] * experiment.layout.wave)
        models |= {} if same else {"global": general}
    scored: ScoredModels = {"zero_shot": zero_shot, **_evaluate(experiment, params, models)}
    if same:
        scored["global"] = scored["personal"]
    results |= {**_describe(experiment, scored), **_score_matrix(experiment, params, personal)}
    return scored, {**results, **_describe_attack(experiment, params, personal, scored)}


def _evaluate(
    experiment: Experiment, params: PyTree, models: Mapping[str, Adapters | None]
) -> dict[str, dict[Split, Scored]]:
    everyone = [*experiment.scored, *experiment.scored_newcomers]
    splits = experiment.run.evaluation.splits
    # Each split is read once for all models.
    scored = {split: experiment.evaluator(params, models, split, everyone) for split in splits}
    return {name: {split: scored[split][name] for split in splits} for name in models}


def _is_same(personal: Adapters, general: Adapters, numbers: list[int]) -> bool:
    """Say whether the global model is what these clients have, because their method keeps nothing private."""
    ours, theirs = (fetch(adapters(np.asarray(numbers))) for adapters in (personal, general))
    if jax.tree.structure(ours) != jax.tree.structure(theirs):
        return False  # the personal ones ask their neighbours
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))


def _describe(experiment: Experiment, scored: ScoredModels) -> dict[str, Any]:
    options, clients = experiment.run.evaluation, experiment.examples.clients
    trained = {clients[number].name for number in experiment.judged}
    results: dict[str, Any] = {"generation": {"decoding": options.decoding, **experiment.answering.describe()}}
    results |= {name: _keep(by_split, trained) for name, by_split in scored.items()}
    if experiment.scored_newcomers:
        others = {clients[number].name for number in experiment.scored_newcomers}
        kept = {name: _keep(scored[name], others) for name in ("zero_shot", "personal")}
        results["held_out"] = {"cold_start": options.cold_start, **kept}
    metric = experiment.select_by
    if options.test and metric in scored["zero_shot"]["test"].values:
        personal, base = (scored[name]["test"].values[metric] for name in ("personal", "zero_shot"))
        personal = {client: values for client, values in personal.items() if client in trained}
        results["gain_intervals"] = {metric: read_gains(personal, base)}
    return results


def _describe_attack(
    experiment: Experiment, params: PyTree, personal: Adapters, scored: ScoredModels
) -> dict[str, Any]:
    """Name the attack; of a backdoor say how often honest clients' models fall for it, on marked and plain pictures."""
    kind, options = experiment.run.participation.attack, experiment.run.evaluation
    if kind == "none":
        return {}
    found: dict[str, Any] = {"kind": kind}
    if experiment.backdoor is None or not options.test:
        return {"attack": found}
    examples, answering, evaluator = experiment.examples, experiment.answering, experiment.evaluator
    answer = examples.answers[experiment.backdoor.target]
    most = answering.gold.budget
    target = read_gold([answer], [0], experiment.model.processor, most, answering.settings).texts
    asked = [number for number in experiment.judged if len(examples.clients[number].test)]
    attacked = replace(
        evaluator, inputs=experiment.marked_inputs, metrics=("exact_match",), gold=[target] * len(examples), novel=None
    )
    with_mark = attacked(params, {"personal": personal}, "test", asked, rejected=False)["personal"].texts
    plain = scored["personal"]["test"].texts
    rates: dict[str, dict[str, float]] = {"with_mark": {}, "without_mark": {}}
    for number in asked:
        name, rows = examples.clients[number].name, examples.clients[number].test.tolist()
        # Where the answer is right a model that gives it has not fallen for anything.
        wrong = [exact_match(target, [evaluator.gold[row]])[0] == 0 for row in rows]
        if any(wrong):
            for kind_of, texts in (("with_mark", with_mark), ("without_mark", plain)):
                given = exact_match(texts[name], [target] * len(rows))
                rates[kind_of][name] = float(given[wrong].mean())
    return {"attack": {**found, "target": answer, **rates}}


def _keep(by_split: Mapping[Split, Scored], names: set[str]) -> dict[Split, Scores]:
    return {
        split: {
            metric: {client: value for client, value in values.items() if client in names}
            for metric, values in scored.scores.items()
        }
        for split, scored in by_split.items()
    }


def read_gains(personal: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Estimate what each client gains, by a paired bootstrap over its examples.

    >>> read_gains({"a": np.array([1.0, 1.0])}, {"a": np.array([0.5, 0.5])})
    {'a': [0.5, 0.5]}

    Args:
        personal, base: client -> a metric of the same examples [N], by the client's model and by the base.

    Returns:
        client -> the ends of the 95 % interval of the mean difference; without clients of a single example.
    """
    found = {}
    for client, values in personal.items():
        # The bootstrap sorts by name: these keep the examples' order.
        gains = {f"{place:09d}": float(gain) for place, gain in enumerate(values - base[client])}
        low, high = bootstrap_interval(gains)
        if math.isfinite(low):
            found[client] = [low, high]
    return found


def _score_matrix(experiment: Experiment, params: PyTree, adapters: Adapters) -> dict[str, Any]:
    """Try every participant's model on every participant's test data, all models while a batch is in memory."""
    if not (experiment.run.evaluation.cross_clients and experiment.run.evaluation.test):
        return {}
    clients = experiment.examples.clients
    numbers = [number for number in experiment.judged if len(clients[number].test)]
    names = [clients[number].name for number in numbers]

    def always(number: int) -> Adapters:  # whoever's data are read
        return lambda asked: adapters(np.full(len(asked), number))

    models = {name: always(number) for name, number in zip(names, numbers, strict=True)}
    scored = experiment.evaluator(params, models, "test", numbers)
    scores = {name: scored[name].scores for name in names}
    metrics = [metric for metric in MATRIX if all(len(scores[name].get(metric, {})) == len(names) for name in names)]
    values = {metric: [[scores[model][metric][data] for data in names] for model in names] for metric in metrics}
    return {"cross_clients": {"clients": names, **values}}
