"""Measure the source of checkouts: its size, comments and docstrings, rooms and folders, and what `fedvlm plan` takes.

    python tools/measure_source.py src
    git archive COMMIT src | tar -x -C OLD && python tools/measure_source.py OLD/src src     # a column each

Comments are counted by token, also those behind code. A room is a folder of the package. `fedvlm plan` is made of its
command and of the files that only these files and the parser of all commands (`cli/_*`) import.
"""

import argparse
import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "fedvlm_jax"
PLAN = f"{PACKAGE}.cli.plan"
BEGINNING = re.compile(r"(What|Who|How|Of|Is)\b")


def main() -> None:
    """Print a table with a column for each checkout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path, metavar="SRC", help=f"a folder that holds {PACKAGE}")
    found = [measure(source / PACKAGE) for source in parser.parse_args().sources]
    print(f"| |{' |' * len(found)}\n| --- |{' ---: |' * len(found)}")
    for name in found[0]:
        print(f"| {name} | {' | '.join(column[name] for column in found)} |")


def measure(package: Path) -> dict[str, str]:
    """Return what there is to say of a package, by name."""
    texts = {file.relative_to(package): file.read_text(encoding="utf-8") for file in sorted(package.rglob("*.py"))}
    if not texts:
        raise SystemExit(f"{package}: no Python files there")
    trees = {file: ast.parse(text) for file, text in texts.items()}
    lines = {file: text.count("\n") for file, text in texts.items()}
    total = sum(lines.values())
    docstrings = [docstring for module in trees.values() for docstring in list_docstrings(module)]
    rooms = Counter[str]()
    for file, count in lines.items():
        if len(file.parts) > 1:
            rooms[file.parts[0]] += count
    ((room, most),) = rooms.most_common(1)
    ((folder, files),) = Counter(file.parent for file in texts if file.name != "__init__.py").most_common(1)
    own = find_own(PLAN, {name_module(file): list_imports(module) for file, module in trees.items()})
    plan = sum(lines[file] for file in lines if name_module(file) in own and file.name != "__init__.py")
    examples = sum(">>>" in docstring for docstring in docstrings)
    beginnings = sum(BEGINNING.match(docstring) is not None for docstring in docstrings)
    return {
        "lines of source": f"{total:,}",
        "comments, share of lines": f"{sum(map(count_comments, texts.values())) / total:.1%}",
        "docstrings with an example": f"{examples / len(docstrings):.1%}",
        "docstrings that begin with What, Who, How, Of or Is": f"{beginnings / len(docstrings):.1%}",
        "largest room, share of the source": f"{most / total:.1%} ({room})",
        "files in the fullest folder": f"{files} ({folder})",
        "`fedvlm plan` and all behind it, lines": f"{plan:,}",
    }


def count_comments(text: str) -> int:
    """Count the comments of a file."""
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))


def list_docstrings(module: ast.Module) -> Iterator[str]:
    """Yield the docstrings of a file, its classes and its functions."""
    for node in ast.walk(module):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (docstring := ast.get_docstring(node)):
            yield docstring


def name_module(file: Path) -> str:
    """Name the module that a file of the package is: `cli/plan.py` is `fedvlm_jax.cli.plan`."""
    return ".".join((PACKAGE, *file.with_suffix("").parts)).removesuffix(".__init__")


def list_imports(module: ast.Module) -> set[str]:
    """List what a file imports anywhere in it; of `from a import b` both `a` and `a.b`, whichever is a module."""
    found = set[str]()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def find_own(module: str, imports: Mapping[str, set[str]]) -> set[str]:
    """Find the module, and of what it imports, directly or not, what no other module but the parser's imports."""
    own, rest = set[str](), [module]
    while rest:
        if (name := rest.pop()) not in own:
            own.add(name)
            rest += [other for other in imports[name] if other in imports]
    others = {name for name in imports if not name.startswith(f"{PACKAGE}.cli._")}
    while shared := {name for other in others - own for name in imports[other] & own} - {module}:
        own -= shared
    return own


if __name__ == "__main__":
    main()
