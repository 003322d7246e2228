"""Attacks on what left a run's clients, by which it is measured how much of their rows the messages tell."""
