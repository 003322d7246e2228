"""How unlike a client's answers are to the others': what a rule that cuts unusual clients is held against.

The measure is of the data and not of the updates, on which such a rule acts: that those are cut whose updates lie far
out is what the rule is; whether they are clients with unusual data is the question.
"""

import numpy as np
from jaxtyping import Float

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.data.tokenization import Examples


def measure_answer_distances(examples: Examples) -> dict[str, float]:
    """Compute each training client's distance to all others, by name: 0 if they answer alike, 1 if nothing is shared.

    It is the total variation, half the sum of absolute differences, between the shares that tokens have in the answers
    of a client's training examples and the mean of the other clients' shares. Tokens that every answer has, as those at
    its ends, are left out. Of a client alone there is none.
    """
    clients = [client for client in examples.clients if client.trains]
    if len(clients) < 2:
        return {}
    counts, everywhere = list[Float[np.ndarray, " vocabulary"]](), None
    size = int(examples.labels.max(initial=0)) + 1
    for client in clients:
        labels = examples.labels[client.train]
        ordered = np.sort(labels, axis=1)
        repeated = np.concatenate([np.zeros((len(ordered), 1), bool), ordered[:, 1:] == ordered[:, :-1]], axis=1)
        rows = np.bincount(ordered[(ordered != IGNORED) & ~repeated], minlength=size)  # answers that have a token
        always = rows == len(labels)
        everywhere = always if everywhere is None else everywhere & always
        counts.append(np.bincount(labels[labels != IGNORED], minlength=size).astype(np.float64))
    shares = []
    for count in counts:
        count[everywhere] = 0
        shares.append(count / max(count.sum(), 1))
    total = np.sum(shares, axis=0)
    return {
        client.name: float(0.5 * np.abs(share - (total - share) / (len(clients) - 1)).sum())
        for client, share in zip(clients, shares, strict=True)
    }
