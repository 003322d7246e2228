"""Rich's console, safe for texts of strangers, on terminals that may know only ASCII or whose reader leaves."""

from typing import NoReturn

from rich.console import Console

from fedvlm_jax.utils.standard_streams import PIPE_GONE, silence
from fedvlm_jax.utils.untrusted_text import clean


class Terminal(Console):
    """The terminal, pipe or file that a command writes to; `say` escapes markup and control characters."""

    def say(self, text: str, style: str | None = None) -> None:
        """Print a text as it stands, lines unbroken and without what would move the cursor."""
        self.print(clean(text, "\n"), style=style, markup=False, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> NoReturn:
        """End quietly: whoever read this has seen enough."""
        self.quiet = True
        silence()
        raise SystemExit(PIPE_GONE)
