"""Checkpoints of all that a run needs to go on: orbax writes each into a folder of its own, whole or not at all.

A checkpoint holds digests of its arrays and of its JSON, which every reading checks.
"""

import json
import logging
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import DamagedError, UserError, naming
from fedvlm_jax.utils.digests import digest_parts

LOG = logging.getLogger("absl")


def _is_news(record: logging.LogRecord) -> bool:
    """Filter out what orbax logs of errors of its writing in the background: they are raised here."""
    return not (record.exc_info and "orbax" in record.pathname)


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
        LOG.addFilter(_is_news)
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
        """Write the checkpoint of a round, the state as it is now, in the background. A kill leaves the last.

        `extra` is JSON that is written beside it; `elsewhere` has the shapes of what is stored in another place, and
        has to fit as well.

        Raises:
            OSError: the disk did not take it, or the one before it.
        """
        if not processes.is_first():
            return
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        packed = {
            kind: np.concatenate([leaf.ravel() for leaf in leaves if str(leaf.dtype) == kind])
            for kind in sorted({str(leaf.dtype) for leaf in leaves})
        }
        about = {"paths": _describe(state, elsewhere), "digest": _digest_arrays(packed), **extra}
        about |= {"digest_of_this": _digest_json(about)}
        args = self._ocp.args
        composite = args.Composite(state=args.PyTreeSave(packed), about=args.JsonSave(about))
        with self._naming():
            self._manager.save(round_, args=composite, force=True)

    def newest(self) -> int | None:
        """Return the round of the newest whole checkpoint, once what is being written is."""
        return next(iter(self.rounds()), None)

    def rounds(self) -> list[int]:
        """List the rounds of all checkpoints, the newest first, once what is being written is."""
        with self._naming():
            self._manager.wait_until_finished()
        return sorted(self._manager.all_steps(), reverse=True)

    def forget(self, round_: int) -> None:
        """Remove a checkpoint."""
        if processes.is_first():
            self._manager.delete(round_)
        processes.wait_for_all()
        self._manager.reload()

    def restore(self, round_: int, template: PyTree, elsewhere: PyTree = ()) -> tuple[PyTree, dict[str, Any]]:
        """Read a checkpoint into the structure of `template` (arrays or shapes); returns it and `extra`.

        Raises:
            DamagedError: it cannot be read, or does not hold what was written.
            UserError: the checkpoint is of another state than the template: other paths, shapes or types, listed.
        """
        about = dict(self._read(round_, about=self._ocp.args.JsonRestore()))
        if "paths" not in about or about.pop("digest_of_this", None) != _digest_json(about):
            raise DamagedError(
                f"the checkpoint of round {round_} is damaged, or of version 0.1: its JSON is not as its digest says"
            )
        stored, wanted = about.pop("paths"), _describe(template, elsewhere)
        if stored != wanted:
            odd = [f"  {line}" for line in sorted({*map(str, stored)} ^ {*map(str, wanted)})]
            raise UserError(
                f"the checkpoint of round {round_} in {self._folder} does not fit this run; was its configuration "
                "or its method's file changed, or is it of another version? Entries of only one of the two:\n"
                + "\n".join(odd[:20])
            )
        leaves = jax.tree.leaves(template)
        sizes: dict[str, int] = {}
        for leaf in leaves:
            sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size
        shapes = {kind: np.zeros(size, kind) for kind, size in sizes.items()}
        packed = self._read(round_, state=self._ocp.args.PyTreeRestore(shapes))
        packed = {kind: np.asarray(packed[kind]) for kind in shapes}
        if _digest_arrays(packed) != about.pop("digest"):
            raise DamagedError(f"the checkpoint of round {round_} is damaged: its arrays are not as written")
        begun, found = dict.fromkeys(packed, 0), []
        for leaf in leaves:
            kind = str(leaf.dtype)
            found.append(packed[kind][begun[kind] : begun[kind] + leaf.size].reshape(leaf.shape))
            begun[kind] += leaf.size
        return jax.tree.unflatten(jax.tree.structure(template), found), about

    def _read(self, round_: int, **what: Any) -> Any:
        """Read a part of a checkpoint; of damaged files orbax and what it stands on raise whatever they like."""
        (name,) = what
        try:
            return self._manager.restore(round_, args=self._ocp.args.Composite(**what))[name]
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DamagedError(f"the checkpoint of round {round_} is damaged: it cannot be read ({reason})") from error

    def close(self) -> None:
        """Wait for what is being written, and release what orbax holds.

        Raises:
            OSError: the disk did not take what was being written.
        """
        try:
            with self._naming():
                self._manager.close()
        finally:
            LOG.removeFilter(_is_news)

    @contextmanager
    def _naming(self) -> Generator[None]:
        """Raise as an error of the disk what orbax, and tensorstore below it, raise as an error of their own."""
        try:
            with naming(self._folder):
                yield
        except UserError:
            raise
        except ValueError as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(self._folder)) from error


def _digest_arrays(packed: Mapping[str, np.ndarray]) -> str:
    return digest_parts(packed[kind] for kind in sorted(packed)).hex()


def _digest_json(about: Mapping[str, Any]) -> str:
    return digest_parts([json.dumps(about, sort_keys=True).encode()]).hex()


def _describe(*states: PyTree) -> list[list[Any]]:
    """List path, shape and type of every leaf, as JSON has them.

    >>> _describe({"b": np.zeros((2, 3), np.float32)})
    [["['b']", [2, 3], 'float32']]
    """
    return [
        [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)]
        for state in states
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]
