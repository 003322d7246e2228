"""Models from a folder: a local one, one that ships with the package, or one of the Hugging Face hub."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedvlm_jax.distributed.sharding import cut_base, place
from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.models.base import Family, Params, Processor, Vlm
from fedvlm_jax.models.folder_files import find_files, read_json
from fedvlm_jax.models.layers import USUAL, Stacking
from fedvlm_jax.models.registry import find_family
from fedvlm_jax.models.tokenizer_checks import check_tokens
from fedvlm_jax.models.weight_table import read_params, read_unread, write_tensors

ASSETS = Path(__file__).parent.parent / "assets"


def resolve_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model: `name` is a folder, a model that ships, or a hub id, which is downloaded.

    Of some models only the configuration ships; of a hub id, `weights` are downloaded only where they are wanted.

    Raises:
        UserError: no such folder is there and the hub does not have it or cannot be reached, or weights are wanted of
            a model that ships without.

    >>> resolve_folder("florence2-base", weights=False).name
    'florence2-base'
    """
    folder, text = Path(name), str(name)
    if folder.is_dir():
        return folder
    described = {path.parent.name for path in ASSETS.glob("*/config.json")}
    ships = sorted(model for model in described if not weights or (ASSETS / model / "model.safetensors").is_file())
    known = ", ".join(ships) or "none"
    if text in ships:
        return ASSETS / text
    if text in described:
        hub = f"florence-community/{text.replace('florence2', 'Florence-2')}"
        raise UserError(
            f"of {name} only the configuration ships, for `fedvlm plan` and `fedvlm explain`: for its weights name a "
            f"folder or a hub id, for example {hub}; models that ship whole: {known}"
        )
    if text.count("/") != 1 or folder.is_absolute() or text.startswith("."):
        raise UserError(f"no model {text!r}: not a folder, not a hub id (owner/name); models that ship: {known}")
    return _download(text, known, weights)


