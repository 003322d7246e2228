"""The option `--mesh`; no heavy package is imported here, so that a wrong one is refused at once."""

import re
from typing import NamedTuple

from fedvlm_jax.errors import UserError


class MeshShape(NamedTuple):
    """Lengths of a mesh's axes."""

    clients: int  # shares of the clients that run side by side, each on a set of devices
    model: int = 1  # devices that share one copy of the base

    @property
    def devices(self) -> int:
        """Number of devices that the mesh takes."""
        return self.clients * self.model

    def __str__(self) -> str:
        return f"clients={self.clients}" + (f",model={self.model}" if self.model > 1 else "")


def parse_mesh(text: str) -> MeshShape | None:
    """Read `clients=N` or `clients=N,model=M`; None for no text; refuse another form, or a 0.

    Raises:
        UserError: it has another form, or a 0.

    >>> parse_mesh("clients=4,model=2")
    MeshShape(clients=4, model=2)
    """
    if not text:
        return None
    match = re.fullmatch(r"clients=(\d+)(?:,model=(\d+))?", text)
    if match is None:
        raise UserError(f"--mesh {text}: expected clients=N or clients=N,model=M, for example --mesh clients=4,model=2")
    shape = MeshShape(int(match[1]), int(match[2] or 1))
    if not shape.devices:
        raise UserError(f"--mesh {text}: every axis must be 1 or more")
    return shape
