"""Rich's console, safe for texts of strangers, on terminals that may know only ASCII or whose reader leaves."""

from typing import NoReturn

from rich.console import Console

from fedvlm_jax.utils.standard_streams import PIPE_GONE, silence
from fedvlm_jax.utils.untrusted_text import clean


class Terminal(Console):
    """A console on which markup in a text is text, and control characters are escaped."""

    def say(self, text: str, style: str | None = None) -> None:
        """Print a text as it stands, lines unbroken and without what would move the cursor."""
        self.print(clean(text, "\n"), style=style, markup=False, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> NoReturn:
        """End quietly: whoever read this has seen enough."""
        self.quiet = True
        silence()
        raise SystemExit(PIPE_GONE)


def open_console(*, stderr: bool = False) -> Terminal:
    """Open the terminal, pipe or file that the command writes to."""
    return Terminal(stderr=stderr)


def knows_signs(console: Console) -> bool:
    """Tell whether it can show more than ASCII."""
    return console.encoding.lower().startswith("utf")
