"""Differential privacy of what leaves the clients: clipping, noise, and the ε that they come to."""
