"""Conversations in TRL's messages (role, content) and LLaVA's (from, value), and a prompt's turns as one text."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

# Stands for a text whose bytes are no UTF-8: nobody checks when tables are written, and damage is not noticed.
UNREADABLE = "\N{REPLACEMENT CHARACTER}"

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
MOST_TURNS = 1000  # each may make an example, with all before it in its prompt
PICTURE = "<image>"  # stands for the picture in LLaVA's texts


class UnusableError(ValueError):
    """A record that makes no row; the message is the reason, in a few words."""


class Turn(NamedTuple):
    """Who says what.

    Attributes:
        role: system, user or assistant.
        text: all its text.
        parts: where pictures stand in it, its texts in order with None in the place of a picture; else nothing.
    """

    role: str
    text: str
    parts: tuple[str | None, ...] = ()

    @property
    def content(self) -> tuple[str | None, ...]:
        """Its texts in their order, None in the place of a picture."""
        return self.parts or (self.text,)


def is_messages(value: Any) -> bool:
    """Tell whether a value is a list of messages, and not of plain answers."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & {*value[0]})
    )


def read_turns(messages: Any) -> tuple[list[Turn], list[Any]]:
    r"""Read a conversation: its turns, and the pictures that stand in their contents.

    Where pictures stand is said by parts of the type `image`, and in LLaVA's texts also by marks `<image>`.

    Raises:
        UnusableError: it is none, holds what is no text or picture, or has a picture in a turn that is not the user's.

    >>> read_turns([{"from": "human", "value": "<image>\nWhat is it?"}])[0]
    [Turn(role='user', text='What is it?', parts=(None, 'What is it?'))]
    """
    if not isinstance(messages, list):
        raise UnusableError("messages are no list")
    if len(messages) > MOST_TURNS:
        raise UnusableError(f"more than {MOST_TURNS} messages")
    turns, pictures = list[Turn](), list[Any]()
    for message in messages:
        if not isinstance(message, dict):
            raise UnusableError("a message is no object")
        role = message.get("role") or message.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise UnusableError("a message of another role than system, user and assistant")
        content = message["content"] if "content" in message else message.get("value")
        texts, parts, marked = list[str](), list[str | None](), "from" in message
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, dict) and part.get("type") == "image":
                pictures += [part[name] for name in ("image", "path", "url") if part.get(name)][:1]
                parts.append(None)
                continue
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
            if not isinstance(text, str | None):
                raise UnusableError("a message with something else than text and pictures")
            texts.append(to_text(text) or "")
            parts += _split_marks(texts[-1]) if marked else texts[-1:]
        if None in parts and ROLES[role] != "user":
            raise UnusableError(f"a picture in a turn of the {ROLES[role]}")
        said = "\n".join(text for text in texts if text.strip())
        text = (said.replace(PICTURE, "") if marked else said).strip()
        turns.append(Turn(ROLES[role], text, _tidy(parts) if None in parts else ()))
    return turns, pictures


def _split_marks(text: str) -> list[str | None]:
    """Cut a text at the marks of pictures, with None for each.

    >>> _split_marks("<image> or <image>?")
    ['', None, ' or ', None, '?']
    """
    first, *others = text.split(PICTURE)
    return [first, *(part for other in others for part in (None, other))]


def _tidy(parts: Sequence[str | None]) -> tuple[str | None, ...]:
    """Leave out blank texts, and the white space around all text."""
    kept = [part for part in parts if part is None or part.strip()]
    texts = [place for place, part in enumerate(kept) if part is not None]
    for place in texts[:1]:
        kept[place] = (kept[place] or "").lstrip()
    for place in texts[-1:]:
        kept[place] = (kept[place] or "").rstrip()
    return tuple(kept)


def count_places(turns: Sequence[Turn]) -> int:
    """Count the places in which pictures stand."""
    return sum(turn.parts.count(None) for turn in turns)


