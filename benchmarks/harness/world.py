"""A round's data and initial adapter, the same for whoever runs it: this package, or a PyTorch + PEFT loop.

Pictures are there twice, as pixels and as the frozen tower's features of them; who runs a round reads one of both.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from fedvlm_jax import lora
from fedvlm_jax.federation.cohort import make_clients
from fedvlm_jax.federation.inputs.batch_reader import make_inputs
from fedvlm_jax.federation.round import from_waves
from fedvlm_jax.federation.simulator import Simulator
from fedvlm_jax.models import Vlm
from fedvlm_jax.training.experiment import Experiment
from fedvlm_jax.utils import tree


@dataclass(frozen=True)
class Settings:
    """The adapter and its optimiser, AdamW without decay."""

    rank: int = 8
    alpha: float = 16.0
    rate_a: float = 5e-3
    rate_b: float = 2e-3
    clip_norm: float = 1.0
    targets: str = ""
    """Of the adapters; the model's default where it is empty."""


SETTINGS = Settings()


@dataclass(frozen=True)
class Shape:
    """How much a round does: clients, local steps of each, and examples of a step."""

    clients: int
    steps: int
    batch: int

    @property
    def examples(self) -> int:
        """Examples that a round reads."""
        return self.clients * self.steps * self.batch


@dataclass(frozen=True)
class World:
    """A round's work.

    Attributes:
        shape: how much it is.
        examples: name -> [K, M, …], the model's batch row by row, with both `pixel_values` and `image_features`.
        indices: [K, S, B], rows of each local step; all of them count.
        weights: [K], of the average; Σ = 1.
        start: path -> factor, what all clients start from.
        settings: of adapter and optimiser.
        modules: path of a site of the adapter -> what PEFT calls its layers.
    """

    shape: Shape
    examples: Mapping[str, np.ndarray]
    indices: Int[np.ndarray, "clients steps batch"]
    weights: Float[np.ndarray, " clients"]
    start: Mapping[str, np.ndarray]
    settings: Settings
    modules: Mapping[str, Sequence[str]]


def start_factors(vlm: Vlm, settings: Settings) -> dict[str, np.ndarray]:
    """path -> factor of a fresh adapter, without its scales: B is zero, as users start."""
    spec = lora.LoRA(settings.rank, settings.alpha, settings.targets or vlm.targets)
    fresh = lora.init(jax.random.key(3), vlm.sites, spec)
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(fresh).items() if not path.endswith("scale")}


def name_modules(vlm: Vlm, targets: str = "") -> dict[str, list[str]]:
    """Path of a site -> the names that its layers' modules have in transformers, by the family's table.

    Args:
        vlm: the model.
        targets: of the adapter; the model's default where it is empty.
    """
    named = {}
    for site in lora.select(vlm.sites, targets or vlm.targets):
        names = vlm.table.find_names(site.weight, site.stack[0])
        named[site.path] = [f"{vlm.table.prefix}{name}".removesuffix(".weight") for name, _ in names]
    return named


def read_world(experiment: Experiment, simulator: Simulator, settings: Settings = SETTINGS) -> World:
    """The first round of a federation that is ready to run, with its clients' own rows."""
    layout, examples, model = experiment.layout, experiment.examples, experiment.model
    features, pixels = experiment.inputs, make_inputs(examples, model.processor, None)
    numbers = simulator.read_round(1).numbers
    clients, weights = make_clients(
        experiment.run.seed, 1, numbers, examples, lambda rows: features(rows) | pixels(rows), layout, "uniform"
    )
    clients = from_waves(clients)
    if not clients.mask.all():
        raise ValueError("a client has fewer examples than a round's batches")
    shape = Shape(len(numbers), layout.steps, layout.batch)
    start, modules = start_factors(model.vlm, settings), name_modules(model.vlm, settings.targets)
    return World(shape, clients.examples, clients.indices, weights[: len(numbers)], start, settings, modules)


def draw_world(
    vlm: Vlm,
    params: Any,
    shape: Shape,
    *,
    size: tuple[int, int],
    prompt: int,
    answer: int,
    settings: Settings = SETTINGS,
) -> World:
    """Random pictures, prompts and answers for a model of any shape.

    Args:
        vlm, params: the model; its features of the pictures are computed here.
        shape: of the round.
        size: height and width of the pictures.
        prompt: tokens after the image tokens.
        answer: tokens of an answer.
        settings: of adapter and optimiser.
    """
    random = np.random.default_rng(0)
    count, tokens = shape.steps * shape.batch, vlm.image_tokens(*size)
    rows, image = (shape.clients, count), vlm.image_token_id

    # Between the special tokens: Florence-2's are the first, those of models that chat the last.
    lowest, highest = (max(10, image + 1), vlm.vocabulary) if image < vlm.vocabulary // 2 else (10, image)

    def words(length: int) -> np.ndarray:
        return random.integers(lowest, highest, (*rows, length)).astype(np.int32)

    ids = np.concatenate([np.full((*rows, tokens), image, np.int32), words(prompt)], axis=-1)
    pixels = random.normal(size=(*rows, *size, 3)).astype(np.float32)
    see = jax.jit(lambda params, pixels: vlm.image_features(params, None, pixels))
    features = np.stack([np.concatenate([see(params, one[None]) for one in client]) for client in jnp.asarray(pixels)])
    examples = {
        "pixel_values": pixels,
        "image_features": features.astype(np.float32),
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "labels": words(answer),
    }
    indices = np.broadcast_to(
        np.arange(count, dtype=np.int32).reshape(shape.steps, shape.batch), (shape.clients, shape.steps, shape.batch)
    )
    weights = np.full(shape.clients, 1 / shape.clients, np.float32)
    start, modules = start_factors(vlm, settings), name_modules(vlm, settings.targets)
    return World(shape, examples, indices, weights, start, settings, modules)


def take_clients(world: World, count: int) -> World:
    """Return the same world of its first clients alone, whose weights sum to 1 again."""
    weights = world.weights[:count]
    return dataclasses.replace(
        world,
        shape=dataclasses.replace(world.shape, clients=count),
        examples={name: rows[:count] for name, rows in world.examples.items()},
        indices=world.indices[:count],
        weights=weights / weights.sum(),
    )


def write_world(world: World, path: Path) -> None:
    """Write a world as one `.npz` that needs nothing of this package to be read."""
    examples = {f"example/{name}": array for name, array in world.examples.items()}
    start = {f"start/{name}": factor for name, factor in world.start.items()}
    texts = {"settings": json.dumps(dataclasses.asdict(world.settings)), "modules": json.dumps(world.modules)}
    np.savez(path, indices=world.indices, weights=world.weights, **texts, **examples, **start)  # type: ignore[arg-type]
