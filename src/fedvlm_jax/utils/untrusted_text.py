"""Texts that others wrote (client names, answers, paths, errors), as terminals and pages may have them."""

import re
import unicodedata

__all__ = ["clean", "escape_markdown"]

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of characters that move a cursor, turn the direction of what follows, or are not seen at all."""

KEPT = frozenset("\u200c\u200d")
"""Joiners: Persian, Hindi and many emoji are written with them, and they do nothing else."""


def clean(text: str, keep: str = "") -> str:
    r"""Write characters that are no visible ones as escapes: `\x1b`, `\u202e`, `\n`.

    Args:
        text: by whomever.
        keep: of these characters those that are meant, as line breaks in a message of several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = KEPT.union(keep)
    return "".join(
        letter if letter in kept or unicodedata.category(letter) not in HIDDEN else _escape(letter) for letter in text
    )


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


def escape_markdown(text: str) -> str:
    """Write a text so that Markdown shows it as it stands: on one line, without tags, links or emphasis."""
    text = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*|~]", r"\\\g<0>", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside of words it is a letter
    return text.replace("](", r"]\(").replace("://", r":\//").replace("www.", r"www\.")
