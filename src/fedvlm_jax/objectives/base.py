"""The record of a training objective; imports no jax, because the command line reads the options beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from fedvlm_jax import lora
    from fedvlm_jax.models import Batch, Params, Vlm

Metrics = dict[str, "Array"]
Loss = tuple["Float[Array, '']", Metrics]


class Objective(NamedTuple):
    """The function that local training minimises.

    Attributes:
        name: as the command line knows it.
        source: where it comes from.
        loss: (vlm, params, adapter, batch) -> (scalar, metrics of scalars, `loss` among them). `batch` is the model's
            (see `models.base`); examples that do not count have all their labels at -100, the rejected ones as well.
            Pure; a batch in which nothing counts has loss 0 and a gradient of 0.
        pairs: whether it needs `rejected_labels` [B, U'] in the batch.
        reference: whether it needs `reference_chosen` and `reference_rejected` [B] in the batch, the answers'
            log-probabilities under the bare base.
        samples: whether it draws answers, and needs in the batch `sampling_keys` [B, 2] uint32, the data of a random
            key for each example, and `client` [B], the number of the client.
        select_by: the metric by which the best round is chosen, unless the user says otherwise.
        reads: the fields of `PreferenceOptions` that mean something to it.
        classes: whether it is for models that choose among classes alone.
    """

    name: str
    source: str
    loss: Callable[[Vlm, Params, lora.Adapter | None, Batch], Loss]
    pairs: bool = False
    reference: bool = False
    samples: bool = False
    select_by: str = "exact_match"
    reads: tuple[str, ...] = ()
    classes: bool = False
