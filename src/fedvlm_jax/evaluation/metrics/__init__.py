"""Metrics of answers and of preferences, a file each."""
