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
    """Who says what: `role` is system, user or assistant."""

    role: str
    text: str


def is_messages(value: Any) -> bool:
    """Tell whether a value is a list of messages, and not of plain answers."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & {*value[0]})
    )


def read_turns(messages: Any) -> tuple[list[Turn], list[Any]]:
    r"""Read a conversation: its turns, and the pictures that stand in their contents.

    Raises:
        UnusableError: it is none, or holds what is no text or picture.

    >>> read_turns([{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}])[0]
    [Turn(role='user', text='What is it?'), Turn(role='assistant', text='A cat.')]
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
        texts = list[str]()
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, dict) and part.get("type") == "image":
                pictures += [part[name] for name in ("image", "path", "url") if part.get(name)][:1]
                continue
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
            if not isinstance(text, str | None):
                raise UnusableError("a message with something else than text and pictures")
            texts.append(to_text(text) or "")
        said = "\n".join(text for text in texts if text.strip())
        turns.append(Turn(ROLES[role], (said.replace(PICTURE, "") if "from" in message else said).strip()))
    return turns, pictures


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
    """
    return json.dumps([{"role": turn.role, "content": turn.text} for turn in turns], ensure_ascii=False)


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
