"""The mesh of devices: what is refused."""

import pytest

from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.errors import UserError


def test_fewer_devices_than_asked_for():
    with pytest.raises(UserError, match=r"--mesh clients=64,model=2 takes 128 devices: there are \d+ \(\w+\)"):
        make_mesh(64, 2)
    with pytest.raises(UserError, match=r"--mesh clients=64 takes 64 devices: there are"):
        make_mesh(64)