def _download(name: str, known: str, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    def ask(get: Callable[[], str]) -> Path:
        try:
            return Path(get())
        except Exception as error:
            raise UserError(
                f"no folder {name!r} here, and the hub did not give it ({explain_error(error)}). "
                f"Offline, download the model elsewhere and name its folder; models that ship: {known}"
            ) from error

    # The configuration comes first and alone, so that what cannot load is refused before gigabytes have come.
    config = ask(lambda: hf_hub_download(name, "config.json"))
    _, family, values = _find_family(config.parent)
    family.read_config(values, config)
    wanted = ["*.json", "*.jinja", "*.txt", "*.model"]
    folder = ask(lambda: snapshot_download(name, allow_patterns=[*wanted, *(["*.safetensors"] if weights else [])]))
    if weights and not any(folder.glob("*.safetensors")):
        folder = ask(lambda: snapshot_download(name, allow_patterns=[*wanted, "pytorch_model*.bin"]))
        if not any(folder.glob("pytorch_model*.bin")):
            raise UserError(f"{name} has neither *.safetensors nor pytorch_model*.bin on the hub")
    return folder


def _find_family(path: str | Path) -> tuple[Path, Family, dict[str, Any]]:
    """Find a model's folder, its family, and the content of its config.json."""
    folder = resolve_folder(path, weights=False)
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json")
    values = read_json(file)
    return folder, find_family(values, file), values


def read_vlm(path: str | Path, *, compute_dtype: Any = jnp.float32, stacking: Stacking = USUAL) -> Vlm:
    """A model without its weights, of its configuration alone; arguments and errors are those of `load_vlm`.

    >>> read_vlm("florence2-base")
    Vlm(florence2, float32, image_width=768)
    """
    folder, family, values = _find_family(path)
    config, generation = family.read_config(values, folder / "config.json"), None
    file = folder / "generation_config.json"
    if file.is_file():
        from transformers import GenerationConfig  # late: it takes seconds, and what is above refuses at once

        values = read_json(file)
        try:
            generation = GenerationConfig.from_dict(values)
        except Exception as error:
            raise UserError(f"{file} is nothing that transformers reads ({explain_error(error)})") from None
    return family.build(config, dtype=compute_dtype, stacking=stacking, generation_config=generation)


def open_processor(
    path: str | Path, image_size: int | None = None, image_tiles: int | None = None, image_pixels: int | None = None
) -> Processor:
    """The processor of a model.

    Args:
        path: as `load_vlm` takes it.
        image_size: side in pixels that pictures are brought to, where the family leaves the choice.
        image_tiles: that lie along a picture's longer side, where the family cuts pictures.
        image_pixels: of a picture at most, where the family gives pictures grids of their own.

    Raises:
        UserError: its files are missing, cannot be read, or make nonsense, or its pictures have another size.
    """
    folder, family, _ = _find_family(path)
    options: dict[str, int | None] = {}
    if family.resizes:
        options["image_size"] = image_size
    elif image_size is not None and (own := family.read_size(folder)) not in (None, (image_size, image_size)):
        raise UserError(f"pictures of {path} have {own[1]}x{own[0]} pixels, and no other size: leave --image-size out")
    if family.cuts:
        options["image_tiles"] = image_tiles
    elif image_tiles is not None and image_tiles > 1:
        raise UserError(f"{path} sees every picture whole: leave --image-tiles out")
    if family.grids:
        options["image_pixels"] = image_pixels
    elif image_pixels is not None:
        raise UserError(f"pictures of {path} have no grids of their own: leave --image-pixels out")
    return family.open_processor(folder, **options)


def read_size(path: str | Path) -> tuple[int, int] | None:
    """Height and width in pixels of a model's pictures, from JSON alone; None where it states none.

    Raises:
        UserError: its JSON cannot be read.

    >>> read_size("florence2-nano")
    (64, 64)
    """
    folder, family, _ = _find_family(path)
    return family.read_size(folder)


def open_model(
    path: str | Path, *, compute_dtype: Any = jnp.float32, stacking: Stacking = USUAL, image_size: int | None = None,
    image_tiles: int | None = None, image_pixels: int | None = None,
) -> tuple[Vlm, Processor]:  # fmt: skip
    """A model but for its weights, and its processor; arguments as `load_vlm` and `open_processor` take them.

    Raises:
        UserError: a file of it cannot be read, or its configuration, tokenizer and processor disagree: pictures would
            silently be lost.
    """
    vlm = read_vlm(path, compute_dtype=compute_dtype, stacking=stacking)
    folder = resolve_folder(path, weights=False)
    try:
        settings = vlm.settings()
    except UserError as error:
        file = folder / "generation_config.json"
        raise UserError(f"{file if file.is_file() else folder / 'config.json'}: {error}") from None
    processor = open_processor(folder, image_size, image_tiles, image_pixels)
    check_tokens(vlm, settings, processor, folder)
    try:
        tokens = vlm.image_tokens(*processor.size)
    except UserError as error:
        raise UserError(f"{folder}: {error}; the processor makes pictures of {processor.size} pixels") from None
    if tokens != processor.image_tokens:
        raise UserError(
            f"{folder}: the processor puts image_seq_length={processor.image_tokens} image tokens before a text, and "
            f"the tower of config.json makes {tokens} of its pictures of {processor.size} pixels"
        )
    if processor.grids is None and tokens + 3 > vlm.positions:  # beside <s>, </s> and at least one token
        raise UserError(f"{folder}: {tokens} image tokens leave no room for a text in {vlm.positions} positions")
    return vlm, processor


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
        path: a Hugging Face folder (config.json and its weights, sharded or not, are enough), a hub id, or the name
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
    """The weights of `folder`, of which `read_vlm` made `vlm`; other arguments and errors are those of `load_vlm`.

    Raises:
        UserError: as `load_vlm`.
    """
    where = None if mesh is None else cut_base(mesh, vlm.shapes(), vlm.cuts)
    arrays = read_params(vlm.table, vlm.shapes(), find_files(folder), jnp.dtype(dtype))
    return jax.tree.map(jnp.asarray, arrays) if where is None else place(arrays, where)


def save_checkpoint(
    vlm: Vlm, params: Params, folder: Path | str, dtype: Any = np.float32, *, source: Path | str | None = None
) -> None:
    """Write `model.safetensors`, `config.json` and `generation_config.json`, which transformers itself can load.

    `params` are written as they are, so merge an adapter first; files of these names are replaced. `dtype` is that of
    the tensors in the file. Of some families checkpoints hold tensors that the model never reads (the last layer of
    LLaVA's tower): they are copied from the folder `source`. Without it they are left out, and transformers, which
    does not read them either, says that they are missing.

    Raises:
        UserError: `source` holds no weights.
        OSError: the disk does not take it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = write_tensors(vlm.table, params, dtype)
    if source is not None:
        unread = read_unread(vlm.table, find_files(Path(source)))
        tensors |= {name: tensor.astype(dtype) for name, tensor in unread.items()}
    file = folder / "model.safetensors"
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise _find_fault(error, file) from None
    vlm.write_configs(folder)
    # safetensors leaves its file readable by its owner alone, whatever the umask says.
    file.chmod((folder / "config.json").stat().st_mode & 0o666)


def _find_fault(error: Exception, file: Path) -> Exception:
    """Return the fault of the disk, of which safetensors leaves a text alone, or else the error itself.

    >>> _find_fault(ValueError("I/O error: No space left on device (os error 28)"), Path("model.safetensors"))
    OSError(28, 'No space left on device')
    """
    number = re.search(r"\(os error (\d+)\)", str(error))
    return error if number is None else OSError(int(number[1]), os.strerror(int(number[1])), str(file))
