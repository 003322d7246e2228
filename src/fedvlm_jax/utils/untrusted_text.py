"""Texts of strangers (client names, answers, paths, errors) made safe for terminals and pages."""

import re
import unicodedata

# Categories of characters that move a cursor, turn the direction of what follows, or are not seen at all.
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

# Joiners: Persian, Hindi and many emoji are written with them, and they do nothing else.
KEPT = frozenset("\u200c\u200d")


def clean(text: str, keep: str = "") -> str:
    r"""Write invisible characters as escapes, but for those to keep, as line breaks in a message of several lines.

    >>> print(clean("red\x1b[31m"))
    red\x1b[31m
    """
    if text.isascii() and text.isprintable():
        return text
    hidden = {letter for letter in set(text) - KEPT - set(keep) if unicodedata.category(letter) in HIDDEN}
    escapes = {ord(letter): letter.encode("unicode_escape", "surrogatepass").decode("ascii") for letter in hidden}
    return text.translate(escapes)


def cut(text: str, most: int) -> str:
    """Leave at most so many characters of a text, and show that it is cut.

    >>> cut("abcdef", 3)
    'abc…'
    """
    return text if len(text) <= most else f"{text[:most]}…"


def escape_markdown(text: str) -> str:
    r"""Write a text so that Markdown shows it as it stands: on one line, without tags, links or emphasis.

    >>> print(escape_markdown("<b> *a_b*"))
    &lt;b&gt; \*a_b\*
    """
    text = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*|~]", r"\\\g<0>", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside of words it is a letter
    return text.replace("](", r"]\(").replace("://", r":\//").replace("www.", r"www\.")
