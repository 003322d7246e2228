"""The files of a run's folder: writing, checking, reading."""
