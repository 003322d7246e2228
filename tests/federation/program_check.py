"""Runs by itself with eight forced host devices and prints what it found as JSON; `test_compiled.py` reads that.
Arguments: a method, an objective and the meshes (clients x waves, or clients x waves x model) to hold against one
device, `plora/dpo=4x2,4x2x2`; `smolvlm:plora/sft=4x2` of another family than Florence-2.

A device count is fixed when jax starts, so this cannot happen inside the process of the tests.
"""

import json
import os
import re
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from transformers import BartConfig, Florence2Config, SmolVLMConfig

from fedvlm_jax import lora
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import place_base, place_waves, replicate
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.federation.round import make_round, to_waves
from fedvlm_jax.methods import Client, Setup, load_method
from fedvlm_jax.models import florence2, smolvlm
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.utils import tree

CLIENTS, ROWS, STEPS, BATCH, TOKENS, LABELS = 8, 6, 2, 3, 9, 5
WIDTH, HIDDEN, VOCABULARY, LAYERS = 20, 28, 44, 2
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def make_florence2():
    text = BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN, max_position_embeddings=16,
        decoder_start_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    vision = {
        "embed_dim": [8], "depths": [1], "num_heads": [2], "num_groups": [2], "patch_size": [3], "patch_stride": [4],
        "patch_padding": [1], "patch_prenorm": [False], "window_size": 2, "projection_dim": WIDTH,
        "max_position_embeddings": 4, "max_temporal_embeddings": 1,
    }  # fmt: skip
    return florence2.build(Florence2Config(text_config=text, vision_config=vision, image_token_id=43))


def make_smolvlm():
    text = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": 1, "pad_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    config = SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=43, scale_factor=1)
    return smolvlm.build(config, dtype=jnp.float32)


MODELS = {"florence2": make_florence2, "smolvlm": make_smolvlm}
TARGETS = {"florence2": r"language_model/.*(proj|fc1|fc2)", "smolvlm": r"language_model/layers/.*proj"}


def make_cohort():
    rng = np.random.default_rng(0)
    rows = (CLIENTS, ROWS)
    return Client(
        examples={
            "image_features": rng.normal(size=(*rows, 3, WIDTH)).astype(np.float32),
            "input_ids": np.concatenate(
                [np.full((*rows, 3), 43), rng.integers(3, 40, (*rows, TOKENS - 3))], axis=-1
            ).astype(np.int32),
            "attention_mask": np.ones((*rows, TOKENS), np.int32),
            "labels": rng.integers(3, 40, (*rows, LABELS)).astype(np.int32),
            "rejected_labels": rng.integers(3, 40, (*rows, LABELS + 1)).astype(np.int32),
            "reference_chosen": rng.normal(-20, 1, rows).astype(np.float32),
            "reference_rejected": rng.normal(-24, 1, rows).astype(np.float32),
        },
        indices=rng.integers(0, ROWS, (CLIENTS, STEPS, BATCH)).astype(np.int32),
        mask=np.ones((CLIENTS, STEPS, BATCH), bool),
        weight=np.full(CLIENTS, 1 / CLIENTS, np.float32),
        number=np.arange(CLIENTS, dtype=np.int32),
        new=np.ones(CLIENTS, bool),
        share=np.full(CLIENTS, 1 / CLIENTS, np.float32),
    )


def run(case, vlm, params, clients, waves, model=1):
    """-> the server's and clients' adapters after one round, and the compiled program."""
    spec = lora.LoRA(rank=2, targets=TARGETS[vlm.family])
    name, _, objective = case.partition("/")
    trainer = make_local_trainer(vlm, load_objective(objective))
    setup = Setup(sites=vlm.sites, spec=spec, start_optimizer=trainer.start, cohort=CLIENTS, places=CLIENTS, rounds=2)
    method = load_method(name, setup)
    mesh = make_mesh(clients, model)
    server = method.init(adapter=lora.init(jax.random.key(1), vlm.sites, spec))
    shapes = jax.eval_shape(lambda: method.init_client(key=jax.random.key(0), server=server, number=jnp.int32(0)))
    states = jax.tree.map(lambda x: np.zeros((CLIENTS, *x.shape), x.dtype), shapes)
    arguments = (
        place_base(mesh, params, vlm.cuts),
        replicate(mesh, server),
        place_waves(mesh, to_waves(states, waves)),
        place_waves(mesh, to_waves(make_cohort(), waves)),
        jnp.full(CLIENTS, 1 / CLIENTS),
        {"a": jnp.float32(5e-3), "b": jnp.float32(2e-3)},
        jnp.int32(1),
        jax.random.key(2),
    )
    compiled = make_round(method, trainer, mesh).lower(*arguments).compile()
    out = compiled(*arguments)
    own = out.personal.get("own", {})  # what flora keeps of a client is nothing
    own = jax.tree.map(lambda x: np.swapaxes(np.asarray(x), 0, 1).reshape(-1, *x.shape[2:]), own)
    return tree.flatten({"server": out.server, "own": own}), compiled


def distance(one, other):
    """Between two leaves: the root of the mean square."""
    return float(np.sqrt(np.mean(np.square(np.asarray(one, np.float64) - np.asarray(other)))))


