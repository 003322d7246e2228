"""What a device holds of Florence-2-base when `--mesh clients=2,model=M` cuts it: bytes by program, from compiling.

    python benchmarks/cut_base.py

Nothing is computed and no weights are made: the programs are compiled for forced host devices from shapes alone, and
XLA says what each device is given (arguments, with the base among them) and what it needs beside that (temporaries).
Two clients train side by side, pLoRA of rank 8 on the language model, batches of two pictures of 768x768 with their 577
tokens. Ends with an error if a device is given more of the base than its share, or if a weight that is cut is made
whole in a program.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness.command import name_command
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import Florence2Config

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "federation"))
from program_check import find_gathered  # noqa: E402  it also asks for eight devices

from fedvlm_jax import lora  # noqa: E402
from fedvlm_jax.distributed.mesh import CLIENTS, make_mesh  # noqa: E402
from fedvlm_jax.distributed.sharding import cut_base, wave_sharding  # noqa: E402
from fedvlm_jax.evaluation.evaluator import make_answer  # noqa: E402
from fedvlm_jax.federation.inputs.reference_log_probs import make_score  # noqa: E402
from fedvlm_jax.federation.local_training import make_local_trainer  # noqa: E402
from fedvlm_jax.federation.round import make_round  # noqa: E402
from fedvlm_jax.federation.round_shapes import shape_client  # noqa: E402
from fedvlm_jax.methods import Client, Setup, load_method  # noqa: E402
from fedvlm_jax.models import Stacking, Vlm  # noqa: E402
from fedvlm_jax.models.florence2 import build  # noqa: E402
from fedvlm_jax.objectives import load_objective  # noqa: E402
from fedvlm_jax.run_dir.artifacts import describe_environment  # noqa: E402
from fedvlm_jax.utils.files import write_json  # noqa: E402

SHARES, ROWS, STEPS, BATCH, PICTURE, PROMPT, ANSWER = 2, 8, 4, 2, 577, 600, 64
VOCABULARY = 51_289
MIB = 2**20
Shape = jax.ShapeDtypeStruct


def main() -> None:
    """Compile for one, two and four devices a base, and say what came out."""
    found = {f"clients={SHARES},model={model}": measure(model) for model in (1, 2, 4)}
    result = {"command": name_command(), "mib_per_device": found}
    (HERE / "results").mkdir(exist_ok=True)
    write_json(HERE / "results" / "cut_base.json", {**result, **describe_environment()})
    print(json.dumps(result, indent=1))


def make_model() -> Vlm:
    """Florence-2-base, layers recomputed in the backward pass."""
    text = {
        "model_type": "bart",
        "vocab_size": VOCABULARY,
        "d_model": 768,
        **{f"{half}_layers": 6 for half in ("encoder", "decoder")},
        **{f"{half}_attention_heads": 12 for half in ("encoder", "decoder")},
        **{f"{half}_ffn_dim": 3072 for half in ("encoder", "decoder")},
        "max_position_embeddings": 1024,
        "decoder_start_token_id": 2,
    }
    vision = {"projection_dim": 768}
    return build(
        Florence2Config(vision_config=vision, text_config=text, image_token_id=VOCABULARY - 1),
        stacking=Stacking(remat=True),
    )


def measure(model: int) -> dict[str, Any]:
    """MiB per device: of the base, and of each program its arguments and temporaries."""
    vlm, mesh = make_model(), make_mesh(SHARES, model)
    params = jax.tree.map(lay, vlm.shapes(), cut_base(mesh, vlm.shapes(), vlm.cuts))
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params))
    report: dict[str, Any] = {"base": round(4 * held / MIB, 1)}
    for name, lowered in lower(vlm, mesh, params).items():
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        report[name] = {
            "arguments": round(memory.argument_size_in_bytes / MIB, 1),
            "temporaries": round(memory.temp_size_in_bytes / MIB, 1),
        }
        if gathered := find_gathered(compiled.as_text(), vlm.shapes(), vlm.cuts):
            sys.exit(f"model={model}, {name}: weights of these shapes are made whole: {gathered}")
    return report


def lower(vlm: Vlm, mesh: Mesh, params: Any) -> dict[str, Any]:
    """The programs that read the base, by name."""
    everywhere, across = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(CLIENTS))
    spec = lora.LoRA(rank=8, targets=vlm.targets)
    trainer = make_local_trainer(vlm, load_objective("sft"))
    method = load_method("plora", Setup(sites=vlm.sites, spec=spec, start_optimizer=trainer.start))
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(1), vlm.sites, spec))
    server = place(jax.eval_shape(lambda: method.init(adapter=adapter)), everywhere)
    key, number = jax.random.key(0), jnp.int32(0)
    personal = jax.eval_shape(lambda server: method.init_client(key=key, server=server, number=number), server)
    waves, rates = wave_sharding(mesh), {name: Shape((), jnp.float32) for name in "ab"}
    clients = place(make_client(), waves, 1, SHARES)
    drawn = (Shape((SHARES,), jnp.float32), rates, Shape((), jnp.int32), jax.random.key(2))
    batch, flat = place(make_batch(), across, SHARES, BATCH), place(make_batch(), across, SHARES * BATCH)
    pairs, flat = ({**rows, "rejected_labels": rows["labels"]} for rows in (batch, flat))
    run, see = (
        make_round(method, trainer, mesh),
        jax.jit(lambda params, pixels: vlm.image_features(params, None, pixels)),
    )
    return {
        "round": run.lower(params, server, place(personal, waves, 1, SHARES), clients, *drawn),
        "answers": make_answer(vlm, 16).lower(params, place(adapter, across, SHARES), pairs),
        "reference": make_score(vlm).lower(params, flat),
        "features": see.lower(params, Shape((BATCH, 768, 768, 3), jnp.float32)),
    }


def make_batch() -> dict[str, Shape]:
    """An example."""
    return {
        "image_features": Shape((PICTURE, 768), jnp.float32),
        **{name: Shape((PROMPT,), jnp.int32) for name in ("input_ids", "attention_mask")},
        "labels": Shape((ANSWER,), jnp.int32),
    }


def make_client() -> Client:
    """A client's data of a round."""
    return shape_client(make_batch(), ROWS, STEPS, BATCH)


def place(shapes: Any, sharding: NamedSharding | None, *leading: int) -> Any:
    """The same shapes with axes before them, lying so."""
    return jax.tree.map(lambda leaf: lay(Shape((*leading, *leaf.shape), leaf.dtype), sharding), shapes)


def lay(leaf: Shape, sharding: NamedSharding | None) -> Shape:
    """The same shape, lying so."""
    return Shape(leaf.shape, leaf.dtype, sharding=sharding)


if __name__ == "__main__":
    main()
