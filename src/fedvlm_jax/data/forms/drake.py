"""DRAKE's and HFLB's sets (arXiv 2506.11024): folders `SET/train/dataset-K.json` and `SET/test/dataset-K.json`.

As the authors' public code reads them: each file is a list of LLaVA's conversations, paths of pictures begin with
`dataset/`, the folder of the sets, and a scenario (JSON: `client_id` and `datasets` of each client) gives each client
its tasks. Without a scenario every task is a client. The order of a client's tasks in time,
which DRAKE has besides, is not kept: a client trains on all of them, as in the code's setting without it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

import tyro

from fedvlm_jax.data.forms.base import Form, TurnOptions, settle
from fedvlm_jax.errors import UserError, describe_os_error
from fedvlm_jax.records.files import LARGEST, Content, Part, Record, gather
from fedvlm_jax.records.text_files import read_json
from fedvlm_jax.utils.files import read_plain
from fedvlm_jax.utils.option_ranges import shorten
from fedvlm_jax.utils.serialization import fit

TASK = re.compile(r"dataset-(\d+)\.json")
Task = tuple[str, int]
"""A set's name, and the number of its subset."""


@dataclass(frozen=True)
class Options(TurnOptions):
    """DRAKE"""

    form: Form = "drake"
    scenario: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE.json", help_behavior_hint="(default: every task is a client)")
    ] = None
    """The authors' file that says which client has which tasks."""

    def find_content(self) -> Content:
        """Find the files of every client's tasks.

        Raises:
            UserError: there are none, the scenario is damaged, or a task of it is not there.
        """
        folder = self.where
        there = {
            (file.parts[-3], int(found[1]))
            for file in folder.glob("*/train/dataset-*.json")
            if (found := TASK.fullmatch(file.name))
        }
        if not there:
            raise UserError(f"{folder} is no folder of DRAKE's sets: expected SET/train/dataset-0.json in it")
        clients = {f"{name}-{number}": [(name, number)] for name, number in sorted(there)}
        if self.scenario is not None:
            clients = read_scenario(self.scenario.expanduser())
        if missing := [task for tasks in clients.values() for task in tasks if task not in there]:
            name, number = missing[0]
            raise UserError(
                f"--data.scenario {self.scenario} has {shorten(name)}, subset {shorten(str(number))}, and {folder} has "
                "no train/dataset of it: fetch that set too"
            )
        cells = [
            (client, split, PurePath(name, split, f"dataset-{number}.json"))
            for client, tasks in clients.items()
            for name, number in tasks
            for split in ("train", "test")
        ]
        content = gather(folder, [name for _, _, name in cells])
        parts = [
            part._replace(base="", split=split, label=client)
            for part, (client, split, _) in zip(content.parts, cells, strict=True)
        ]
        return content._replace(parts=tuple(parts))

    def read_records(self, part: Part, pictures: bool) -> Iterator[Record]:
        """Read a task's conversations, with their client and split."""
        for record in read_json(part.file):
            if isinstance(record, str):
                yield record
                continue
            image = record.get("image")
            placed = list(map(place_picture, image)) if isinstance(image, list) else place_picture(image)
            yield settle({**record, "image": placed}, part)


def place_picture(path: Any) -> Any:
    """Write the path of a picture from the folder of the sets on; what is no text stays.

    >>> place_picture("./dataset/VSR/images/1.jpg"), place_picture("VSR/images/1.jpg")
    ('VSR/images/1.jpg', 'VSR/images/1.jpg')
    """
    return path.removeprefix("./").removeprefix("dataset/") if isinstance(path, str) else path


def read_scenario(file: Path) -> dict[str, list[Task]]:
    """Read a scenario: client -> its tasks, without those that only stand for a pause.

    Raises:
        UserError: it is none.
    """
    try:
        if (size := file.stat().st_size) > LARGEST:
            raise UserError(f"it has {size:,} bytes")
        clients = dict[str, list[Task]]()
        for client in fit(list[dict[str, Any]], json.loads(read_plain(file)), "scenario"):
            number = str(fit(int, client["client_id"], "client_id"))
            if number in clients:
                raise UserError(f"client {shorten(number)} is in it twice")
            clients[number] = [
                (fit(str, task["dataset"], "dataset"), fit(int, task["subset_id"], "subset_id"))
                for task in fit(list[dict[str, Any]], client["datasets"], "datasets")
                if task.get("dataset") != "dummy"
            ]
        if not any(clients.values()):
            raise UserError("nobody has a task in it")
        return clients
    except OSError as error:
        raise UserError(f"--data.scenario {describe_os_error(error)}") from None
    except (ValueError, KeyError, RecursionError) as error:
        raise UserError(f"--data.scenario {file} is no scenario of DRAKE ({error})") from None
