"""Models from a folder: a local one, one that ships with the package, or one of the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedvlm_jax.distributed.sharding import cut_base, place
from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.models.base import Family, Params, Processor, Vlm
from fedvlm_jax.models.folder_files import advise_conversion, find_files, read_json
from fedvlm_jax.models.layers import USUAL, Stacking
from fedvlm_jax.models.registry import find_family
from fedvlm_jax.models.weight_table import read_params, write_tensors

ASSETS = Path(__file__).parent.parent / "assets"


def resolve_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model: `name` is a folder, a model that ships, or a hub id, which is downloaded.

    Args:
        name: which model.
        weights: are they wanted too? Of some models only the configuration ships; of a hub id, they are downloaded.

    Raises:
        UserError: there is no such folder and the hub does not have it or cannot be reached, or weights are wanted of
            a model that ships without.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    described = {path.parent.name for path in ASSETS.glob("*/config.json")}
    ships = sorted(model for model in described if not weights or (ASSETS / model / "model.safetensors").is_file())
    known = f"models that ship: {', '.join(ships) or 'none'}"
    if str(name) in ships:
        return ASSETS / str(name)
    if str(name) in described:
        hub = f"florence-community/{str(name).replace('florence2', 'Florence-2')}"
        raise UserError(
            f"of {name} only the configuration ships, for `fedvlm plan` and `fedvlm explain`: for its weights name a "
            f"folder or a hub id, for example {hub}; models that ship whole: {', '.join(ships) or 'none'}"
        )
    if str(name).count("/") != 1 or folder.is_absolute() or str(name).startswith("."):
        raise UserError(f"no model {str(name)!r}: not a folder, not a hub id (owner/name); {known}")
    return _download(str(name), known, weights)


def _download(name: str, known: str, weights: bool) -> Path:
    """A hub model's folder. Its configuration comes first and alone: what cannot load is refused before gigabytes."""
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download

    def ask(get: Callable[[], str]) -> Path:
        try:
            return Path(get())
        except Exception as error:
            raise UserError(
                f"no folder {name!r} here, and the hub did not give it ({explain_error(error)}). "
                f"Offline, download the model elsewhere and name its folder; {known}"
            ) from error

    _read_config(ask(lambda: hf_hub_download(name, "config.json")).parent)
    wanted = ["*.json", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    folder = ask(lambda: snapshot_download(name, allow_patterns=wanted))
    if weights and not any(folder.glob("*.safetensors")):
        said, pickles = f"{name} has no *.safetensors on the hub", list[str]()
        with contextlib.suppress(Exception):  # whatever the hub has against it, the sentence stands without
            pickles = [file for file in list_repo_files(name) if fnmatch(file, "pytorch_model*.bin")]
        if pickles:
            said += f", only PyTorch's pickled weights; {advise_conversion(name, 'DIR')}, and name DIR as the model"
        raise UserError(said)
    return folder


def _find_family(folder: Path) -> tuple[Family, dict[str, Any], Path]:
    """-> the family of a model folder, the content of its config.json, and where that is."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json")
    values = read_json(file)
    return find_family(values, file), values, file


def _read_config(folder: Path) -> tuple[Family, Any]:
    """-> the family of a model folder, and its configuration."""
    family, values, file = _find_family(folder)
    return family, family.read_config(values, file)


def read_vlm(path: str | Path, *, compute_dtype: Any = jnp.float32, stacking: Stacking = USUAL) -> Vlm:
    """A model without its weights: what its configuration alone tells, its sites for example.

    Args and errors are those of `load_vlm`.
    """
    folder = resolve_folder(path, weights=False)
    family, config = _read_config(folder)
    generation = _read_generation(folder)
    return family.build(config, dtype=compute_dtype, stacking=stacking, generation_config=generation)


def _read_generation(folder: Path) -> Any:
    """transformers' `GenerationConfig` of a folder; None where it has none."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    values = read_json(file)
    try:
        return GenerationConfig.from_dict(values)
    except Exception as error:
        raise UserError(f"{file} is nothing that transformers reads ({explain_error(error)})") from None


def open_processor(path: str | Path) -> Processor:
    """The processor of a model; `path` is as `load_vlm` takes it.

    Raises:
        UserError: its files are missing, cannot be read, or make nonsense.
    """
    folder = resolve_folder(path, weights=False)
    return _find_family(folder)[0].open_processor(folder)


def read_size(path: str | Path) -> tuple[int, int] | None:
    """Height and width in pixels of a model's pictures, from JSON alone; None where it states none.

    Raises:
        UserError: its JSON cannot be read.
    """
    folder = resolve_folder(path, weights=False)
    return _find_family(folder)[0].read_size(folder)


def load_vlm(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = jnp.float32,
    stacking: Stacking = USUAL,
    mesh: Mesh | None = None,
) -> tuple[Vlm, Params]:
    """A model and its weights.

    Args:
        path: a Hugging Face folder (config.json and safetensors, sharded or not, are enough), a hub id, or the name
            of a model that ships (`florence2-nano`).
        dtype: what the weights are kept in.
        compute_dtype: what matmuls are computed in.
        stacking: how its stacks of layers are run.
        mesh: devices over whose axis `model` the weights are cut, each going from the host straight to its shards;
            by default all are on one device.

    Raises:
        UserError: for a folder or file that is not there, a hub that cannot be reached, a configuration that is not
            supported, a checkpoint that does not fit it, or a mesh over whose axis `model` no weight divides.
    """
    vlm = read_vlm(path, compute_dtype=compute_dtype, stacking=stacking)
    return vlm, load_weights(vlm, resolve_folder(path), dtype=dtype, mesh=mesh)


def load_weights(vlm: Vlm, folder: Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Params:
    """The weights of `folder`, of which `read_vlm` made `vlm`; the other arguments and errors are those of `load_vlm`.

    Raises:
        UserError: as `load_vlm`.
    """
    where = None if mesh is None else cut_base(mesh, vlm.shapes(), vlm.cuts)
    arrays = read_params(vlm.table, vlm.shapes(), find_files(folder), jnp.dtype(dtype))
    return jax.tree.map(jnp.asarray, arrays) if where is None else place(arrays, where)


def save_checkpoint(vlm: Vlm, params: Params, folder: Path | str, dtype: Any = np.float32) -> None:
    """Write `model.safetensors`, `config.json` and `generation_config.json`, which transformers itself can load.

    Args:
        vlm: whose configurations are written.
        params: as `vlm.init` or `load_vlm` return them; written as they are, so merge an adapter first.
        folder: made if it is not there; files of these names are replaced.
        dtype: of the tensors in the file.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(write_tensors(vlm.table, params, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    vlm.write_configs(folder)
    # safetensors leaves its file readable by its owner alone, whatever the umask says.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode & 0o666)
