"""The same rows in every form that people's own data have: shipped pictures, a question, an answer, a client."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from rlaif_pictures import read_emoji

Row = dict[str, Any]
FIXED = "What is it?"


def make_own_rows(count: int = 12) -> list[Row]:
    """Rows with encoded pictures, all alike but for their question where a form has one for all."""
    rows = []
    for number, picture in enumerate(read_emoji()[::90][:count]):
        asked = picture.questions[0]
        row = {"file": f"{number:02d}{picture.suffix}", "bytes": picture.encoded, "question": FIXED}
        rows.append(row | {"chosen": asked.chosen, "client": ("north", "south")[number % 2]})
    return rows


def write_pictures(folder: Path, rows: Sequence[Row]) -> None:
    """One file a row, in a folder of its client."""
    for row in rows:
        file = folder / row["client"] / row["file"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["bytes"])


def list_plain(rows: Sequence[Row], image: str = "image") -> list[Row]:
    """Rows with the names of their pictures."""
    kept = ("question", "chosen", "client")
    return [{image: f"{row['client']}/{row['file']}", **{name: row[name] for name in kept}} for row in rows]


def talk(question: str, answer: str | None = None, *, parts: bool = False) -> list[Row]:
    """Messages in TRL's form."""
    user: Any = [{"type": "image", "text": None}, {"type": "text", "text": question}] if parts else question
    says: Any = [{"type": "text", "text": answer}] if parts else answer
    return [{"role": "user", "content": user}] + ([{"role": "assistant", "content": says}] if answer else [])


def _write_lines(file: Path, rows: Sequence[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _write_json(file: Path, rows: Sequence[Row]) -> Path:
    file.write_text(json.dumps(list(rows), indent=1, ensure_ascii=False))
    return file


def _write_csv(file: Path, rows: Sequence[Row], delimiter: str = ",") -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


def _make_dataset(rows: Sequence[Row], **columns: Any) -> datasets.Dataset:
    """Rows with embedded pictures, the client a class of a name."""
    names = ["north", "south"]
    made = {
        "image": [{"bytes": row["bytes"], "path": None} for row in rows],
        "question": [row["question"] for row in rows],
        "chosen": [row["chosen"] for row in rows],
        "client": [names.index(row["client"]) for row in rows],
    } | columns
    texts = {name: datasets.Value("string") for name in ("question", "chosen")}
    known = {"image": datasets.Image(), "client": datasets.ClassLabel(names=names), **texts}
    if columns:
        return datasets.Dataset.from_dict(made)
    return datasets.Dataset.from_dict(made, features=datasets.Features(known))


def _write_trl(file: Path, rows: Sequence[Row]) -> Path:
    made = {
        "images": [[{"bytes": row["bytes"], "path": None}] for row in rows],
        "prompt": [talk(row["question"], parts=True) for row in rows],
        "chosen": [talk("", row["chosen"], parts=True)[1:] for row in rows],
        "rejected": [talk("", "no", parts=True)[1:] for row in rows],
        "client": [row["client"] for row in rows],
    }
    datasets.Dataset.from_dict(made).to_parquet(file)
    return file


def _write_classes(folder: Path, rows: Sequence[Row]) -> Path:
    for row in rows:
        file = folder / row["client"] / row["chosen"] / row["file"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["bytes"])
    return folder


def _write_coco(file: Path, rows: Sequence[Row]) -> Path:
    images = [{"id": n, "file_name": f"{row['client']}/{row['file']}", "height": 64} for n, row in enumerate(rows)]
    said = [{"id": n, "image_id": n, "caption": row["chosen"]} for n, row in enumerate(rows)]
    about = {"info": {"year": 2017}, "licenses": [{"id": 1}], "images": images, "annotations": said[::-1]}
    file.write_text(json.dumps(about))
    return file


def _write_llava(file: Path, rows: Sequence[Row]) -> Path:
    made = []
    for number, row in enumerate(rows):
        says = [("human", f"<image>\n{row['question']}"), ("gpt", row["chosen"])]
        turns = [{"from": who, "value": text} for who, text in says]
        image = f"{row['client']}/{row['file']}"
        made.append({"id": f"{number:06d}", "image": image, "conversations": turns, "client": row["client"]})
    return _write_json(file, made)


def _save(folder: Path, made: datasets.Dataset | datasets.DatasetDict) -> Path:
    made.save_to_disk(folder)
    return folder


def _write_metadata(folder: Path, rows: Sequence[Row], suffix: str) -> Path:
    listed = list_plain(rows, "file_name")
    file = folder / f"metadata{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(listed).to_parquet(file)
    else:
        (_write_csv if suffix == ".csv" else _write_lines)(file, listed)
    return folder


BY_FOLDER = {"client_folder": 1}
ASKED = {"question": FIXED}
FORMS: dict[str, tuple[str, dict[str, Any], Callable[[Path, Sequence[Row]], Path]]] = {
    "lines": ("json", {}, lambda folder, rows: _write_lines(folder / "rows.jsonl", list_plain(rows))),
    "a list": ("json", {}, lambda folder, rows: _write_json(folder / "rows.json", list_plain(rows))),
    "a folder of lines": ("json", {}, lambda folder, rows: _write_lines(folder / "a.jsonl", list_plain(rows)).parent),
    "CSV": ("csv", {}, lambda folder, rows: _write_csv(folder / "rows.csv", list_plain(rows))),
    "CSV with semicolons": ("csv", {}, lambda folder, rows: _write_csv(folder / "rows.csv", list_plain(rows), ";")),
    "TSV": ("csv", {}, lambda folder, rows: _write_csv(folder / "rows.tsv", list_plain(rows), "\t")),
    "metadata.jsonl": ("imagefolder", {}, lambda folder, rows: _write_metadata(folder, rows, ".jsonl")),
    "metadata.csv": ("imagefolder", {}, lambda folder, rows: _write_metadata(folder, rows, ".csv")),
    "metadata.parquet": ("imagefolder", {}, lambda folder, rows: _write_metadata(folder, rows, ".parquet")),
    "classes": ("imagefolder", BY_FOLDER | ASKED, lambda folder, rows: _write_classes(folder / "classes", rows)),
    "COCO": ("coco", BY_FOLDER | ASKED, lambda folder, rows: _write_coco(folder / "captions.json", rows)),
    "LLaVA": ("json", {}, lambda folder, rows: _write_llava(folder / "llava.json", rows)),
    "TRL": ("parquet", {}, lambda folder, rows: _write_trl(folder / "trl.parquet", rows)),
    "saved": ("saved", {}, lambda folder, rows: _save(folder / "saved", _make_dataset(rows))),
    "columns of other names": (
        "json",
        {"columns": ("image=photo", "chosen=answer", "question=prompt")},
        lambda folder, rows: _write_lines(
            folder / "rows.jsonl",
            [
                {"photo": row["image"], "prompt": row["question"], "answer": row["chosen"], "client": row["client"]}
                for row in list_plain(rows)
            ],
        ),
    ),
}
"""Name -> its form, the options that it needs, and what writes it beside the pictures."""


def make_saved(rows: Sequence[Row]) -> datasets.Dataset:
    """The rows as `datasets` has them."""
    return _make_dataset(rows)
