"""Flower as the network between nodes and coordinator: a thin layer, without any arithmetic.

Nothing here imports flwr when it is imported; an app that Flower starts does.
"""
