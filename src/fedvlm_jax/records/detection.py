"""Forms of paths, found by looking at names and the first bytes of files.

Nothing heavy is imported here, because the command line is made for the form that is found.
"""

import json
import os
import re
from pathlib import Path, PurePath
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.records.files import DESCRIPTIONS, METADATA, PICTURE, read_start, walk

FORMS = {
    "parquet": "parquet files",
    "json": "JSON lines or a JSON list, with columns, TRL's messages or LLaVA's conversations",
    "csv": "CSV or TSV",
    "imagefolder": "pictures with metadata.jsonl, .csv or .parquet, or in a folder for every class",
    "coco": "COCO captions",
    "fedvlmbench": "a set of FedVLMBench, clients/train/client_0.json and so on",
    "drake": "the folder of DRAKE's sets, SET/train/dataset-0.json and so on",
    "saved": "a folder of datasets.save_to_disk",
    "hub": "owner/name of the Hugging Face hub",
}
SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
LAYOUTS = {"fedvlmbench": "clients/train/client_*.json", "drake": "*/train/dataset-*.json"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FIRST = 2**20  # characters of a file's first line that are looked at


def find_form(source: str) -> str:
    """Find the form of what `--data` names; that of a path that does not exist by its name.

    Raises:
        UserError: a file or folder of no form, or of several.

    >>> find_form("rows.csv"), find_form("openbmb/RLAIF-V-Dataset")
    ('csv', 'hub')
    """
    path = Path(source).expanduser()
    form = SUFFIXES.get(path.suffix.lower())
    if not os.path.exists(path):  # noqa: PTH110  it raises for no name
        # A mistyped path is not asked for on the hub, where its folder is here.
        return form or ("hub" if HUB_ID.fullmatch(source) and not path.parent.is_dir() else "parquet")
    if path.is_dir():
        return _find_folder_form(path)
    if form is None and read_start(path, 4) == "PAR1":
        return "parquet"
    if form is None:
        raise UserError(f"{path} is of no form that is read. {list_forms()}")
    return _find_json_form(path) if path.suffix.lower() == ".json" else form


def list_forms() -> str:
    """List the forms, for messages."""
    listed = "; ".join(f"{name} ({what})" for name, what in FORMS.items())
    return f"Forms are {listed}. --data.form NAME says which one it is."


def _find_folder_form(folder: Path) -> str:
    for form, layout in LAYOUTS.items():
        if next(folder.glob(layout), None):
            return form
    found, documents, pictures = dict[str, None](), list[Path](), False
    for place, names in walk(folder):
        if not place.name and ("dataset_dict.json" in names or _is_saved(names)):
            return "saved"
        if {*METADATA} & {*names}:
            return "imagefolder"
        for name in names:
            suffix = PurePath(name).suffix.lower()
            pictures = pictures or PICTURE.fullmatch(name) is not None
            if suffix == ".parquet" or (not place.name and suffix in SUFFIXES and suffix != ".json"):
                found[SUFFIXES[suffix]] = None
            if suffix == ".json" and not place.name and name not in DESCRIPTIONS:  # much else is written in it too
                documents.append(folder / name)
        if found:
            break
    forms = list(found) or list(dict.fromkeys(map(_find_json_form, documents))) or ["imagefolder"] * pictures
    if len(forms) != 1:
        said = f"may be {' or '.join(forms)}" if forms else "is of no form that is read"
        raise UserError(f"the folder {folder} {said}. {list_forms()}")
    return forms[0]


def _is_saved(names: list[str]) -> bool:
    return "state.json" in names and any(PurePath(name).suffix == ".arrow" for name in names)


def _find_json_form(file: Path) -> str:
    """Tell a list, or lines, from the one object that COCO's captions are."""
    start = read_start(file, FIRST).lstrip("\ufeff \t\r\n")
    try:
        first: Any = json.loads(start.partition("\n")[0]) if start.startswith("{") else {}
    except (ValueError, RecursionError):  # an object over several lines, or a long one
        return "coco"
    return "coco" if {"images", "annotations"} <= {*first} else "json"
