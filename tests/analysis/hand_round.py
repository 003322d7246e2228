"""FedAvg of a LoRA adapter as one writes it by hand with jax and optax, compiled for a TPU pod that is not there.

    PYTHONPATH=src:tests python tests/analysis/hand_round.py '{"topology": "v5e:2x2", "model": "florence2-base", ...}'

Of fedvlm_jax only the model's forward is in it (`read_vlm`, and a LoRA tree for it to take): no method, no local
trainer, no compiled round, no layout, and nothing that reads what a compiler says. The base and the server's adapter
are replicated, clients lie along the mesh, every device trains its own side by side, and both factors are averaged by
one `psum`. AdamW's states stay with their clients and are written over.

Prints as JSON what the compiler says of its memory, and the all-reduces that stand in the program: the text is read
here with two regular expressions.
"""

import json
import math
import os
import re
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedvlm_jax import lora
from fedvlm_jax.models import Stacking, read_vlm

SCALE = 2.0  # alpha / rank
WIDTHS = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}


def main() -> None:
    """Compile the round that the first argument describes."""
    compiled = compile_round(**json.loads(sys.argv[1]))
    stats = compiled.memory_analysis()
    found = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliases": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
        "all_reduces": find_all_reduces(compiled.as_text()),
    }
    sys.stdout.write(json.dumps(found) + "\n")


def compile_round(
    topology: str,
    model: str,
    *,
    clients: int,
    steps: int,
    batch: int,
    prompt: int,
    answer: int,
    rank: int,
    targets: str,
    returned: bool,
) -> Any:
    """One round of FedAvg, compiled.

    Args:
        topology, model: names.
        clients: on every chip, side by side.
        steps, batch: of a client.
        prompt, answer: tokens, the picture's among those of the prompt.
        rank, targets: of the adapter.
        returned: hand back what every client learned too, as a server has it that looks at its clients.
    """
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(list(described.devices), "clients")
    everywhere, spread = PartitionSpec(), PartitionSpec("clients")
    vlm = read_vlm(model, compute_dtype=jnp.bfloat16, stacking=Stacking(remat=True))
    pictures = vlm.image_tokens(768, 768)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-3, weight_decay=0.0))

    def loss(factors: Any, base: Any, batch: dict[str, jax.Array]) -> jax.Array:
        adapter = join(factors)
        logits = vlm.logits(base, adapter, batch)
        labels = batch["labels"]
        counts = labels != -100
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return (losses * counts).sum() / jnp.maximum(counts.sum(), 1)

    def train(base: Any, server: Any, state: Any, examples: dict[str, jax.Array]) -> tuple[Any, Any, jax.Array]:
        def step(carry: tuple[Any, Any], batch: dict[str, jax.Array]) -> tuple[tuple[Any, Any], jax.Array]:
            factors, state = carry
            value, gradient = jax.value_and_grad(loss)(factors, base, batch)
            update, state = optimizer.update(gradient, state, factors)
            return (optax.apply_updates(factors, update), state), value

        (factors, state), values = jax.lax.scan(step, (server, state), examples)
        return jax.tree.map(jnp.subtract, factors, server), state, values.mean()

    def chip(base: Any, server: Any, states: Any, examples: Any, weights: jax.Array) -> Any:
        """What one chip does: `examples` [clients, steps, batch, …] and `weights` [clients] are its own."""
        updates, states, losses = jax.vmap(train, in_axes=(None, None, 0, 0))(base, server, states, examples)
        mean = jax.tree.map(lambda update: jnp.tensordot(weights, update, axes=1), updates)
        mean = jax.lax.psum(mean, "clients")
        return jax.tree.map(jnp.add, server, mean), states, losses, *([updates] if returned else [])

    outputs = (everywhere, spread, spread, *([spread] if returned else []))
    inputs = (everywhere, everywhere, spread, spread, spread)
    round_ = jax.shard_map(chip, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

    def shape(dims: tuple[int, ...], dtype: Any, where: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, where))

    everyone = clients * len(described.devices)
    # Of the base, what reads features and texts.
    base = jax.tree.map(
        lambda x: shape(x.shape, x.dtype, everywhere), {"language_model": vlm.shapes()["language_model"]}
    )
    server = jax.tree.map(lambda x: shape(x.shape, x.dtype, everywhere), shape_factors(vlm, rank, targets))
    state = jax.eval_shape(optimizer.init, server)
    states = jax.tree.map(lambda x: shape((everyone, *x.shape), x.dtype, spread), state)
    width = vlm.config.text_config.d_model
    rows = (everyone, steps, batch)
    examples = {
        "image_features": shape((*rows, pictures, width), jnp.bfloat16, spread),
        "input_ids": shape((*rows, prompt), jnp.int32, spread),
        "attention_mask": shape((*rows, prompt), jnp.int32, spread),
        "labels": shape((*rows, answer), jnp.int32, spread),
    }
    weights = shape((everyone,), jnp.float32, spread)
    return jax.jit(round_, donate_argnums=2).lower(base, server, states, examples, weights).compile()


def shape_factors(vlm: Any, rank: int, targets: str) -> Any:
    """Shapes of A and B alone, each under its path."""
    spec = lora.LoRA(rank, SCALE * rank, targets)
    adapter = jax.eval_shape(lambda key: lora.init(key, vlm.sites, spec), jax.eval_shape(lambda: jax.random.key(0)))
    return split(adapter)


def split(adapter: Any) -> Any:
    """A tree without its leaves `scale`."""
    if isinstance(adapter, dict):
        return {name: split(inner) for name, inner in adapter.items() if name != "scale"}
    return adapter


def join(factors: Any) -> Any:
    """The adapter again: a `scale` beside every pair, one per layer where layers are stacked."""
    if "a" not in factors:
        return {name: join(inner) for name, inner in factors.items()}
    return {**factors, "scale": jnp.full(factors["a"].shape[:-2], SCALE, jnp.float32)}


def find_all_reduces(text: str) -> list[dict[str, Any]]:
    """All that stand in the program: bytes told, and whether it is in its entry, which runs once."""
    found: list[dict[str, Any]] = []
    entry = False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        if (told := re.search(r" = (.*?) all-reduce(?:-start)?\(", line)) is not None:
            arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", told[1])
            size = sum(WIDTHS[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays)
            found.append({"bytes": size, "arrays": len(arrays), "entry": entry})
    return found


if __name__ == "__main__":
    main()
