"""Benchmarks: a line measured, and a line of somebody else rerun."""
