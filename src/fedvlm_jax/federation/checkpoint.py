"""Checkpoints of all that a run needs to go on: orbax writes each into a folder of its own, whole or not at all."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax import processes
from fedvlm_jax.errors import UserError

__all__ = ["Checkpoints"]


class Checkpoints:
    """The newest checkpoints of a run, by round.

    A state is any pytree of arrays. Its leaves are laid end to end, one array per type, beside their paths and shapes,
    because orbax's cost is by array; they are restored into the structure of a template, so that nothing depends on how
    a container is written. Of several processes the first writes, and all read.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Open, or make, a folder of checkpoints of which the newest `keep` are kept."""
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        own = jax.process_index()  # each on its own, as far as orbax knows: nobody waits for a write of another
        alone = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, create=False, multiprocessing_options=alone
        )
        if not processes.is_first():
            processes.wait_for_all()  # opening sweeps up what a kill left, which one should do
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        if processes.is_first():
            processes.wait_for_all()

    def save(self, round_: int, state: PyTree, extra: Mapping[str, Any], elsewhere: PyTree = ()) -> None:
        """Write a checkpoint of the state as it is now, in the background. A kill leaves the last.

        Args:
            round_: its round.
            state: what is written.
            extra: JSON, written beside it.
            elsewhere: shapes of what is stored in another place, and has to fit as well.
        """
        if not processes.is_first():
            return
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        packed = {
            kind: np.concatenate([leaf.ravel() for leaf in leaves if str(leaf.dtype) == kind])
            for kind in sorted({str(leaf.dtype) for leaf in leaves})
        }
        about = {"paths": _describe(state) + _describe(elsewhere), **extra}
        args = self._ocp.args
        self._manager.save(
            round_, args=args.Composite(state=args.PyTreeSave(packed), about=args.JsonSave(about)), force=True
        )

    def newest(self) -> int | None:
        """The round of the newest whole checkpoint, once what is being written is."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def restore(self, round_: int, template: PyTree, elsewhere: PyTree = ()) -> tuple[PyTree, dict[str, Any]]:
        """Read a checkpoint into the structure of `template` (arrays or shapes); returns it and `extra`.

        Raises:
            UserError: the checkpoint is of another state than the template: other paths, shapes or types, listed.
        """
        args = self._ocp.args
        about = dict(self._manager.restore(round_, args=args.Composite(about=args.JsonRestore()))["about"])
        stored, wanted = about.pop("paths"), json.loads(json.dumps(_describe(template) + _describe(elsewhere)))
        if stored != wanted:
            odd = [f"  {line}" for line in sorted({*map(str, stored)} ^ {*map(str, wanted)})]
            raise UserError(
                f"the checkpoint of round {round_} in {self._folder} does not fit this run; was its configuration "
                "changed? Entries of only one of the two:\n" + "\n".join(odd[:20])
            )
        leaves = jax.tree.leaves(template)
        sizes: dict[str, int] = {}
        for leaf in leaves:
            sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size
        shapes = {kind: np.zeros(size, kind) for kind, size in sizes.items()}
        packed = self._manager.restore(round_, args=args.Composite(state=args.PyTreeRestore(shapes)))["state"]
        return jax.tree.unflatten(jax.tree.structure(template), _unpack(packed, leaves)), about

    def close(self) -> None:
        """Wait for what is being written, and release what orbax holds."""
        self._manager.close()


def _unpack(packed: Mapping[str, Any], leaves: Sequence[Any]) -> Iterator[np.ndarray]:
    begun = dict.fromkeys(packed, 0)
    for leaf in leaves:
        kind = str(leaf.dtype)
        yield np.asarray(packed[kind])[begun[kind] : begun[kind] + leaf.size].reshape(leaf.shape)
        begun[kind] += leaf.size


def _describe(state: PyTree) -> list[list[Any]]:
    return [
        [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]
