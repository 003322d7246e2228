"""Clients that never trained: the global part is the server's, and the private part has to come from somewhere.

    initial   what every client started from
    mean      the mean of the private states of all clients that took part
    nearest   the private state of the client whose images are most alike: cosine of mean frozen features, centred over
              clients. Of a held-out client only validation images are looked at, and no answers.

None of it is given by the FedVLM paper (arXiv 2507.17088).
"""

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.driver import Driver
from fedvlm_jax.runs.prepare import Prepared

__all__ = ["find_nearest", "start_newcomers"]

IMAGES = 128
"""A client is known by so many of its images at most."""


def start_newcomers(prepared: Prepared, driver: Driver, adapters: PyTree) -> PyTree:
    """Give held-out clients the private part that the run asks for.

    Args:
        prepared: the run.
        driver: its federation, as it stands.
        adapters: every client's own [C, …]; a held-out client's has the initial private part.

    Returns:
        The same with the held-out clients' replaced.

    Raises:
        UserError: "nearest" where image features are not frozen and kept.
    """
    kind = prepared.run.evaluation.cold_start
    held_out = np.asarray(prepared.held_out, np.int64)
    trained = np.flatnonzero(driver.population.known)
    if kind == "initial" or not len(held_out) or not len(trained):
        return adapters
    if kind == "mean":
        states = jax.tree.map(lambda leaf: _repeat_mean(leaf[trained], len(held_out)), driver.population.states)
    else:
        like = prepared.session.remember(
            ("client means", *prepared.examples.images.keys), lambda: describe_clients(prepared)
        )
        states = driver.population.gather(find_nearest(like, held_out, trained))
    started = jax.device_get(driver.personalise(states, held_out))

    def replace(leaf: np.ndarray, new: np.ndarray) -> np.ndarray:
        leaf = np.array(leaf)
        leaf[held_out] = new
        return leaf

    return jax.tree.map(replace, adapters, started)


def find_nearest(
    means: Float[np.ndarray, "clients width"], who: Int[np.ndarray, " some"], among: Int[np.ndarray, " others"]
) -> Int[np.ndarray, " some"]:
    """For each of `who` the one of `among` with the most similar row: cosine, after `among`'s mean is taken off."""
    centred = means - means[among].mean(axis=0)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(lengths > 0, lengths, 1.0)
    return among[(unit[who] @ unit[among].T).argmax(axis=1)]


def describe_clients(prepared: Prepared) -> Float[np.ndarray, "clients width"]:
    """The mean frozen feature of every client's images [C, D]: training images, validation images of the held-out."""
    rows = []
    for client in prepared.examples.clients:
        own = client.validation if client.held_out else client.train
        batch = prepared.inputs(own[:IMAGES])
        if "image_features" not in batch:
            raise UserError("--evaluation.cold-start nearest needs frozen image features: keep the adapter out of the "
                            "vision tower, and --system.cache on; or choose mean or initial.")  # fmt: skip
        features = batch["image_features"]
        rows.append(features.mean(axis=(0, 1)) if len(features) else np.zeros(features.shape[-1], features.dtype))
    return np.stack(rows)


def _repeat_mean(leaf: np.ndarray, count: int) -> np.ndarray:
    mean = leaf.mean(axis=0).astype(leaf.dtype)
    return np.broadcast_to(mean, (count, *mean.shape)).copy()
