"""Adapters of a model as folders that PEFT loads (`PeftModel.from_pretrained`), and folders of PEFT as adapters.

Modules have the names that transformers gives them, which the family's table knows. A token table that is the head as
well is one site here and several modules there, each with factors of its own, which must agree.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError
from fedvlm_jax.lora.sites import Site
from fedvlm_jax.models.base import Vlm
from fedvlm_jax.models.folder_files import encode_tensors
from fedvlm_jax.models.weight_table import Slot
from fedvlm_jax.peft.files import CONFIG, TENSORS, read_peft_config, read_tensors
from fedvlm_jax.peft.format import Factors, pack, unpack
from fedvlm_jax.peft.patterns import show
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.files import write_bytes, write_json
from fedvlm_jax.utils.untrusted_text import clean, cut

WEIGHTS = "base_weights"
"""Metadata of the tensors' file: the digest of the base's weights, by which another base is known."""

_NAMED = 4  # so many modules are named in a message


class PeftFolder(NamedTuple):
    """A PEFT folder as it was read.

    Attributes:
        adapter: on the sites of the model that it was read for; layers that the folder leaves out are zero.
        base: the name of the model that it was trained on, as the folder has it; a stranger's text.
        weights: the digest of that model's weights, where the folder says it.
        unread: modules that the model does not run, which were left out.
    """

    adapter: lora.Adapter
    base: str
    weights: str
    unread: tuple[str, ...]


def write_peft(
    folder: Path, vlm: Vlm, adapter: lora.Adapter, base: str, *, uniform: bool = False, dtype: Any = np.float32,
    weights: str = "",
) -> None:  # fmt: skip
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: is made; files of these names are replaced.
        base: name or folder of the model, for PEFT.
        uniform: one rank and alpha for all modules, for servers that drop patterns.
        dtype: of the tensors.
        weights: digest of the base's weights.

    Raises:
        UserError: as `list_factors`.
    """
    modules = list_factors(vlm, adapter)
    config, tensors = pack(make_uniform(modules) if uniform else modules, base)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    metadata = {"format": "pt", **({WEIGHTS: weights} if weights else {})}
    write_bytes(folder / TENSORS, encode_tensors(arrays, metadata))
    write_json(folder / CONFIG, config)


def read_peft(folder: Path, vlm: Vlm) -> PeftFolder:
    """Read a PEFT folder for a model.

    Raises:
        UserError: a file is missing or damaged, it is more than LoRA, or its modules are not the model's.
    """
    config = read_peft_config(folder)
    tensors, about = read_tensors(folder, tree.count_bytes(vlm.shapes()))
    base = cut(clean(str(config.get("base_model_name_or_path") or "")), 200)
    try:
        adapter, unread = place_factors(vlm, unpack(config, tensors, str(folder)))
    except LookupError as error:
        named = f"its base is {base}, " if base else ""
        raise UserError(f"{folder} does not fit a model of the family {vlm.family}: {named}{error.args[0]}") from None
    return PeftFolder(adapter, base, about.get(WEIGHTS, ""), unread)


def list_factors(vlm: Vlm, adapter: lora.Adapter) -> dict[str, Factors]:
    """Return the factors of an adapter by the names of transformers' modules.

    Pairs of directions that are zero in both factors, as clients of a lower rank have them, are left out.

    Raises:
        UserError: the adapter has a gate or a bottleneck, or sits on what PEFT cannot adapt; each with the reason.
    """
    found: dict[str, Factors] = {}
    for path, leaves in lora.sites_of(adapter):
        a, b, scale = (np.asarray(leaf) for leaf in leaves)
        site = vlm.sites[path]
        for module, slot in _list_modules(vlm, site):
            pair = (a, b, scale) if slot.layer is None else (a[slot.layer], b[slot.layer], scale[slot.layer])
            left, right = _trim(pair[0], pair[1])
            found[module] = _turn(site, slot, left, right, float(pair[2]))
            if module == _tied(vlm):
                for other in vlm.table.lookups:
                    found[other] = found[module]
                found[vlm.table.head] = Factors(right.T, left.T, float(pair[2]))
    return found


