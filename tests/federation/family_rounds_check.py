"""Compiles the rounds of tiny models of all families, runs nothing, and prints what the programs hold as JSON.

Arguments: cases of `models.causal_cases` and `models.clip_cases`, `llava`; or `llava:tower`, with adapters in the
tower, too. `test_family_rounds.py` reads what is printed: a device count is fixed when jax starts, so this
cannot happen inside the process of the tests.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
from models import causal_cases, clip_cases
from program_check import find_gathered  # it also asks for devices, before jax starts

from fedvlm_jax import lora
from fedvlm_jax.analysis.collectives import KINDS, find_collectives, read_program
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import cut_base
from fedvlm_jax.federation.cohort import Layout
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.federation.round_shapes import shape_examples, shape_round
from fedvlm_jax.methods import Setup, load_method
from fedvlm_jax.models import Stacking, read_size, read_vlm
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.utils import tree

CLIENTS = 11
"""Clients that a device trains side by side: a number that no axis of the models has."""

MESH = make_mesh(2, 2)
LAYOUT = Layout(cohort=4 * CLIENTS, wave=2 * CLIENTS, waves=2, rows=2, steps=2, batch=2)
CASES = {**causal_cases.CASES, **clip_cases.CASES}
# Not patches: a convolution with a kernel per client is not spread over devices, each is sent the pictures of all. Nor
# positions, of which an adapter's term is as large as the weight itself.
TOWER = "vision_tower/(?!patch_embed|position)"


def read(case):
    """The model, whose layers are a loop as those of real ones are, and the size of its pictures."""
    with TemporaryDirectory() as folder:
        CASES[case](Path(folder))
        return read_vlm(folder, stacking=Stacking(unroll=0)), read_size(folder)


def compile_round(vlm, size, targets):
    """The text of the program in which clients train adapters at `targets`, as pLoRA has it."""
    spec, objective = lora.LoRA(rank=2, targets=targets), load_objective("sft")
    trainer = make_local_trainer(vlm, objective, optimizer="sgd")  # compiles in two thirds of AdamW's time
    places = LAYOUT.places
    setup = Setup(sites=vlm.sites, spec=spec, start_optimizer=trainer.start, cohort=places, places=places, rounds=2)
    programs = Programs(load_method("plora", setup), trainer, MESH)
    prompt = vlm.image_tokens(*size) + 3
    example = shape_examples(vlm, objective, spec, size=size, prompt=prompt, answer=3, cached=True)
    return programs.compile_round(shape_round(programs, vlm, spec, LAYOUT, example), phase=0).as_text()


def find_copies(text, vlm):
    """Shapes in the program that are a base weight, whole or a device's part of it, once per client."""
    places, forbidden = tree.flatten(cut_base(MESH, vlm.shapes(), vlm.cuts)), set()
    for path, leaf in tree.flatten(vlm.shapes()).items():
        if path.endswith(("kernel", "embedding")):
            for shape in (leaf.shape, places[path].shard_shape(leaf.shape)):
                forbidden |= {tuple(sorted((CLIENTS, *held))) for held in (shape, shape[-2:])}
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[(\d+(?:,\d+)+)\]", text)}
    return sorted(shape for shape in shapes if tuple(sorted(d for d in shape if d > 1)) in forbidden)


def find_moves(text):
    """What devices send each other inside of the loops over waves, steps and layers, all-reduces left out."""
    entry, computations = read_program(text)
    inside = [line for name, lines in computations.items() if name != entry for line in lines.values()]
    kinds = {*KINDS} - {"all-reduce"}
    return [f"{line.op} {line.result}" for line in inside if line.op.removesuffix("-start") in kinds]


def describe(vlm, text):
    """What is looked for in a program."""
    found, _ = find_collectives(text, MESH)
    return {
        "kind": vlm.config.model_type,
        "between_clients": {it.kind: it.runs_per_round for it in found if "clients" in it.axes},
        "inside": find_moves(text),
        "gathered": find_gathered(text, vlm.shapes(), vlm.cuts),
        "copies": find_copies(text, vlm),
    }


def main():
    found = {}
    for name in sys.argv[1:]:
        case, _, tower = name.partition(":")
        vlm, size = read(case)
        targets = f"{vlm.targets}|{TOWER}" if tower else vlm.targets
        found[name] = describe(vlm, compile_round(vlm, size, targets))
    # Controls: one head of keys and values that is cut in two costs gathers, and with the base under vmap as well the
    # search finds copies.
    vlm, size = read("smolvlm-tied")
    through = dataclasses.replace(vlm, cuts=tuple(cut._replace(units=None) for cut in vlm.cuts))
    found["control"] = describe(through, compile_round(through, size, r"layers/self_attn/q_proj"))
    weights = vlm.shapes()["language_model"]["embed_tokens"]["embedding"]
    each = [jax.ShapeDtypeStruct((CLIENTS, *shape), weights.dtype) for shape in (weights.shape, weights.shape[1:])]
    batched = jax.jit(jax.vmap(lambda weights, x: jnp.tanh(weights @ x))).lower(*each).compile()
    found["control"]["copies"] = find_copies(batched.as_text(), vlm)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
