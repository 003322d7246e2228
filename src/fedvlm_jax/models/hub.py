"""Where a model's folder is: a local one, one that ships with the package, or one on the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedvlm_jax.distributed.sharding import cut_base, place
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import Params, Vlm
from fedvlm_jax.models.florence2.model import build, check_config
from fedvlm_jax.models.florence2.weights import load_params
from fedvlm_jax.models.folder_files import explain_error, read_json
from fedvlm_jax.models.layers import USUAL, Stacking
from fedvlm_jax.models.safetensors_io import advise_conversion, find_files

ASSETS = Path(__file__).parent.parent / "assets"
_TEXTS = ["*.json", "*.txt", "*.model"]
_WEIGHTS = ["*.safetensors"]


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
    return _download(str(name), known, weights)


def _download(name: str, known: str, weights: bool) -> Path:
    """A hub model's folder. Its configuration comes first and alone: what cannot load is refused before gigabytes."""
    from huggingface_hub import hf_hub_download, snapshot_download

    def ask(get: Callable[[], str]) -> Path:
        try:
            return Path(get())
        except Exception as error:
            raise UserError(
                f"no folder {name!r} here, and the hub did not give it ({explain_error(error)}). "
                f"Offline, download the model elsewhere and name its folder; {known}"
            ) from error

    read_config(ask(lambda: hf_hub_download(name, "config.json")).parent)
    folder = ask(lambda: snapshot_download(name, allow_patterns=[*_TEXTS, *(_WEIGHTS if weights else [])]))
    if weights and not any(folder.glob("*.safetensors")):
        raise UserError(_explain_absence(name))
    return folder


def _explain_absence(name: str) -> str:
    """Say what a hub model has in place of safetensors; the snapshot does not tell, for nothing else is fetched."""
    from huggingface_hub import list_repo_files

    said, pickles = f"{name} has no *.safetensors on the hub", list[str]()
    with contextlib.suppress(Exception):  # whatever the hub has against it, the sentence stands without
        pickles = [file for file in list_repo_files(name) if fnmatch(file, "pytorch_model*.bin")]
    if not pickles:
        return said
    return f"{said}, only PyTorch's pickled weights; {advise_conversion(name, 'DIR')}, and name DIR as the model"


def read_config(folder: Path) -> Any:
    """transformers' `Florence2Config` of a model folder.

    Raises:
        UserError: without a config.json that is one of a Florence-2 as transformers writes it, whole and possible.
    """
    from transformers import Florence2Config

    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json")
    values = read_json(file)
    _check_layout(values, file)
    try:
        config = Florence2Config.from_dict(values)
    except Exception as error:  # transformers and its validators raise many kinds
        raise UserError(f"{file} is no configuration that transformers reads ({explain_error(error)})") from None
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


def _check_layout(values: dict[str, Any], file: Path) -> None:
    """Refuse other models, and Florence-2 in layouts whose tensors have other names, before transformers sees them."""
    kind = values.get("model_type")
    text, vision = (
        part if isinstance(part := values.get(name), dict) else {} for name in ("text_config", "vision_config")
    )
    original = (
        "auto_map" in values or text.get("model_type") == "florence2_language" or vision.get("model_type") == "davit"
    )
    if kind in ("florence2", "florence2_language") and original:
        size = "large" if 1024 in (values.get("projection_dim"), text.get("d_model")) else "base"
        resaved = "" if "auto_map" in values else ", saved again"
        raise UserError(
            f"{file} is laid out as Microsoft's original release{resaved}, whose tensors have other names; take the "
            f"same weights as transformers has them: florence-community/Florence-2-{size}, or -{size}-ft"
        )
    if kind != "florence2":
        raise UserError(f"{file} has model_type={kind!r}, expected 'florence2'")
    if not (text and vision):
        raise UserError(f"{file} has no text_config or no vision_config: is it cut short?")
    if "quantization_config" in values:
        raise UserError(f"{file} is of quantised weights, which are not supported: take them as they were before")


def read_vlm(path: str | Path, *, compute_dtype: Any = jnp.float32, stacking: Stacking = USUAL) -> Vlm:
    """A Florence-2 without its weights: what its configuration alone tells, its sites for example.

    Args and errors are those of `load_vlm`.
    """
    folder = resolve_folder(path, weights=False)
    config = read_config(folder)
    return build(config, dtype=compute_dtype, stacking=stacking, generation_config=_read_generation(folder))


def _read_generation(folder: Path) -> Any:
    """transformers' `GenerationConfig` of a folder; None where it has none.

    Raises:
        UserError: where it cannot be read.
    """
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_dict(read_json(file))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} is nothing that transformers reads ({explain_error(error)})") from None


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
    vlm = read_vlm(path, compute_dtype=compute_dtype, stacking=stacking)
    return vlm, load_weights(vlm, resolve_folder(path), dtype=dtype, mesh=mesh)


def load_weights(vlm: Vlm, folder: Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Params:
    """The weights of a model that was read already.

    Args:
        vlm: what `read_vlm` made of `folder`.
        folder: with the weights.
        dtype, mesh: as in `load_vlm`.

    Raises:
        UserError: as `load_vlm`, of what weights can have wrong.
    """
    where = None if mesh is None else cut_base(mesh, vlm.shapes(), vlm.cuts)
    arrays = load_params(vlm.shapes(), find_files(folder), jnp.dtype(dtype))
    return jax.tree.map(jnp.asarray, arrays) if where is None else place(arrays, where)
