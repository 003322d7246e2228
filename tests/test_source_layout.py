"""The house stays one that a reader finds their way in: small folders and rooms, docstrings that begin well."""

import ast
import re
from collections import Counter
from pathlib import Path

import fedvlm_jax

PACKAGE = Path(fedvlm_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
BAD_BEGINNING = re.compile(r"(What|Who|Whose|How|Of|Is|Are|Where|When|Which|Does|Do|Can|The same)\b")


def count_lines(files):
    return sum(path.read_text(encoding="utf-8").count("\n") for path in files)


def read_docstrings():
    """Every docstring of the package, with its place."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 1)}", text


def test_folders_hold_at_most_twenty_files():
    """The zoo of methods apart, where a file is a method."""
    folders = {path.parent for path in FILES} - {PACKAGE / "methods" / "zoo"}
    sizes = {str(folder.relative_to(PACKAGE)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in sizes.items() if count > 20} == {}


def test_no_room_holds_more_than_fifteen_percent_of_the_source():
    """A family of models is a room of its own: it is read alone, and there are ever more of them."""
    total, lines = count_lines(FILES), Counter()
    for path in FILES:
        room, *inside = path.relative_to(PACKAGE).parts[:-1] or ("",)
        lines["/".join((room, *inside[:1])) if room == "models" else room] += count_lines([path])
    assert {room: count / total for room, count in lines.items() if count > 0.15 * total} == {}


def test_docstrings_begin_with_a_verb_or_the_noun():
    """An occasional one may not; more than one in a hundred is a habit."""
    docstrings = list(read_docstrings())
    bad = [place for place, text in docstrings if BAD_BEGINNING.match(text)]
    assert len(bad) < 0.01 * len(docstrings), bad


def test_docstrings_show_examples():
    docstrings = [text for _, text in read_docstrings()]
    assert sum(">>> " in text for text in docstrings) > 0.1 * len(docstrings)


SEVERAL = {  # lines that are reached with more than one alone, or that no user sees
    "{len(looked_at)} clients", "{len(runs)} runs", "{len(rows)} clients", "{len(records)} runs",
    "{len(names)} clients",
    "{len(predictions)} predictions", "{len(references)} lists", "{len(given)} pictures", "{len(paths)} pictures",
    "{len(rows)} rows", "{len(clients)} clients",
}  # fmt: skip


def test_a_single_thing_is_not_told_of_as_several():
    """A message had said "1 clients": `format_count` writes a number of things."""
    text = "".join(path.read_text(encoding="utf-8") for path in FILES)
    found = re.findall(r"\{len\([^{}]*\)(?::,)?\} (?:training )?[a-z]{3,}s\b", text)
    assert {text for text in found if not text.endswith((" bytes", " characters"))} == SEVERAL
