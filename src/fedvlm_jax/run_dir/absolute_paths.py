"""Absolute paths in a run's options, so that a stored run means the same from every working folder; moved data."""

import os
from dataclasses import replace
from pathlib import Path

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.sources.registry import list_sets
from fedvlm_jax.errors import UserError, check_utf8

FOLDERS = ("path", "image_root", "scenario")
"""Options of some data sources that say where files are, and nothing else; so does `source`, where it is a path."""


def anchor(run: Run) -> Run:
    """Return the run with absolute paths in place of relative ones.

    Raises:
        UserError: such a path has bytes that are no UTF-8.

    >>> anchor(Run()) == Run()  # shipped data and a shipped model: names, not paths
    True
    """
    source, model = run.data.source, run.model
    if source not in list_sets() and Path(source).expanduser().exists():
        source = str(_absolute(source))
    if Path(model).is_dir():  # else it is the name of a shipped model, or a hub id
        model = str(_absolute(model))
    cache = run.system.cache_dir and _absolute(run.system.cache_dir)
    start = run.start and _absolute(run.start)
    rewards = run.preference.reward_file and _absolute(run.preference.reward_file)
    preference = replace(run.preference, reward_file=rewards)
    places = {name: _absolute(place) for name in FOLDERS if (place := getattr(run.data, name, None)) is not None}
    data, system = run.data.replace(source=source, **places), replace(run.system, cache_dir=cache)
    return replace(run, model=model, data=data, system=system, start=start, preference=preference)


def move(run: Run, places: Run) -> Run:
    """Return the run with data and model where they are now: those of `places` that are not an option's default."""
    now, default = anchor(places), Run()
    folders = {name: getattr(now.data, name, None) for name in FOLDERS if hasattr(run.data, name)}
    data = {name: place for name, place in folders.items() if place is not None}
    if now.data.source != default.data.source:
        data["source"] = now.data.source
    model = now.model if now.model != default.model else run.model
    return replace(run, model=model, data=run.data.replace(**data))


def _absolute(path: str | Path) -> Path:
    place = Path(path).expanduser().absolute()
    check_utf8("the path", str(place))  # of the working folder too
    return place


def find_places(folder: Path, run: Run) -> None:
    """See that data and model of the run in a folder are where they were.

    Raises:
        UserError: one is not, with how to name its new place.
    """
    shards = getattr(run.data, "path", None)
    path = ("--data.path", str(shards)) if shards else ("--data", run.data.source)
    for flag, place in (path, ("--model", run.model)):  # a relative one is a name: paths were made absolute
        if Path(place).is_absolute() and not os.path.exists(place):  # noqa: PTH110  it raises for no name
            flag = f"--data {run.data.source} {flag}" if flag == "--data.path" else flag
            raise UserError(
                f"{place}, of which the run in {folder} was made, is not there; if it has moved, say so: fedvlm train "
                f"--resume {folder} {flag} PLACE"
            )
