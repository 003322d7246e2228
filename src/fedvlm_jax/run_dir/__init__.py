"""A run's folder: written so that a kill loses nothing, read as a stranger's."""
