"""Answers in the form in which metrics compare them: normalised, and cut into tokens, in any script.

Tokens are runs of letters, marks and digits. Scripts that write no spaces between words (Chinese, Japanese, Thai, Lao,
Khmer, Burmese) give one token per character with its marks, as MLQA (arXiv 1910.07475) does for Chinese: no word
segmenter is needed, and scores do not hang on a segmenter's mistakes. On ASCII this is the tokenisation of ROUGE.
"""

import functools
import unicodedata
from collections.abc import Sequence
from typing import Any


def pair_up(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    """Pair every prediction with its gold answers.

    Raises:
        ValueError: the numbers of both differ, or an example's gold answers are not a list of one text or more.

    >>> pair_up(["bus"], [["a bus", "bus"]])
    [('bus', ['a bus', 'bus'])]
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} lists of gold answers; expected as many"
        )
    for golds in references:
        # Of a text in place of a list each letter would count as an answer.
        if isinstance(golds, str) or not golds:
            raise ValueError(f"the gold answers of an example are {golds!r}; expected a list of one text or more")
    return list(zip(predictions, references, strict=True))


def normalise(text: str) -> str:
    """Bring answers that differ only in writing to one form, in any script.

    NFKC (full-width letters become plain, й composed), case folded (ß becomes ss), white space collapsed to single
    spaces, and punctuation, spaces and invisible format characters stripped from both ends: every Unicode category
    P*, Z* and Cf, so also 。, 「」, « » and ¿. Inside a text punctuation stays. Symbols ($, +) are no punctuation and
    stay; a text of punctuation alone keeps it, so that "?" and "!" remain different answers.

    >>> normalise("  «Straße» ")
    'strasse'
    """
    # Twice: folding may leave letters that compose.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    spaced = " ".join(folded.split())
    margin = "".join(sign for sign in spaced if unicodedata.category(sign).startswith(("P", "Z", "Cf", "Cc")))
    return spaced.strip(margin) or spaced


def tokenise(text: str) -> list[str]:
    """Cut a text into tokens, after `normalise`.

    Punctuation and symbols are no tokens; a text of nothing else is a token itself, so that
    "?" and "!" stay different, and only the empty text has none.

    >>> tokenise("It's 食べ物!")
    ['it', 's', '食', 'べ', '物']
    """
    form = normalise(text)
    return _patterns()[0].findall(form) or ([form] if form else [])


def tokenise_squad(text: str) -> list[str]:
    """Cut a text into tokens as SQuAD (arXiv 1606.05250) compares them.

    As `tokenise`, but punctuation inside a text (Unicode's P* and ASCII's symbols) is deleted and so joins its
    neighbours, and English articles are dropped. A text of articles alone keeps them: "A" may be a choice.

    >>> tokenise_squad("It's the 1,000th")
    ['its', '1000th']
    """
    tokens = tokenise(_patterns()[1].sub("", normalise(text)) or text)
    return [token for token in tokens if token not in ("a", "an", "the")] or tokens


@functools.cache
def _patterns() -> tuple[Any, Any]:
    """Compile the patterns of a token, and of the signs that SQuAD deletes."""
    import regex  # late, for its tables; the standard library's re knows neither scripts nor marks

    # ー, which lengthens vowels in both kana, belongs to neither script.
    spaceless = r"\p{Han}\p{Bopomofo}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    character = rf"[[{spaceless}]&&[\p{{L}}\p{{N}}]]\p{{M}}*"
    word = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{spaceless}]]+"
    return regex.compile(f"(?V1){character}|{word}"), regex.compile(r"[\p{P}$+<=>^`|~]")
