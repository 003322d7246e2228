"""Bytes as tokens, and pictures of one size."""

import numpy as np
from families.toy_decoder.model import EOS, IMAGE, PAD, Config

from fedvlm_jax.errors import UserError

FIRST = 4  # id of byte 0


class Processor:
    size = (Config().side, Config().side)
    image_tokens = (Config().side // Config().patch) ** 2
    most_pictures = 1
    image_token_id, eos_token_id, largest_id = IMAGE, EOS, FIRST + 255
    framing = frozenset(range(FIRST))
    fingerprint = "toy"
    reads_turns = False
    cut = grids = None

    def pixels(self, images, /):
        resized = [np.asarray(image.convert("RGB").resize(self.size), np.float32) / 127.5 - 1 for image in images]
        return np.stack(resized) if resized else np.empty((0, *self.size, 3), np.float32)

    def prompts(self, texts, /):
        if "" in texts:
            raise UserError("the text is empty")
        rows = [[IMAGE] * self.image_tokens + self._tokens(text) + [3] for text in texts]
        return pad(rows, PAD), pad([[1] * len(row) for row in rows], 0)

    def answers(self, texts, max_tokens, /):
        return pad([[*self._tokens(text)[: max_tokens - 1], EOS] for text in texts], -100)

    def decode(self, ids, /):
        rows = [[int(number) - FIRST for number in row if number >= FIRST] for row in ids]
        return [bytes(row).decode("utf-8", "replace").strip() for row in rows]

    def _tokens(self, text):
        return [FIRST + byte for byte in text.encode()]


def pad(rows, value):
    padded = np.full((len(rows), max(map(len, rows), default=0)), value, np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded
