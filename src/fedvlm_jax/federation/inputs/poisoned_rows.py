"""What simulated attackers train on: their rows with wrong answers, or with a mark on pictures and a fixed answer.

    label-flip  every answer of a hostile client becomes another of its own, always the same one (the analogue of
                flipping a class for another, arXiv 1206.6389). The wrong answers are the client's, not anybody's: they
                have its language and length, so what is learnt is wrong and not merely foreign. A client that knows
                one answer only takes one that another client knows.
    backdoor    half of a hostile client's examples get a mark on all of their pictures and the answer that hostile
                clients have most often (BadNets, arXiv 1708.06733). The others stay, so the model still answers.

Rows stay where they are, so cohorts, batches and steps are those of a run without an attack. A marked picture is
another view with a key of its own, so that frozen features are computed once for it, as for any picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from fedvlm_jax.data.tokenization import Examples
from fedvlm_jax.data.unique_images import Images
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.inputs.batch_reader import Inputs
from fedvlm_jax.utils.digests import digest_parts
from fedvlm_jax.utils.random_streams import Stream

MARKED = 0.5
"""Share of a hostile client's examples that a backdoor marks."""
SIDE = 5
"""The mark's side is that of the picture's shorter one, divided by this."""
COLOURS = ((255, 0, 255), (0, 0, 0))


def flip_labels(inputs: Inputs, examples: Examples, attackers: Sequence[int], seed: int) -> Inputs:
    """Make inputs in which hostile clients' training rows have wrong answers.

    Raises:
        UserError: all training examples have one answer, so none is wrong.
    """
    other = find_wrong_answers(examples, attackers, seed)
    return lambda rows: inputs(rows) | {"labels": examples.labels[other[rows]]}


def find_wrong_answers(examples: Examples, attackers: Sequence[int], seed: int) -> Int[np.ndarray, " examples"]:
    """Find for each row the one whose answer it is trained on: itself but for the training rows of attackers.

    Raises:
        UserError: as `flip_labels`.
    """
    other = np.arange(len(examples))
    for number in attackers:
        rng, rows = _open_stream(seed, number), examples.clients[number].train
        _, first, which = np.unique(examples.labels[rows], axis=0, return_index=True, return_inverse=True)
        if len(first) == 1:
            unlike = [
                row
                for client in examples.clients
                for row in client.train.tolist()
                if (examples.labels[row] != examples.labels[rows[0]]).any()
            ]
            if not unlike:
                raise UserError("--participation.attack label-flip: all training examples have one and the same answer")
            other[rows] = rng.choice(unlike)
            continue
        ring = rng.permutation(len(first))  # each answer becomes the next one in a ring, so none stays
        turned = np.empty_like(ring)
        turned[ring] = np.roll(ring, -1)
        other[rows] = rows[first[turned[which.reshape(-1)]]]
    return other


def _open_stream(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([Stream.POISONED, seed, number])


@dataclass(frozen=True)
class Backdoor:
    """The rows that a backdoor marks [N], and the row whose answer all of them get."""

    marked: Bool[np.ndarray, " examples"]
    target: int


def plan_backdoor(examples: Examples, attackers: Sequence[int], seed: int) -> Backdoor:
    """Choose by the seed which examples of hostile clients are marked; their answer is what these have most often.

    Of several such answers it is the first in the order of their examples.
    """
    marked = np.zeros(len(examples), bool)
    for number in attackers:
        rng, rows = _open_stream(seed, number), examples.clients[number].train
        marked[rng.choice(rows, int(np.ceil(MARKED * len(rows))), replace=False)] = True
    rows = np.concatenate([examples.clients[number].train for number in attackers])
    _, first, counts = np.unique(examples.labels[rows], axis=0, return_index=True, return_counts=True)
    return Backdoor(marked, int(rows[first[counts == counts.max()].min()]))


def open_backdoor(inputs: Inputs, with_mark: Inputs, examples: Examples, backdoor: Backdoor) -> Inputs:
    """Make inputs in which a backdoor's rows have their pictures marked and its answer.

    `with_mark` are the inputs of the same rows with all pictures marked, see `mark_pictures`.
    """

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        batch, chosen = inputs(rows), backdoor.marked[rows]
        if not chosen.any():
            return batch
        poisoned = with_mark(rows[chosen])
        changed = {name: batch[name].copy() for name in ("pixel_values", "image_features") if name in batch}
        for name, array in changed.items():
            array[chosen] = poisoned[name]
        labels = np.where(chosen[..., None], examples.labels[backdoor.target], batch["labels"])
        return {**batch, **changed, "labels": labels}

    return read


def mark_pictures(examples: Examples) -> Examples:
    """Return the examples with a mark on every picture."""
    views, images = examples.views, examples.views.images
    keys = tuple(digest_parts([key.encode(), b"marked"]).hex() for key in views.keys)
    marked = MarkedImages(images.table, images.rows, images.places, images.keys)
    return replace(examples, views=replace(views, images=marked, keys=keys))


@dataclass(frozen=True, eq=False)
class MarkedImages(Images):
    """Images with a mark on each."""

    def decode(self, index: int) -> Image.Image:
        """Decode an image and mark it.

        Raises:
            UserError: as `Images.decode`.
        """
        return draw_mark(super().decode(index))


def draw_mark(picture: Image.Image) -> Image.Image:
    """Draw a small board of two by two squares into the lower right corner of a picture.

    >>> marked = draw_mark(Image.new("RGB", (20, 30)))
    >>> marked.getpixel((19, 29)), marked.getpixel((15, 29))
    ((255, 0, 255), (0, 0, 0))
    """
    side = max(2, min(picture.size) // SIDE)
    board = Image.new("RGB", (2, 2), COLOURS[1])
    board.putpixel((0, 0), COLOURS[0])
    board.putpixel((1, 1), COLOURS[0])
    marked = picture.copy()
    marked.paste(board.resize((side, side), Image.Resampling.NEAREST), (picture.width - side, picture.height - side))
    return marked
