"""Trackers that get a run's numbers beside `metrics.jsonl`; `trackers/` has a file per tracker."""
