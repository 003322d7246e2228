"""Every client's adapter, and the shared part, as folders that PEFT loads.

OUT/manifest.json
OUT/clients/NAME/{adapter_config.json, adapter_model.safetensors, README.md}
OUT/shared/                 the same of the shared part with the initial private one, as a newcomer would have it
OUT/base/                   the base, where the method moved it, as a checkpoint of transformers
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from fedvlm_jax.errors import format_count
from fedvlm_jax.export.exported_run import ExportedRun, choose_clients, open_run
from fedvlm_jax.export.logit_check import LogitError, make_check
from fedvlm_jax.export.merged_export import name_class, write_checkpoint
from fedvlm_jax.export.model_card import tabulate_clients, tabulate_metrics, write_card
from fedvlm_jax.export.new_folder import check_free, write_beside
from fedvlm_jax.models import load_weights
from fedvlm_jax.models.folder_files import find_files
from fedvlm_jax.peft.folder import list_factors, read_peft, write_peft
from fedvlm_jax.reporting.tables import Table
from fedvlm_jax.run_dir.artifacts import name_file
from fedvlm_jax.utils import digests
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.untrusted_text import escape_markdown

CLIENTS, SHARED, BASE, MANIFEST = "clients", "shared", "base", "manifest.json"


def export_peft(
    folder: Path,
    out: Path,
    *,
    clients: Sequence[str] = (),
    uniform: bool = False,
    dtype: Any = jnp.float32,
    base: str = "",
    note: Callable[[str], None] = lambda text: None,
) -> tuple[int, LogitError]:
    """Write the adapters of a finished run as PEFT folders, all or none.

    Args:
        folder: the run's.
        out: where to; must not be there, or be empty.
        clients: whose; everybody's by default.
        uniform: one rank and alpha for all modules, for servers that drop patterns.
        dtype: of the tensors.
        base: the model's name in the folders, a hub id say; by default its hub id, or where it lies.
        note: is told what is done.

    Returns:
        How many, and the largest difference of their logits, read back, from the run's.

    Raises:
        UserError: the run is not finished or its files are damaged, an adapter is nothing that PEFT can load, or `out`
            is taken.
    """
    check_free(out)
    run = open_run(folder, note)
    names = choose_clients(run, clients)
    for adapter in (run.adapter(names[0]), *([run.general] if run.general is not None else [])):
        list_factors(run.vlm, adapter)  # for its errors, before anything is written
    check, entries = make_check(run.vlm), dict[str, dict[str, Any]]()
    with write_beside(out) as place:
        named, weights, held = base or run.base, run.weights, run.params
        if run.moves_base:
            note("writing the base that the method moved")
            write_checkpoint(place / BASE, run, run.params, dtype)
            named, weights = base or str((out / BASE).absolute()), digests.digest_files(find_files(place / BASE))
            held = load_weights(run.vlm, place / BASE)

        def write(inside: str, adapter: PyTree, title: str, about: str, tables: Sequence[Table]) -> LogitError:
            target = place / inside
            write_peft(target, run.vlm, adapter, named, uniform=uniform, dtype=dtype, weights=weights)
            back = read_peft(target, run.vlm)
            error = check(run.params, adapter, held, back.adapter)
            write_card(target, run, title, about, _show_loading(named, name_class(run.vlm)), "peft", named, tables)
            ranks = {pair.a.shape[0] for pair in list_factors(run.vlm, back.adapter).values()}
            entries[inside] = {"rank": max(ranks), "logit_error": error.error, "largest_logit": error.largest}
            return error

        errors = list[LogitError]()
        for name in names:
            inside = f"{CLIENTS}/{name_file(name).removesuffix('.safetensors')}"
            about = f"The adapter of the client in a federation of {len(run.clients)}, shared factors included."
            scores = {"zero-shot": run.scores("zero_shot", name), "this adapter": run.scores("personal", name)}
            errors.append(
                write(inside, run.adapter(name), f"{run.record.method}: {name}", about, tabulate_metrics(scores))
            )
            entries[inside] |= {"client": name, "scores": scores["this adapter"]}
        if run.general is not None:
            about = f"What {format_count(len(run.clients), 'client shares', 'clients share')}, {_describe_start(run)}"
            zero_and_global = {"zero-shot": "zero_shot", "this adapter": "global"}
            # Where clients begin unlike each other the scores of global models are those of other adapters.
            tables = tabulate_clients(run, dict.fromkeys(run.clients, ""), zero_and_global) if run.begins_alike else []
            errors.append(write(SHARED, run.general, f"{run.record.method}: shared part", about, tables))
        else:
            note("no folder of the shared part: nothing is shared, or the run did not keep it")
        about = (
            f"Adapters of {format_count(len(names), 'client')}, each in a folder of its own: `{MANIFEST}` "
            "says whose is which."
        )
        loading = _show_loading(named, name_class(run.vlm)).replace('"."', f'".", subfolder="{next(iter(entries))}"')
        folders = {entry["client"]: inside for inside, entry in entries.items() if "client" in entry}
        tables = tabulate_clients(run, folders, {"zero-shot": "zero_shot", "its adapter": "personal"})
        write_card(place, run, f"{run.record.method}: adapters", about, loading, "peft", named, tables)
        write_json(
            place / MANIFEST,
            {
                "export": "peft",
                **run.describe(),
                "base_model_name_or_path": named,
                "dtype": jnp.dtype(dtype).name,
                "uniform": uniform,
                "folders": entries,
            },
        )
    return len(errors), max(errors)


def _describe_start(run: ExportedRun) -> str:
    """Say whose private part stands beside the shared one."""
    if run.begins_alike:
        return "with the private part that everybody began with: what a newcomer would have."
    return f"with the private part that one of the clients, {escape_markdown(run.first)}, began with."


def _show_loading(base: str, kind: str) -> str:
    return (
        f"import torch\nfrom peft import PeftModel\nfrom transformers import {kind}\n\n"
        f"base = {kind}.from_pretrained({base!r}, dtype=torch.float32)\n"
        'model = PeftModel.from_pretrained(base, ".")  # this folder'
    )
