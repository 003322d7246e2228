"""The shapes that a plan compiles are those of the arrays that training hands to the same function."""

import dataclasses

import jax
import pytest
from jax.sharding import SingleDeviceSharding
from tiny_run import make_folder, tiny_run

from fedvlm_jax.config.run_options import LoraOptions
from fedvlm_jax.federation.round_shapes import shape_examples, shape_round
from fedvlm_jax.training.experiment import make_simulator, open_experiment
from fedvlm_jax.training.loaded_model import load_model


def describe(arguments):
    """Shape, type and place of every leaf; what is on one device only because nobody said otherwise has no place."""

    def place(leaf):
        sharding = getattr(leaf, "sharding", None)
        return None if isinstance(sharding, SingleDeviceSharding) else sharding

    leaves, structure = jax.tree.flatten(arguments)
    return structure, [(leaf.shape, leaf.dtype, place(leaf)) for leaf in leaves]


@pytest.mark.parametrize(
    ("objective", "method", "targets", "cached"),
    [
        ("sft", "plora", None, True),
        # Pairs with a reference, and a base that the server moves; then an adapter that reaches into what is seen.
        pytest.param("dpo", "flora", None, True, marks=pytest.mark.slow),
        pytest.param("sft", "ditto", r"image_projector/image_projection", False, marks=pytest.mark.slow),
    ],
)
def test_shapes_are_those_of_training(objective, method, targets, cached, tmp_path):
    lora = LoraOptions(rank=2) if targets is None else LoraOptions(rank=2, targets=targets)
    run = tiny_run(make_folder(tmp_path / "model"), tmp_path / "run", objective=objective, method=method, lora=lora)
    run = dataclasses.replace(run, system=dataclasses.replace(run.system, mesh="clients=1"))
    loaded = load_model(run)
    experiment = open_experiment(run, loaded)
    simulator = make_simulator(experiment)
    read = simulator.read_round(1)
    if not experiment.objective.pairs:  # the rejected answers that these data have are read by nobody
        rest = {name: array for name, array in read.clients.examples.items() if name != "rejected_labels"}
        read = read._replace(clients=read.clients._replace(examples=rest))
    expected = simulator._arguments(read, {"a": 1e-3, "b": 1e-3})

    batch = read.clients.examples
    example = shape_examples(
        loaded.vlm,
        experiment.objective,
        experiment.spec,
        size=loaded.processor.size,
        prompt=batch["input_ids"].shape[-1],
        answer=batch["labels"].shape[-1],
        cached=True,
    )
    assert ("image_features" in example) == cached
    assert set(example) == set(batch)
    for name in set(example) & {"rejected_labels"}:  # their length is the data's
        example[name] = jax.ShapeDtypeStruct(batch[name].shape[3:], example[name].dtype)
    shapes = shape_round(simulator.programs, loaded.vlm, experiment.spec, simulator.layout, example)
    assert describe(shapes) == describe(expected)
