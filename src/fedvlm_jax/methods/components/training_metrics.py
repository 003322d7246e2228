"""Metrics of a training that a method takes apart into several."""

import jax.numpy as jnp

from fedvlm_jax.methods.base import Metrics


def over_steps(history: Metrics) -> Metrics:
    """Join the metrics of trainings that follow each other [S] into those of one training."""
    counts = history["steps"]
    mean = {name: jnp.sum(values * counts) / jnp.maximum(counts.sum(), 1) for name, values in history.items()}
    last = jnp.argmax(jnp.cumsum(counts))  # the first place at which the count is complete
    return {**mean, "last_loss": history["last_loss"][last], "steps": counts.sum()}
