"""`--start`: a run that begins with an adapter of a PEFT folder, whose form its own adapters then have."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedvlm_jax import lora
from fedvlm_jax.config.run_options import LoraOptions, Run
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import Vlm, read_vlm, resolve_folder
from fedvlm_jax.models.folder_files import find_files
from fedvlm_jax.peft.files import CONFIG, PICKLE, TENSORS
from fedvlm_jax.peft.folder import PeftFolder, read_peft
from fedvlm_jax.utils import digests, tree


def fit_start(run: Run) -> Run:
    """Give a run with `--start` the rank, alpha and targets of that adapter; another run stays as it is.

    Raises:
        UserError: the folder cannot be read or is of another base, or the options ask for another form.
    """
    if run.start is None:
        return run
    found = read_start(run.start, run.model, read_vlm(run.model))
    sites = list(lora.sites_of(found.adapter))
    rank = max(a.shape[-1] for _, (a, _, _) in sites)
    scale, _ = Counter(float(one) for _, (_, _, scale) in sites for one in np.ravel(scale)).most_common(1)[0]
    targets = f"^({'|'.join(re.escape(path) for path, _ in sites)})$"
    fitted, usual = {"rank": rank, "alpha": scale * rank, "targets": targets, "rslora": False}, LoraOptions()
    for name, value in fitted.items():
        asked = getattr(run.lora, name)
        if asked not in (getattr(usual, name), value):
            raise UserError(f"--lora.{name} {asked} does not go with --start, whose adapter has its own: leave it out")
    return replace(run, lora=replace(run.lora, **fitted))


def read_start(folder: Path, model: str, vlm: Vlm) -> PeftFolder:
    """Read an adapter for a base.

    Raises:
        UserError: as `read_peft`, or the folder says that its base has other weights.
    """
    found = read_peft(folder, vlm)
    if found.weights and found.weights != digests.digest_files(find_files(resolve_folder(model))):
        raise UserError(
            f"{folder} was trained on {found.base or 'a base'}, and the weights of {model} are others: name that model "
            "with --model"
        )
    return found


def name_other_base(found: PeftFolder, model: str) -> str:
    """Name the base of a folder that does not say which weights it has, where it is called otherwise; else nothing.

    >>> name_other_base(PeftFolder({}, "owner/Florence-2-base", "", ()), "./florence-2-base")
    ''
    """
    called = found.base.rstrip("/").rpartition("/")[2]
    return "" if found.weights or called.lower() in ("", Path(model).name.lower()) else found.base


def continue_from(fresh: lora.Adapter, found: lora.Adapter) -> lora.Adapter:
    """Put an adapter in the place of a fresh one of its largest rank.

    Directions and layers that it does not have stay fresh, and so can be trained: `b` is zero there.
    """
    new, flat = dict(lora.sites_of(fresh)), dict[str, jax.Array]()
    for path, (a, b, scale) in lora.sites_of(found):
        left, right = (np.array(leaf) for leaf in new[path][:2])
        lacking = left.shape[-1] - a.shape[-1]
        a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, lacking)])
        b = np.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, lacking), (0, 0)])
        used = np.logical_or(a.any(axis=-2), b.any(axis=-1))
        flat[f"{path}/a"] = jnp.asarray(np.where(used[..., None, :], a, left), left.dtype)
        flat[f"{path}/b"] = jnp.asarray(b, right.dtype)
        flat[f"{path}/scale"] = jnp.asarray(scale, jnp.float32)
    return tree.unflatten(flat)


def digest_start(folder: Path) -> str:
    """Digest the files of a PEFT folder.

    Raises:
        UserError: one cannot be read.
    """
    return digests.digest_files(file for name in (CONFIG, TENSORS, PICKLE) if (file := folder / name).is_file())
