"""Every block that README and docs show runs: Python is executed, command lines are parsed with their options."""

import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from fedvlm_jax.cli import main
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.option_checks import validate, validate_comparison
from fedvlm_jax.config.run_options import Run

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
STANDS_FOR = {"RUN": "runs/x", "./Florence-2-base": "microsoft/Florence-2-base", "./clip-vit-base-patch16": "openai/x"}
"""Words that a reader replaces."""


def find_blocks(page, kind):
    """The page's fenced blocks of a language; those with further attributes are executed by mkdocs."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def list_commands(page):
    """Every `fedvlm` command of a page's blocks, as words."""
    for text in find_blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            for command in re.findall(r"(?<![\w/.])fedvlm ([a-z]+(?:'[^']*'|[^&|'])*)", line.partition(" #")[0]):
                command += '"' * (command.count('"') % 2)  # a command inside of another's quotes
                yield [STANDS_FOR.get(word, word) for word in shlex.split(command) if word not in ("...", "")]


def name_page(page):
    return str(page.relative_to(ROOT))


PYTHON = [page for page in PAGES if find_blocks(page, "python")]
COMMANDS = {" ".join(words): words for page in PAGES for words in list_commands(page)}


def test_there_is_something_to_check():
    assert README in PYTHON
    assert len(PYTHON) >= 4
    assert len(COMMANDS) >= 30


@pytest.mark.parametrize("page", PYTHON, ids=name_page)
def test_python_runs_as_it_stands(page):
    """The blocks of a page go on from each other."""
    names = {"__name__": "page"}
    for text in find_blocks(page, "python"):
        exec(compile(text, str(page), "exec"), names)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=" ".join)
def test_commands_name_options_that_there_are(words, monkeypatch):
    """Parsed and judged as the command line does; nothing is run."""
    asked = []
    monkeypatch.setattr(main, "_check_and_run", lambda command, args, kwargs: asked.append((args, kwargs)))
    main._dispatch(words)
    ((args, kwargs),) = asked
    for value in (*args, *kwargs.values()):
        if isinstance(value, Run):
            validate(value)
        elif isinstance(value, Compare):
            validate_comparison(value)


def test_readme_is_a_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 10_000


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md"], ids=name_page)
def test_links_to_files_lead_to_files(page):
    """Those of docs/ are checked by `mkdocs build --strict`."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


NEW = {f"methods/zoo/{name}.py" for name in ("encoder_b", "prompt_half", "prompt_pair")}
"""Files that a page tells the reader to write."""


def test_every_file_that_a_page_names_is_there():
    """Paths into the repository in backticks, and Python files of it, its package or its tests anywhere."""
    texts = {
        page: page.read_text(encoding="utf-8") for page in PAGES if page.name != "log.md"
    }  # it names what there was
    folders = "benchmarks|experiments|tests|examples|src|tools"
    patterns = (rf"`((?:{folders})/[\w./-]+)`", r"[\w./-]+/\w+\.py\b")
    named = {(page, path) for page, text in texts.items() for form in patterns for path in re.findall(form, text)}
    assert len(named) > 50
    roots = (ROOT, ROOT / "src" / "fedvlm_jax", ROOT / "tests")
    missing = {(page, path) for page, path in named if not any((at / path).exists() for at in (*roots, page.parent))}
    assert sorted((name_page(page), path) for page, path in missing if path not in NEW) == []


def test_every_module_that_a_page_names_is_there():
    """In backticks, with the names in it."""
    names = {
        name for page in PAGES for name in re.findall(r"`(fedvlm_jax(?:\.\w+)+)", page.read_text(encoding="utf-8"))
    }
    assert names
    assert sorted(name for name in names if not is_there(name)) == []


def is_there(name):
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


@pytest.mark.parametrize("module", ["fedvlm_jax", *(f"fedvlm_jax.{room}" for room in ("lora", "models", "methods"))])
def test_public_names_are_documented(module):
    """What `__all__` names, functions, classes and modules, has a docstring of its own."""
    room = importlib.import_module(module)
    public = {name: getattr(room, name) for name in room.__all__}
    ours = [name for name, thing in public.items() if getattr(thing, "__module__", module).startswith("fedvlm_jax")]
    texts = {name: public[name].__doc__ or "" for name in ours}
    assert texts
    assert [name for name, text in texts.items() if not text or text.startswith(f"{name}(")] == []  # or a made-up one
