"""Real clients over a network: a node that holds its rows and its personal state, and a coordinator that has neither."""