def place_pictures(turns: Sequence[Turn], count: int) -> list[Turn]:
    """Put pictures of which no turn says where they stand before the text of the first turn of the user.

    Raises:
        UnusableError: there are several, and no such turn.

    >>> place_pictures([Turn("system", "Be brief."), Turn("user", "Alike?")], 2)[1].parts
    (None, None, 'Alike?')
    """
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    placed = [*turns]
    if count and not count_places(turns):
        if first is not None:
            text = turns[first].text
            placed[first] = turns[first]._replace(parts=(None,) * count + ((text,) if text else ()))
        elif count > 1:
            raise UnusableError("no turn of the user in which its pictures could stand")
    return placed


def list_answers(turns: Sequence[Turn]) -> list[tuple[Sequence[Turn], str]]:
    """List a conversation's answers, each with the turns before it.

    Raises:
        UnusableError: nobody answers.
    """
    answers = [(turns[:place], turn.text) for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise UnusableError("no assistant turn")
    return answers


def join_turns(turns: Sequence[Turn]) -> str | None:
    r"""Write the turns of a prompt as one text, a line each, for models that take a single text.

    The system's line is first and as it is. Where there are earlier answers all others begin with who speaks. None
    where nobody speaks.

    >>> join_turns([Turn("system", "Be brief."), Turn("user", "What is it?")])
    'Be brief.\nWhat is it?'
    >>> join_turns([Turn("user", "What is it?"), Turn("assistant", "A cat."), Turn("user", "Asleep?")])
    'User: What is it?\nAssistant: A cat.\nUser: Asleep?'
    """
    if len(turns) < 2:
        return turns[0].text if turns else None
    ordered = [turn for turn in turns if turn.role == "system"] + [turn for turn in turns if turn.role != "system"]
    named = any(turn.role == "assistant" for turn in turns)
    lines = [f"{t.role.capitalize()}: {t.text}" if named and t.role != "system" else t.text for t in ordered if t.text]
    return UNREADABLE if UNREADABLE in (turn.text for turn in turns) else "\n".join(lines)


def write_turns(turns: Sequence[Turn]) -> str:
    """Write turns as JSON, in the form that chat templates take: for models that have one.

    >>> write_turns([Turn("user", "What is it?")])
    '[{"role": "user", "content": "What is it?"}]'
    >>> write_turns([Turn("user", "It?", (None, "It?"))])
    '[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "It?"}]}]'
    """

    def write(part: str | None) -> dict[str, str]:
        return {"type": "image"} if part is None else {"type": "text", "text": part}

    said = [{"role": turn.role, "content": [*map(write, turn.parts)] or turn.text} for turn in turns]
    return json.dumps(said, ensure_ascii=False)


def parse_turns(text: str) -> tuple[Turn, ...]:
    """Read what `write_turns` wrote.

    Raises:
        UnusableError: it is something else.

    >>> turns = (Turn("system", "Be brief."), Turn("user", "It?", (None, "It?")))
    >>> parse_turns(write_turns(turns)) == turns
    True
    """
    try:
        turns = tuple(_parse_turn(message["role"], message["content"]) for message in json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError):
        turns = ()
    if not turns:
        raise UnusableError("turns that are no messages")
    return turns


def _parse_turn(role: Any, content: Any) -> Turn:
    if role not in ROLES.values():
        raise ValueError
    if isinstance(content, str):
        return Turn(role, content)
    if not isinstance(content, list):
        raise TypeError
    parts = tuple(None if part["type"] == "image" else str(part["text"]) for part in content)
    return Turn(role, "\n".join(part for part in parts if part is not None), parts)


def is_plain(value: Any) -> bool:
    """Tell text, numbers, truth and nothing from what no column can hold."""
    return value is None or isinstance(value, str | int | float)


def to_text(value: Any) -> str | None:
    """Write a plain value as text; None for what is missing, or is no plain value.

    Text that no UTF-8 holds, as half a surrogate pair that JSON can spell, becomes `UNREADABLE`.
    """
    if not isinstance(value, str | int | float) or value != value:
        return None
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return UNREADABLE
    return text
