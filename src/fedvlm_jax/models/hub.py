"""Where a model's folder is: a local one, one that ships with the package, or one on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.checkpoint import find_files, load_params
from fedvlm_jax.models.florence2 import build
from fedvlm_jax.models.layers import USUAL, Stacking
from fedvlm_jax.models.vlm import Params, Vlm
from fedvlm_jax.sharding import cut_base, place

ASSETS = Path(__file__).parent.parent / "assets"
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model"]


def resolve_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model: `name` is a folder, a model that ships, or a hub id, which is downloaded.

    Args:
        name: which model.
        weights: are they wanted too? Of some models only the configuration ships; of a hub id, they are downloaded.

    Raises:
        UserError: where there is no such folder and the hub does not have it or cannot be reached.
        UserError: where weights are wanted of a model that ships without.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    described = {path.parent.name for path in ASSETS.glob("*/config.json")}
    ships = sorted(model for model in described if not weights or (ASSETS / model / "model.safetensors").is_file())
    if str(name) in ships:
        return ASSETS / str(name)
    if str(name) in described:
        hub = f"florence-community/{str(name).replace('florence2', 'Florence-2')}"
        raise UserError(
            f"of {name} only the configuration ships, for `fedvlm plan` and `fedvlm explain`: for its weights name a "
            f"folder or a hub id, for example {hub}; models that ship whole: {', '.join(ships) or 'none'}"
        )
    looks_like_id = str(name).count("/") == 1 and not folder.is_absolute() and not str(name).startswith(".")
    known = f"models that ship: {', '.join(ships) or 'none'}"
    if not looks_like_id:
        raise UserError(f"no model {str(name)!r}: not a folder, not a hub id (owner/name); {known}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=_PATTERNS if weights else ["*.json"]))
    except Exception as error:
        raise UserError(
            f"no folder {str(name)!r} here, and the hub did not give it ({type(error).__name__}: {error}). "
            f"Offline, download the model elsewhere and name its folder; {known}"
        ) from error


def read_config(folder: Path) -> Any:
    """transformers' `Florence2Config` of a model folder.

    Raises:
        UserError: without a config.json.
        UserError: where it is not a Florence-2 that transformers knows.
    """
    from transformers import Florence2Config

    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json")
    values = json.loads(file.read_text())
    if values.get("model_type") != "florence2":
        raise UserError(f"{file} has model_type={values.get('model_type')!r}, expected 'florence2'")
    if "auto_map" in values:
        raise UserError(
            f"{file} belongs to Microsoft's original release, whose tensors have other names; "
            "take the converted one, for example florence-community/Florence-2-base"
        )
    return Florence2Config.from_pretrained(folder)


def read_vlm(path: str | Path, *, compute_dtype: Any = jnp.float32, stacking: Stacking = USUAL) -> Vlm:
    """A Florence-2 without its weights: what its configuration alone tells, its sites for example.

    Args and errors are those of `load_vlm`.
    """
    from transformers import GenerationConfig

    folder = resolve_folder(path, weights=False)
    config = read_config(folder)
    has_generation = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder) if has_generation else None
    return build(config, dtype=compute_dtype, stacking=stacking, generation_config=generation)


def load_vlm(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = jnp.float32,
    stacking: Stacking = USUAL,
    mesh: Mesh | None = None,
) -> tuple[Vlm, Params]:
    """A Florence-2 and its weights.

    Args:
        path: a Hugging Face folder (config.json and safetensors, sharded or not, are enough), a hub id, or the name
            of a model that ships (`florence2-nano`).
        dtype: what the weights are kept in.
        compute_dtype: what matmuls are computed in.
        stacking: how its stacks of layers are run.
        mesh: devices over whose axis `model` the weights are cut, each going from the host straight to its shards;
            by default all are on one device.

    Raises:
        UserError: for a folder or file that is not there, or a hub that cannot be reached.
        UserError: where the mesh has an axis `model` over which no weight divides.
        UserError: for a configuration that is not supported, or a checkpoint that does not fit it.
    """
    folder = resolve_folder(path)
    vlm = read_vlm(folder, compute_dtype=compute_dtype, stacking=stacking)
    where = None if mesh is None else cut_base(mesh, vlm.shapes(), vlm.cuts)
    arrays = load_params(vlm.shapes(), find_files(folder), jnp.dtype(dtype))
    return vlm, jax.tree.map(jnp.asarray, arrays) if where is None else place(arrays, where)
