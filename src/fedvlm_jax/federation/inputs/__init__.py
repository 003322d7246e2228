"""Inputs of a round: rows of batches, frozen image features, reference log-probabilities."""
