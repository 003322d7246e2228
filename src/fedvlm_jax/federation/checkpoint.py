"""Checkpoints of all that a run needs to go on: orbax writes each into a folder of its own, whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.errors import UserError

__all__ = ["Checkpoints"]


class Checkpoints:
    """The newest checkpoints of a run, by round.

    A state is any pytree of arrays; it is stored as a list of leaves beside their paths and shapes, and restored into
    the structure of a template, so that nothing depends on how a container is written.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Open, or make, a folder of checkpoints of which the newest `keep` are kept."""
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, round_: int, state: PyTree, extra: Mapping[str, Any]) -> None:
        """Write a checkpoint; returns when it is on disk. `extra` is JSON. A kill leaves the one before."""
        leaves = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(state))}
        about = {"paths": _describe(state), **extra}
        args = self._ocp.args
        self._manager.save(
            round_, args=args.Composite(state=args.PyTreeSave(leaves), about=args.JsonSave(about)), force=True
        )
        self._manager.wait_until_finished()

    def newest(self) -> int | None:
        """The round of the newest whole checkpoint."""
        return self._manager.latest_step()

    def restore(self, round_: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Read a checkpoint into the structure of `template` (arrays or shapes); returns it and `extra`.

        Raises:
            UserError: the checkpoint is of another state than the template: other paths, shapes or types, listed.
        """
        args = self._ocp.args
        about = dict(self._manager.restore(round_, args=args.Composite(about=args.JsonRestore()))["about"])
        stored, wanted = about.pop("paths"), json.loads(json.dumps(_describe(template)))
        if stored != wanted:
            odd = [f"  {line}" for line in sorted({*map(str, stored)} ^ {*map(str, wanted)})]
            raise UserError(
                f"the checkpoint of round {round_} in {self._folder} does not fit this run; was its configuration "
                "changed? Entries of only one of the two:\n" + "\n".join(odd[:20])
            )
        leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(template))}
        shapes = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        loaded = self._manager.restore(round_, args=args.Composite(state=args.PyTreeRestore(shapes)))["state"]
        ordered = [np.asarray(loaded[str(number)]) for number in range(len(leaves))]
        return jax.tree.unflatten(jax.tree.structure(template), ordered), about

    def close(self) -> None:
        """Release what orbax holds."""
        self._manager.close()


def _describe(state: PyTree) -> list[list[Any]]:
    return [
        [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]
