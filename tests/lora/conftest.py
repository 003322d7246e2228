"""The model with everything, its parameters and an input."""

import jax
import pytest
from linen_models import Model


@pytest.fixture(scope="session")
def example():
    ids = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)
    return ids, jax.random.normal(jax.random.key(2), (2, 8, 8, 3))


@pytest.fixture(scope="session")
def params(example):
    return Model().init(jax.random.key(0), *example)["params"]
