"""Trackers, a file each: `PACKAGE` and `REQUIREMENT`, what must be installed, `check` and `open_tracker`."""