def make_uniform(modules: Mapping[str, Factors]) -> dict[str, Factors]:
    """Give all modules one rank, the largest, by zeros, and scale 1, which goes into `b`.

    >>> small = Factors(np.ones((1, 4)), np.ones((3, 1)), 2.0)
    >>> large = Factors(np.ones((2, 4)), np.ones((3, 2)), 1.0)
    >>> pair = make_uniform({"fc1": small, "fc2": large})["fc1"]
    >>> pair.a.shape, pair.b.tolist(), pair.scale
    ((2, 4), [[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], 1.0)
    """
    rank = max(pair.a.shape[0] for pair in modules.values())

    def widen(pair: Factors) -> Factors:
        lacking = rank - pair.a.shape[0]
        a = np.pad(pair.a, [(0, lacking)] + [(0, 0)] * (pair.a.ndim - 1))
        b = np.pad(pair.b * pair.b.dtype.type(pair.scale), [(0, 0), (0, lacking)] + [(0, 0)] * (pair.b.ndim - 2))
        return pair._replace(a=a, b=b, scale=1.0)

    return {name: widen(pair) for name, pair in modules.items()}


def place_factors(vlm: Vlm, modules: Mapping[str, Factors]) -> tuple[lora.Adapter, tuple[str, ...]]:
    """Make an adapter of the factors of transformers' modules: the inverse of `list_factors`.

    Ranks that differ between the layers of a stack are filled up with zeros, and so are layers that are left out.

    Returns:
        The adapter, and the modules that the model does not run.

    Raises:
        LookupError: modules that the model does not have, or of other shapes; the message names them.
    """
    table, layers, unread = vlm.table, dict[str, dict[int | None, Factors]](), list[str]()
    strange, tied = list[str](), dict[str, Factors]()
    for module, pair in modules.items():
        name = table.spell(f"{module}.weight")
        if table.ties.fullmatch(name):
            strange += [f"{show(module)} is there twice, by two names"] if name in tied else []
            tied[name] = pair
            continue
        slot = table.find_slot(name)
        path = slot.path.rpartition("/")[0] if slot is not None else ""
        site = vlm.sites.get(path)
        if slot is None or site is None or site.weight != slot.path or not _has_layer(site, slot):
            if table.unread.fullmatch(name):
                unread.append(module)
            else:
                strange.append(f"{show(module)} is none of its modules")
            continue
        if table.counted.fullmatch(name) or site.obstacle:
            strange.append(f"{show(module)} cannot be adapted: {site.obstacle or _COUNTED}")
        elif wrong := _compare(site, slot, pair):
            strange.append(f"{show(module)} {wrong}")
        elif slot.layer in layers.get(path, {}):
            strange.append(f"{show(module)} is there twice, by two names")
        else:
            layers.setdefault(path, {})[slot.layer] = pair
    strange += _compare_tied(vlm, layers, tied)
    if strange:
        more = f"; and {len(strange) - _NAMED} more" if len(strange) > _NAMED else ""
        raise LookupError("; ".join(strange[:_NAMED]) + more)
    if not layers:
        raise LookupError("none of its modules is run")
    flat: dict[str, np.ndarray] = {}
    for path, pairs in layers.items():
        flat |= _stack(vlm.sites[path], path, {layer: _turn_back(vlm, path, layer, p) for layer, p in pairs.items()})
    return tree.unflatten(flat), tuple(unread)


_COUNTED = "its module counts positions itself, and PEFT would look up token ids in their place"


def _list_modules(vlm: Vlm, site: Site) -> list[tuple[str, Slot]]:
    """List transformers' modules of a site, one for each layer."""
    named = vlm.table.find_names(site.weight, site.stack[0] if site.stack else 1)
    for name, _ in named:
        reason = _COUNTED if vlm.table.counted.fullmatch(name) else ""
        if not name.endswith(".weight") or len(site.stack) > 1:
            reason = "in transformers it is a parameter, and no module"
        if reason:
            raise UserError(
                f"the adapter at {site.path} cannot become PEFT's: {reason}. Write merged checkpoints (--to merged)"
            )
    return [(f"{vlm.table.prefix}{name.removesuffix('.weight')}", slot) for name, slot in named]


def _tied(vlm: Vlm) -> str | None:
    """Name the module whose table is the head as well, if there is one."""
    return f"{vlm.table.prefix}{vlm.table.tied.removesuffix('.weight')}" if vlm.table.tied else None


