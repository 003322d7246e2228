"""FedVLMBench's sets (arXiv 2506.09638): LLaVA's conversations, a file for each client, and test files for all of them.

As the authors' public code reads them: `clients/train/client_N.json` is a client's; of `clients/test` it is `test.json`
where that is alone, else all the others, a file for each task. They test every model on all of it, so each client has
all test rows here too. Pictures lie elsewhere: `--data.image-root`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from fedvlm_jax.data.forms.base import Form, TurnOptions, settle
from fedvlm_jax.errors import UserError
from fedvlm_jax.records.files import Content, Part, Record, gather
from fedvlm_jax.records.text_files import read_json

TRAIN, TEST = PurePath("clients", "train"), PurePath("clients", "test")
CLIENT = re.compile(r"(client_\d+)\.json")


@dataclass(frozen=True)
class Options(TurnOptions):
    """A set of FedVLMBench"""

    form: Form = "fedvlmbench"

    def find_content(self) -> Content:
        """Find the clients' files, and those that all are tested on.

        Raises:
            UserError: there are none, or one leads out of the folder.
        """
        folder = self.where
        trains = sorted(file.name for file in (folder / TRAIN).glob("*.json") if CLIENT.fullmatch(file.name))
        tests = sorted(file.name for file in (folder / TEST).glob("*.json"))
        tests = [name for name in tests if name != "test.json"] if len(tests) > 1 else tests
        if not trains or not tests:
            raise UserError(
                f"{folder} is no set of FedVLMBench: expected {TRAIN}/client_0.json and so on, and {TEST}/test.json"
            )
        clients = [name.removesuffix(".json") for name in trains]
        names = [*(TRAIN / name for name in trains), *(TEST / name for _ in clients for name in tests)]
        whose = [*clients, *(client for client in clients for _ in tests)]
        content = gather(folder, names)
        splits = ["train"] * len(trains) + ["test"] * (len(names) - len(trains))
        parts = [
            part._replace(base="", split=split, label=client)
            for part, split, client in zip(content.parts, splits, whose, strict=True)
        ]
        return content._replace(parts=tuple(parts))

    def read_records(self, part: Part, pictures: bool) -> Iterator[Record]:
        """Read a file's conversations, with their client and split."""
        for record in read_json(part.file):
            yield record if isinstance(record, str) else settle(record, part)
