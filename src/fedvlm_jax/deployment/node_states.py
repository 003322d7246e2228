"""A node's personal states on its disk: one file per round that may be gone back to."""

import re
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.deployment.vectors import digest_schema, pack, unpack
from fedvlm_jax.errors import DamagedError, UserError
from fedvlm_jax.run_dir.validated_files import read_json
from fedvlm_jax.utils.digests import DIGEST_SIZE, digest_parts
from fedvlm_jax.utils.files import read_plain, write_bytes, write_json

OWNER = "owner.json"
"""The file that says whose states they are."""


class NodeStates:
    """The states that this client had after rounds, by the rounds' numbers.

    The coordinator says after which round a client last counted, and the node goes on from the state of that one: a
    reply that came too late, or was lost, leaves no trace. A file is written beside and renamed, so a kill leaves the
    states that were there.
    """

    def __init__(self, folder: Path, shapes: PyTree, owner: str = "") -> None:
        """Open the folder, made where there is none, for states of these shapes.

        Raises:
            UserError: it has the states of another owner.
        """
        self._folder, self._shapes = folder, shapes
        self._schema = digest_schema(shapes).encode()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not check_owner(folder, owner):
            write_json(folder / OWNER, {"owner": owner})
        for left in folder.glob("state-*.bin.*.tmp"):  # by a kill that came while it was written
            left.unlink(missing_ok=True)

    def rounds(self) -> list[int]:
        """List the rounds whose states are there."""
        names = (re.fullmatch(r"state-(\d+)\.bin", file.name) for file in self._folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def save(self, round_: int, state: PyTree, keep: Collection[int]) -> None:
        """Write the state after a round, on the disk when this returns; of earlier ones only those to keep stay.

        Later ones stay: a coordinator that goes back, or begins anew in another folder, is not to be trusted with them.
        So do all where none is to be kept, for a client that begins anew may have been sent to by mistake.
        """
        content = pack(state)
        write_bytes(self._name(round_), digest_parts([self._schema, content], round_) + content, sync=True)
        kept = {held for held in keep if held}
        for other in self.rounds() if kept else ():
            if other < round_ and other not in kept:
                self._name(other).unlink(missing_ok=True)

    def load(self, round_: int) -> PyTree:
        """Read the state after a round.

        Raises:
            DamagedError: it is not there, or not as it was written.
        """
        file = self._name(round_)
        try:
            stored = read_plain(file)
        except FileNotFoundError:
            raise DamagedError(
                f"{file} is missing: put it back; a node that is started again without it begins anew"
            ) from None
        seal, content = stored[:DIGEST_SIZE], stored[DIGEST_SIZE:]
        if seal != digest_parts([self._schema, content], round_):
            raise DamagedError(
                f"{file} is damaged: put it back, or remove it and start the node again, which then begins anew"
            )
        return unpack(content, self._shapes)

    def blank(self) -> PyTree:
        """Make zeros in the form of a state, for a client that begins."""
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._shapes)

    def _name(self, round_: int) -> Path:
        return self._folder / f"state-{round_}.bin"


def check_owner(folder: Path, owner: str) -> bool:
    """Tell whether a folder says that its states are this owner's; False where it says nothing yet.

    Raises:
        UserError: they are another's.
    """
    file = folder / OWNER
    if not file.is_file():
        return False
    if read_json(file, {"owner": str})["owner"] != owner:
        raise UserError(
            f"{folder} has the states of another client, or of another deployment: say another --folder, or remove it"
        )
    return True
