"""A run's options, and whether they can work; judged before any data or weights are read."""
