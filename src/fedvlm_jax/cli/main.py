"""The `fedvlm` command: `cli/` holds one file per subcommand, and this file finds them.

A command's file defines one function, named like the file, whose signature is its options; whatever is heavy it imports
when it runs. So `fedvlm --help` imports neither jax nor transformers.
"""

import contextlib
import functools
import importlib
import inspect
import io
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path

import tyro

from fedvlm_jax import __version__
from fedvlm_jax.cli._flags import WORDS, expand_rate
from fedvlm_jax.cli._help import ALL, WIDTH, show_help
from fedvlm_jax.cli._parsing.method_and_data_options import make_signature
from fedvlm_jax.cli._parsing.numbers import make_registry
from fedvlm_jax.cli._process.signals import exit_code, heed_signals, say
from fedvlm_jax.errors import UserError, check_utf8, describe_os_error
from fedvlm_jax.utils.option_ranges import check_arguments
from fedvlm_jax.utils.standard_streams import (
    PIPE_GONE,
    is_reader_gone,
    quieten_libraries,
    silence,
    silence_closed_loops,
    soften,
)

ORDER = (
    "data", "explain", "plan", "train", "compare", "evaluate", "ask", "demo", "report", "audit", "export", "deploy",
    "node", "cache",
)  # fmt: skip

DESCRIPTION = (
    "Federated fine-tuning of vision-language models: one frozen base, a low-rank adapter per client, a part of it "
    "shared. `fedvlm train` without options runs on what ships with the package; --version says which release this is."
)


def commands_available() -> dict[str, Callable[..., None]]:
    """Find the subcommands: every public file beside this one, in the order in which they are used."""
    stems = {path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")} - {"main"}
    ranked = sorted(stems, key=lambda stem: (ORDER.index(stem) if stem in ORDER else len(ORDER), stem))
    return {stem.replace("_", "-"): getattr(importlib.import_module(f"fedvlm_jax.cli.{stem}"), stem) for stem in ranked}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line: the words after `fedvlm`, those of the process by default.

    Bad input, and a disk that fails, end it with one message on stderr and exit code 2; Ctrl-C with 130, SIGTERM with
    143, SIGHUP with 129.
    """
    words = list(sys.argv[1:] if args is None else args) or ["--help"]
    quieten_libraries()
    soften()
    silence_closed_loops()
    try:
        with heed_signals():
            for word in words:
                check_utf8("the word", word)
            words = expand_rate(words)
            WORDS.set(tuple(words))
            _dispatch(words)
        sys.stdout.flush()
    except UserError as error:
        raise SystemExit(say(str(error), 2)) from None
    except MemoryError as error:
        raise SystemExit(say(f"there is not enough memory for that: {error or 'ask for less'}", 2)) from None
    except BrokenPipeError as error:
        if not is_reader_gone():  # it was another pipe
            raise SystemExit(say(describe_os_error(error), 2)) from None
        silence()
        raise SystemExit(PIPE_GONE) from None
    except OSError as error:  # of a disk, or of what stands on it
        raise SystemExit(say(describe_os_error(error), 2)) from None
    except KeyboardInterrupt as error:
        raise SystemExit(say("stopped", exit_code(error))) from None


def _dispatch(words: list[str]) -> None:
    if words in (["--version"], ["-V"]):
        print(f"fedvlm {__version__}")
        return
    commands = commands_available()
    name, *rest = words
    if name in ("-h", "--help"):
        lines = ["usage: fedvlm COMMAND [OPTIONS]", "", *textwrap.wrap(DESCRIPTION, WIDTH), ""]
        for name, command in commands.items():
            about = " ".join((inspect.getdoc(command) or "").partition("\n\n")[0].split())
            lines += textwrap.wrap(f"{name:10} {about}", WIDTH, subsequent_indent=" " * 11)
        print("\n".join([*lines, "", "fedvlm COMMAND --help lists its options."]))
        return
    if name not in commands:
        raise UserError(f"there is no command {name}; there are {', '.join(commands)}")
    asked = next((word for word in rest if word in ("-h", "--help", ALL)), "")
    rest = ["--help" if word == ALL else word for word in rest]
    chosen: list[Callable[[], None]] = []
    # Parsing only notes what is to be done: what is printed while parsing is caught, what is printed while working not.
    shown, complaint, reasons = io.StringIO(), io.StringIO(), list[str]()
    command = _defer(commands[name], rest, chosen)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(complaint):
            tyro.cli(command, prog=f"fedvlm {name}", args=rest, registry=make_registry(reasons))
    except SystemExit as stop:
        if stop.code in (0, None):
            text = shown.getvalue()  # what is no help is a script that completes words in a shell
            if asked:
                about = sys.modules[commands[name].__module__]
                refused, required = (getattr(about, marked, ()) for marked in ("REFUSED", "REQUIRED"))
                text = show_help(text, everything=asked == ALL, refused=refused, required=required)
            print(text)
            raise
        sentence = _read_box(complaint.getvalue())
        flag = re.match(r"Error parsing (--[\w.-]+)", sentence)
        if flag and reasons:  # tyro's own sentence lists what else could have stood there
            sentence = f"{flag[1]}: {reasons[-1]}"
        raise UserError(f"{sentence} (fedvlm {name} {ALL} lists what there is)") from None
    for work in chosen:
        work()


def _defer(command: Callable[..., None], words: Sequence[str], chosen: list[Callable[[], None]]) -> Callable[..., None]:
    @functools.wraps(command)
    def note(*args: object, **kwargs: object) -> None:
        chosen.append(lambda: _check_and_run(command, args, kwargs))

    note.__signature__ = make_signature(command, words)  # type: ignore[attr-defined]  # which tyro reads
    return note


def _check_and_run(command: Callable[..., None], args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    check_arguments(command, inspect.signature(command).bind(*args, **kwargs).arguments)
    command(*args, **kwargs)


def _read_box(text: str) -> str:
    """Take the sentence out of the frame that tyro draws around its errors, and the flag that it would suggest."""
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    # The title stands in the frame's upper edge, or, where stdout is not UTF-8, above a first rule.
    body = lines[1:-1] if lines[0].startswith("╭") else lines[2:]
    rows = [line.strip("│ ") for line in body]
    # Above the next rule stands what is wrong; below it come suggestions, one flag per row.
    rules = [number for number, row in enumerate(rows) if row and not row.strip("─-")]
    above = rules[0] if rules else len(rows)
    sentence = " ".join(row for row in rows[:above] if row).rstrip(".") or " ".join(text.split())
    sentence = re.sub(r"^Error parsing \S+: (?=--)", "", sentence)
    flags = [row.split()[0].rstrip(",") for row in rows[above:] if re.match(r"--\w", row)]
    wrong = re.search(r"--[\w.-]+", sentence)
    # Those that tyro finds equally alike come in any order.
    flag = max(flags, key=lambda flag: SequenceMatcher(None, wrong[0] if wrong else "", flag).ratio(), default=None)
    return f"{sentence}; did you mean {flag}?" if flag and sentence.startswith("Unrecognized") else sentence
