"""Runs from options to results: preparation, rounds, final evaluation, comparisons."""