def count_collectives(text, model):
    """How many of each kind there are, those left out that stay among the `model` devices of one share of clients."""
    counts = dict.fromkeys(COLLECTIVES, 0)
    for line in text.splitlines():
        found = re.search(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if found and any(len({device // model for device in group}) > 1 for group in read_groups(line)):
            counts[found[1]] += 1
    return counts


def read_groups(line):
    """Who talks to whom in a collective, in any of the three ways of writing it, or a KeyError."""
    if pairs := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})?\}", line):
        groups = re.findall(r"\{([\d,]+)\}", pairs[1] or "")
        return [list(map(int, group.split(","))) for group in groups] or [list(range(8))]
    if flat := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)[, ]", line):
        return read_order(flat[2]).reshape(json.loads(flat[1])).tolist()
    by_axes = re.search(r"replica_groups=mesh\[(\S+?)\](?:, device_ids=\((\S+)\))? \{('\w+'(?:,'\w+')*)\}[, ]", line)
    if not by_axes:
        raise KeyError(line)
    sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", by_axes[1])}
    order = read_order(by_axes[2]) if by_axes[2] else np.arange(np.prod(list(sizes.values())))
    inside = [list(sizes).index(name) for name in by_axes[3].split(",")]
    moved = np.moveaxis(order.reshape(list(sizes.values())), inside, range(-len(inside), 0))
    return moved.reshape(-1, int(np.prod([moved.shape[-n - 1] for n in range(len(inside))]))).tolist()


def read_order(text):
    """`[4,2]T(1,0)`: the numbers of the devices, laid out so and transposed so."""
    shape, _, axes = text.partition("T")
    order = np.arange(np.prod(json.loads(shape))).reshape(json.loads(shape))
    return order.transpose(json.loads(axes.replace("(", "[").replace(")", "]"))) if axes else order


def find_gathered(text, params, cuts):
    """Weights that are cut and that an all-gather makes whole, all layers at once or one."""
    whole = set()
    for path, leaf in tree.flatten(params).items():
        if path.endswith(("kernel", "embedding")) and any(re.fullmatch(pattern, path) for pattern, _, _ in cuts):
            whole |= {tuple(sorted(leaf.shape)), tuple(sorted(leaf.shape[-2:]))}
    found = []
    for line in text.splitlines():
        if results := re.search(r"= (.*?) all-gather(?:-start|-done)?\(", line):
            shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[(\d+(?:,\d+)*)\]", results[1])]
            found += [shape for shape in shapes if tuple(sorted(d for d in shape if d > 1)) in whole]
    return found


def find_copies(text, params):
    """Shapes in the program that are a base weight once per client, whatever the order of the axes."""
    base = set()
    for path, leaf in tree.flatten(params["language_model"]).items():
        if path.endswith(("kernel", "embedding")):
            base.add(tuple(leaf.shape[-2:]))
            base.add(tuple(leaf.shape))
    forbidden = {tuple(sorted((CLIENTS, *shape))) for shape in base}
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[(\d+(?:,\d+)+)\]", text)}
    return sorted(shape for shape in shapes if tuple(sorted(d for d in shape if d > 1)) in forbidden)


def main():
    found, models = {}, {}
    for argument in sys.argv[1:]:
        name, _, meshes = argument.partition("=")
        family, _, case = f"florence2:{name}".rpartition(":")
        family = family.rpartition(":")[2]
        if family not in models:
            vlm = MODELS[family]()
            models[family] = vlm, vlm.init(jax.random.key(0))
        vlm, params = models[family]
        alone, program = run(case, vlm, params, 1, 1)
        text = program.as_text()
        entry = {"copies": find_copies(text, params), "dots": len(re.findall(r" dot\(", text)), "meshes": {}}
        for mesh in meshes.split(","):
            clients, waves, model = map(int, [*mesh.split("x"), "1"][:3])
            other, program = run(case, vlm, params, clients, waves, model)
            # Not the largest: Adam makes much of the rounding of the one gradient that is nearly nothing.
            errors = {path: distance(other[path], leaf) for path, leaf in alone.items()}
            entry["meshes"][mesh] = {
                "error": max(errors.values()),
                "collectives": count_collectives(program.as_text(), model),
                "gathered": find_gathered(program.as_text(), params, vlm.cuts),
                "argument_bytes": program.memory_analysis().argument_size_in_bytes,
            }
        found[name] = entry
    # Controls: with the base under vmap as well the search must find copies, and where a weight is made whole a gather.
    batched = jax.jit(jax.vmap(lambda params, x: jax.grad(lambda x: jnp.sum((x @ params) ** 2))(x), in_axes=(0, 0)))
    vlm, params = models["florence2"]
    weights = params["language_model"]["encoder"]["layers"]["fc1"]["kernel"][0]
    text = batched.lower(jnp.stack([weights] * CLIENTS), jnp.ones((CLIENTS, BATCH, WIDTH))).compile().as_text()
    mesh = make_mesh(4, 2)
    whole = jax.jit(lambda params: jax.tree.map(jnp.sin, params), out_shardings=NamedSharding(mesh, PartitionSpec()))
    gathering = whole.lower(place_base(mesh, params, vlm.cuts)).compile().as_text()
    found["control"] = {"copies": find_copies(text, params), "gathered": find_gathered(gathering, params, vlm.cuts)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
