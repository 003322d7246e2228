"""Table of models: the smallest checkpoint of each family, and what a federated round takes of a CPU and of v5e chips.

    python benchmarks/models_table.py                     # all cells that are not there yet, then the tables
    python benchmarks/models_table.py --only SmolVLM      # those of one model
    python benchmarks/models_table.py --table             # the tables of the cells that are there

Of every model config.json alone is read, of its published shape: no weights, no tokenizer, no data. Facts are those of
`fedvlm explain`, memory that of `fedvlm plan` for one CPU device in float32, and for the smallest slice of v5e that
the round fits in bfloat16, which needs the extra `plan` (libtpu) and no TPU; the base is cut over the chips of a slice.
What the base's weights alone pass is not compiled. A cell that is done is a line of `results/models_table.jsonl`, so
this can be killed and started again; `results/models_table.md` is what docs show, and the second table is README's.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from harness.cells import append_line, read_lines
from harness.published import write_config

from fedvlm_jax.analysis.explain import explain
from fedvlm_jax.analysis.tpu_topologies import parse_topology
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.federation.memory import GIB, USABLE
from fedvlm_jax.models import read_size, read_vlm
from fedvlm_jax.utils import tree

HERE = Path(__file__).parent
LINES = HERE / "results" / "models_table.jsonl"
FLORENCE = "microsoft/Florence-2-base"
MODELS = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": "SmolVLM-256M",
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": "LLaVA-OneVision-0.5B",
    "OpenGVLab/InternVL3-1B-hf": "InternVL3-1B",
    "Qwen/Qwen3-VL-2B-Instruct": "Qwen3-VL-2B",
    "google/paligemma2-3b-pt-224": "PaliGemma 2 3B",
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen2.5-VL-3B",
    "google/gemma-3-4b-it": "Gemma 3 4B",
    "llava-hf/llava-1.5-7b-hf": "LLaVA-1.5-7B",
    FLORENCE: "Florence-2-base",
    "openai/clip-vit-base-patch32": "CLIP ViT-B/32",
}
"""Hub id -> short name."""

ROUND = ("--method", "plora", "--rank", "8", "--clients", "4", "--wave", "1")
TRAINING = ("--train.local-steps", "4", "--train.batch-size", "2", "--system.remat")
SIZES = ("--sizes.prompt-tokens", "24", "--sizes.answer-tokens", "16")
OPTIONS = (*ROUND, *TRAINING, *SIZES)
CPU, SLICES = "cpu", ("v5e:1x1", "v5e:2x2", "v5e:2x4")
COMPUTE = {CPU: (), **dict.fromkeys(SLICES, ("--system.compute", "bfloat16"))}


def main() -> None:
    """Do what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models that contain this")
    parser.add_argument("--on", default="", help="facts, cpu or v5e: only these cells")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    chosen = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu is there, a TPU is not
    if not chosen.table:
        with tempfile.TemporaryDirectory() as folder:
            for model in (name for name in MODELS if chosen.only in name):
                measure(model, write_model(model, Path(folder)), chosen.on)
    lines = read_lines(LINES)
    LINES.with_suffix(".md").write_text("\n".join(tabulate(lines)) + "\n", encoding="utf-8")
    print("\n".join([*tabulate(lines), "", *tabulate_short(lines)]))


def write_model(model: str, folder: Path) -> str:
    """What `--model` is given: a folder with config.json alone, or the name of the configuration that ships."""
    if model == FLORENCE:
        return "florence2-base"
    return str(write_config(model, folder / model.rpartition("/")[2]))


def measure(model: str, path: str, only: str) -> None:
    """Make a model's cells that are not there: facts, on a CPU, and on slices of v5e until one is large enough."""

    def missing(kind: str) -> bool:
        return kind.startswith(only) and f"{kind}/{model}" not in read_lines(LINES)

    def keep(kind: str, cell: Mapping[str, Any]) -> None:
        append_line(LINES, {"cell": f"{kind}/{model}", **cell})

    if missing("facts"):
        keep("facts", describe_model(path))
    if missing(CPU):
        keep(CPU, plan(model, path, CPU))
    for slice_ in SLICES:
        if missing(slice_):
            keep(slice_, plan(model, path, slice_))
        if "refused" not in read_lines(LINES).get(f"{slice_}/{model}", {"refused": ""}):
            break  # larger ones are not asked for


def describe_model(path: str) -> dict[str, Any]:
    """Parameters by part, pictures, and what a client of the round trains and sends."""
    vlm, size = read_vlm(path), read_size(path)
    assert size is not None
    counted = Counter[str]()
    for name, leaf in tree.flatten(vlm.shapes()).items():
        counted[vlm.component(name) or "other"] += leaf.size
    (stage,) = explain(Run(model=path)).stages
    tokens = vlm.image_tokens(*size)
    return {"parameters": counted, "picture": size, "image_tokens": tokens, "trained": stage.trained, "sent": stage.up}


def plan(model: str, path: str, topology: str) -> dict[str, Any]:
    """One plan, in a process of its own; what did not fit is a cell too."""
    chip, devices = parse_topology(topology).chip, parse_topology(topology).devices or 1
    words = ["--topology", topology, "--model", path, *OPTIONS, *COMPUTE[topology]]
    words += ["--mesh", f"clients=1,model={devices}"] if devices > 1 else []
    command = " ".join(["fedvlm plan", *words]).replace(path, model)
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(read_vlm(path).shapes()))
    if chip is not None and weights > USABLE * chip.hbm * GIB * devices:
        return {"command": command, "refused": "the base's weights alone are more", "needed": None}
    print(f"{topology}/{model} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        process = [sys.executable, "-m", "fedvlm_jax", "plan", *words, "--out", folder]
        done = subprocess.run(process, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        file = Path(folder) / "plan.json"
        if file.exists():
            made = json.loads(file.read_text())
            kept = ("mesh", "layout", "example", "clients", "memory", "room", "flops", "attempts", "versions")
            return {"command": command, **{name: made[name] for name in kept}}
    if done.returncode != 2:  # not an answer but an accident
        raise SystemExit(f"{command}\n{done.stderr}")
    found = re.search(r"does not fit: ([\d.]+) GiB of a device", done.stderr)
    return {
        "command": command,
        "refused": done.stderr.strip().splitlines()[-1][:300],
        "needed": float(found[1]) * GIB if found else None,
    }


def tabulate(lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: parameters, image tokens, what is trained and sent, memory on a CPU and on chips."""
    rows = [
        "| smallest checkpoint | parameters | of them the tower's | picture | image tokens | trained | sent a round "
        "| on two cores | on v5e | a chip | of it the base |",
        f"| --- |{' ---: |' * 7} --- | ---: | ---: |",
    ]
    for model in list_done(lines):
        facts, (slice_, chip) = lines[f"facts/{model}"], find_slice(lines, model)
        parts, (height, width) = facts["parameters"], facts["picture"]
        needed, base = ("", "") if chip is None else (describe_needed(chip), f"{chip['memory']['base'] / GIB:.1f} GiB")
        rows.append(
            f"| `{model}` | {sum(parts.values()) / 1e6:,.0f} M | {parts['vision'] / 1e6:,.0f} M | {width}×{height} "
            f"| {facts['image_tokens']} | {facts['trained'] / 1e6:.1f} M | {facts['sent'] / 2**20:.1f} MiB "
            f"| {describe_needed(lines[f'{CPU}/{model}'])} | {slice_} | {needed} | {base} |"
        )
    return rows


def tabulate_short(lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """README's lines of Markdown: checkpoint, parameters, image tokens, memory."""
    rows = [
        "| smallest checkpoint | parameters | image tokens | on two cores | on v5e chips |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for model in list_done(lines):
        facts, (slice_, chip) = lines[f"facts/{model}"], find_slice(lines, model)
        chips = slice_ if chip is None else f"{parse_topology(slice_).devices} × {describe_needed(chip)}"
        rows.append(
            f"| {MODELS[model]} | {sum(facts['parameters'].values()) / 1e6:,.0f} M | {facts['image_tokens']} "
            f"| {describe_needed(lines[f'{CPU}/{model}'])} | {chips} |"
        )
    return rows


def list_done(lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Models whose facts and whose round on a CPU are there."""
    return [model for model in MODELS if all(f"{kind}/{model}" in lines for kind in ("facts", CPU))]


def find_slice(lines: Mapping[str, Mapping[str, Any]], model: str) -> tuple[str, Mapping[str, Any] | None]:
    """The smallest slice that the round fits, and its cell; or words for that there is none."""
    there = [(slice_, lines[f"{slice_}/{model}"]) for slice_ in SLICES if f"{slice_}/{model}" in lines]
    for slice_, cell in there:
        if "refused" not in cell:
            return slice_, cell
    return f"more than {there[-1][0]}" if there else "not compiled", None


def describe_needed(cell: Mapping[str, Any]) -> str:
    """The memory of a device that a cell found, also of one that was too small."""
    needed = cell["needed"] if "refused" in cell else cell["memory"]["needed"]
    return "more than there is" if needed is None else f"{needed / GIB:.1f} GiB"


if __name__ == "__main__":
    main()