def _trim(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave out directions that are zero in `a` [d_in, R] and in `b` [R, d_out], and turn both: [r, d_in], [d_out, r].

    Of a pair that is zero throughout one direction stays.
    """
    used = np.flatnonzero(np.logical_or(a.any(axis=0), b.any(axis=1)))
    used = used if len(used) else np.arange(1)
    return a[:, used].T, b[used].T


def _turn(site: Site, slot: Slot, a: np.ndarray, b: np.ndarray, scale: float) -> Factors:
    """Lay out [r, d_in] and [d_out, r] as PyTorch's module has them."""
    if site.kind == "embed":
        return Factors(a, b, scale, True)
    left = slot.rule.write(a.T.reshape(*site.inputs, len(a)))
    return Factors(left, b.reshape(*b.shape, *[1] * (left.ndim - 2)), scale)


def _turn_back(vlm: Vlm, path: str, layer: int | None, pair: Factors) -> tuple[np.ndarray, np.ndarray, float]:
    """Lay out a module's factors as here: [d_in, r] and [r, d_out]."""
    rank, site = pair.a.shape[0], vlm.sites[path]
    if site.kind == "embed":
        return pair.a.T, pair.b.T, pair.scale
    _, slot = _list_modules(vlm, site)[layer or 0]
    return slot.rule.read(pair.a).reshape(site.d_in, rank), pair.b.reshape(-1, rank).T, pair.scale


def _has_layer(site: Site, slot: Slot) -> bool:
    return slot.layer is None if not site.stack else slot.layer is not None and slot.layer < site.stack[0]


def _compare(site: Site, slot: Slot, pair: Factors) -> str:
    """Say how a module's factors are not those of a site; nothing where they fit."""
    if pair.table != (site.kind == "embed"):
        return f"has factors of {'a table' if pair.table else 'a product'}, and is {site.kind}"
    rank = pair.a.shape[0]
    empty = np.broadcast_to(np.empty(()), (*site.inputs, rank))  # takes no memory
    wanted = (rank, site.d_in) if pair.table else slot.rule.write(empty).shape
    if pair.a.shape == wanted and pair.b.shape[0] == site.d_out:
        return ""
    asked = f"{list(wanted)} and {[site.d_out, rank]}"
    return f"has factors of {list(pair.a.shape)} and {list(pair.b.shape)}, this model needs {asked}"


def _compare_tied(
    vlm: Vlm, layers: Mapping[str, Mapping[int | None, Factors]], tied: Mapping[str, Factors]
) -> list[str]:
    """Say in what the factors of the modules that share a table are not those of one table."""
    table = vlm.table
    slot = table.find_slot(table.tied) if table.tied else None
    path = slot.path.rpartition("/")[0] if slot is not None else ""
    main = layers.get(path, {}).get(None)
    wanted = {table.spell(f"{module}.weight"): show(module) for module in (*table.lookups, table.head)}
    present = [wanted.get(name, show(name)) for name in tied]
    if main is None and not tied:
        return []
    lacking = [module for name, module in wanted.items() if name not in tied]
    if main is None or lacking:
        missing = lacking or [str(_tied(vlm))]
        adapted = present or [str(_tied(vlm))]
        return [f"{adapted[0]} is adapted and {missing[0]}, which has the same weight, is not: here they are one"]
    differ = [
        module
        for name, module in wanted.items()
        if not np.array_equal(main.a, tied[name].b.T if module == table.head else tied[name].a)
        or not np.array_equal(main.b, tied[name].a.T if module == table.head else tied[name].b)
        or main.scale != tied[name].scale
    ]
    return [f"{module} and {_tied(vlm)} have one weight and unlike factors: here they are one" for module in differ]


def _stack(
    site: Site, path: str, pairs: Mapping[int | None, tuple[np.ndarray, np.ndarray, float]]
) -> dict[str, np.ndarray]:
    """Stack the factors of a site's layers, of the largest rank among them."""
    rank = max(a.shape[1] for a, _, _ in pairs.values())
    count, usual = (site.stack[0] if site.stack else 1), next(iter(pairs.values()))[2]
    a, b = np.zeros((count, site.d_in, rank), np.float32), np.zeros((count, rank, site.d_out), np.float32)
    scale = np.full(count, usual, np.float32)
    for layer, (left, right, factor) in pairs.items():
        a[layer or 0, :, : left.shape[1]], b[layer or 0, : len(right)], scale[layer or 0] = left, right, factor
    leaves = {"a": a, "b": b, "scale": scale}
    return {f"{path}/{name}": leaf if site.stack else leaf[0] for name, leaf in leaves.items()}
