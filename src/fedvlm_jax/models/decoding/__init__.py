"""Generation of answers: greedy and beam search with a cache of keys and values."""
