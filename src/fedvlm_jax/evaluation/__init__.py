"""Evaluation of every client with its own model: answers, metrics, statistics."""
