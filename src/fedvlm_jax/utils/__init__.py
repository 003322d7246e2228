"""Trees, random streams, files, caches and texts, for every other room."""
