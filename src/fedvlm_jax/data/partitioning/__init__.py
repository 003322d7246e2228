"""Partitions: which rows, and which images, are which client's and in which split."""
