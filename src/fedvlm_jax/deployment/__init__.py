"""Real clients over a network: nodes that hold their rows and personal states, and a coordinator that has neither."""
