"""Metrics of several trainings, or steps, in a row as those of one."""

import jax.numpy as jnp

from fedvlm_jax.methods.base import Metrics


def over_steps(history: Metrics) -> Metrics:
    """Join the metrics of trainings that follow each other [S] into those of one training.

    >>> several = {"loss": jnp.asarray([2.0, 4.0]), "last_loss": jnp.asarray([1.0, 3.0]), "steps": jnp.asarray([1, 3])}
    >>> {name: float(value) for name, value in over_steps(several).items()}
    {'loss': 3.5, 'last_loss': 3.0, 'steps': 4.0}
    """
    counts = history["steps"]
    mean = {name: jnp.sum(values * counts) / jnp.maximum(counts.sum(), 1) for name, values in history.items()}
    last = jnp.argmax(jnp.cumsum(counts))  # the first place at which the count is complete
    return {**mean, "last_loss": history["last_loss"][last], "steps": counts.sum()}
