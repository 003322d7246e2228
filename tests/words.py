"""A text processor that needs no model: a token per word."""

import numpy as np

from fedvlm_jax.data.prompts import to_prompt


class WordProcessor:
    """A `TextProcessor`: three image tokens (id 3) before a prompt, one token per word, the end (id 2)."""

    pad = 1
    most_pictures = 1
    reads_turns = False
    cut = None

    def __init__(self):
        self.asked: list[str] = []

    def _ids(self, text: str) -> list[int]:
        return [10 + sum(map(ord, word)) % 1000 for word in text.split()] + [2]

    def prompts(self, asked):
        self.asked += asked
        rows = [[3, 3, 3] * prompt.views + self._ids(prompt.text) for prompt in map(to_prompt, asked)]
        width = max(map(len, rows))
        ids = np.full((len(rows), width), self.pad, np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
        return ids, (ids != self.pad).astype(np.int64)

    def answers(self, texts, max_tokens):
        rows = [ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], 2] for ids in map(self._ids, texts)]
        labels = np.full((len(rows), max(map(len, rows))), -100, np.int64)
        for place, row in enumerate(rows):
            labels[place, : len(row)] = row
        return labels
