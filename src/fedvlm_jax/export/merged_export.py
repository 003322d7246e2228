"""Whole checkpoints that transformers loads: the base with a client's adapter written into it.

OUT/manifest.json
OUT/clients/NAME/           config.json, model.safetensors, the files of processor and tokenizer, README.md
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.export.exported_run import ALL, ExportedRun, choose_clients, open_run
from fedvlm_jax.export.logit_check import LogitError, make_check
from fedvlm_jax.export.model_card import tabulate_metrics, write_card
from fedvlm_jax.export.new_folder import check_free, write_beside
from fedvlm_jax.models import Params, Vlm, load_weights, save_checkpoint
from fedvlm_jax.models.folder_files import read_json
from fedvlm_jax.reporting.tables import format_bytes
from fedvlm_jax.run_dir.artifacts import name_file
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.files import write_json

_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")
_OTHERS = ("config.json", "generation_config.json", "adapter_config.json")


def export_merged(
    folder: Path,
    out: Path,
    *,
    clients: Sequence[str] = (),
    dtype: Any = jnp.float32,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[int, LogitError]:
    """Write the models of clients of a finished run as whole checkpoints, all or none.

    Args:
        folder: the run's.
        out: where to; must not be there, or be empty.
        clients: whose; "all" for everybody. Of several clients none is taken unasked, for a model is large.
        dtype: of the tensors.
        note: is told what is done.

    Returns:
        How many, and the largest difference of their logits from the run's.

    Raises:
        UserError: the run is not finished or its files are damaged, an adapter has a gate or a bottleneck, no client is
            named or it has none of that name, there is no room, or `out` is taken.
    """
    check_free(out)
    run = open_run(folder, note)
    size = tree.count_bytes(run.vlm.shapes()) // 4 * jnp.dtype(dtype).itemsize
    if not clients and len(run.clients) > 1:
        raise UserError(
            f"a merged model takes {format_bytes(size)}, those of all {format_count(len(run.clients), 'client')} take "
            f"{format_bytes(size * len(run.clients))}: say whose with --clients NAME [NAME ...], or --clients {ALL}"
        )
    names = choose_clients(run, clients)
    dict(lora.sites_of(run.adapter(names[0])))  # for its error
    kind = name_class(run.vlm)
    with write_beside(out) as place:
        if (room := shutil.disk_usage(place).free) < size * len(names):
            needed = format_bytes(size * len(names))
            raise UserError(
                f"{format_count(len(names), 'model takes', 'models take')} {needed}, and {out.parent} has "
                f"{format_bytes(room)} left"
            )
        note(f"writing {format_count(len(names), 'model')} of {format_bytes(size)}")
        check, errors, entries = make_check(run.vlm), list[LogitError](), dict[str, dict[str, Any]]()
        for name in names:
            adapter, inside = run.adapter(name), f"clients/{name_file(name).removesuffix('.safetensors')}"
            write_checkpoint(place / inside, run, lora.merge(run.params, adapter), dtype)
            error = check(run.params, adapter, load_weights(run.vlm, place / inside), None)
            scores = {"zero-shot": run.scores("zero_shot", name), "this model": run.scores("personal", name)}
            about = (
                f"The model of the client in a federation of {len(run.clients)}: the base with its adapter written in."
            )
            loading = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained(".")  # this folder'
            title = f"{run.record.method}: {name}"
            write_card(place / inside, run, title, about, loading, "transformers", run.base, tabulate_metrics(scores))
            entries[inside] = {"client": name, "logit_error": error.error, "largest_logit": error.largest}
            entries[inside] |= {"scores": scores["this model"]}
            errors.append(error)
        about = {"export": "merged", **run.describe(), "dtype": jnp.dtype(dtype).name, "folders": entries}
        write_json(place / "manifest.json", about)
    return len(errors), max(errors)


def write_checkpoint(folder: Path, run: ExportedRun, params: Params, dtype: Any) -> None:
    """Write weights in the form of a run's base, with the base's processor and tokenizer beside them."""
    save_checkpoint(run.vlm, params, folder, dtype, source=run.model)
    _note_dtype(folder / "config.json", jnp.dtype(dtype).name)
    for pattern in _BESIDE:
        for file in sorted(run.model.glob(pattern)):
            if file.is_file() and file.name not in _OTHERS and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)


def _note_dtype(file: Path, name: str) -> None:
    """Have config.json say the dtype of the tensors where it says one: transformers loads them as that file says."""
    values = read_json(file)
    for part in (values, *(value for value in values.values() if isinstance(value, dict))):
        part.update(dict.fromkeys(part.keys() & {"dtype", "torch_dtype"}, name))
    write_json(file, values)


def name_class(vlm: Vlm) -> str:
    """Name the class of transformers that opens a checkpoint of this model."""
    return "AutoModelForImageTextToText" if vlm.bind is None else "AutoModel"
