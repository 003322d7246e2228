"""Text and pictures of models that chat: prompts and answers as the folder's chat template writes them.

The template is rendered with marks in the places of the texts, once for every order of speakers; what stands around the
marks stands around every text. So a text is data and never part of a template, and answers begin and end as the model
learned.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.data.config import MOST_PICTURES
from fedvlm_jax.data.prompts import Grid, Prompt, Tiles, to_prompt
from fedvlm_jax.errors import UserError, explain_error, format_count
from fedvlm_jax.models.base import PictureGrids
from fedvlm_jax.models.folder_files import read_json
from fedvlm_jax.models.processor_files import (
    decode,
    digest_settings,
    list_files,
    make_pixels,
    open_files,
    pad,
    try_out,
)

QUESTION, ANSWER = "\ue000", "\ue001"  # of Unicode's private use, so that no template holds them
FIRST_MARK = 0xE100  # of the marks for a conversation's texts
MARKS = re.compile(f"([{chr(FIRST_MARK)}-\uf8ff])")
TRIAL = "Is it <one>, or 'two' & \"three\"? Ja: groß, 4 €. " * 8 + "End."
"""A text that templates could escape, shorten, or write in capitals."""
MOST_CHARACTERS = 2**18
"""Longest chat template, and longest text that one writes around a question; the longest known has 2**14."""

Shape = tuple[tuple[str, tuple[bool, ...]], ...]
"""Who speaks, and of each part whether it is a text; the others are pictures."""


@dataclass(frozen=True)
class Frame:
    """The texts around a question and around its answer.

    Attributes:
        head: before the question, with `image` in the place of the picture.
        tail: after it, up to where the model answers.
        answer_head: before the answer: nothing, or a space.
        answer_end: after it, the token that ends answers first; where it is blank, the tokenizer's EOS ends them.
    """

    head: str
    tail: str
    answer_head: str
    answer_end: str


def read_template(folder: Path, tokenizer: Any) -> str | None:
    """Read a folder's chat template, from any of the files that transformers has kept it in; None where there is none.

    Raises:
        UserError: a file of it cannot be read.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {explain_error(error)}") from None
    for name in list_files(folder, ("chat_template.json", "processor_config.json")):
        if template := read_json(folder / name).get("chat_template"):
            return _choose_template(template, folder / name)
    template = getattr(tokenizer, "chat_template", None)
    return _choose_template(template, folder) if template else None


def _choose_template(template: Any, where: Path) -> str:
    """Choose the default of several named templates."""
    if isinstance(template, list) and all(isinstance(one, dict) for one in template):
        template = {one.get("name"): one.get("template") for one in template}
    chosen = template.get("default") if isinstance(template, dict) else template
    if not isinstance(chosen, str):
        raise UserError(f"chat_template of {where} is no text, and holds none of the name 'default'")
    return chosen


def make_frame(template: str, tokenizer: Any, folder: Path) -> Frame:
    """Render a chat template around a picture and a question, and around an answer.

    Raises:
        UserError: the template fails, changes a text, or writes a prompt otherwise once it is answered.
    """
    if len(template) > MOST_CHARACTERS:
        raise UserError(
            f"the chat template in {folder} has {format_count(len(template), 'character')}, expected "
            f"{MOST_CHARACTERS:,} at most"
        )

    def render(question: str, answer: str | None = None) -> str:
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        if answer is not None:
            said.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return tokenizer.apply_chat_template(
            said, chat_template=template, tokenize=False, add_generation_prompt=answer is None
        )

    try:
        prompt, whole, tried = render(QUESTION), render(QUESTION, ANSWER), render(TRIAL, TRIAL)
    except Exception as error:  # of Jinja, whose sandbox the template runs in, or of what the template calls
        raise UserError(f"the chat template in {folder} cannot be used: {explain_error(error)}") from None
    if len(whole) > MOST_CHARACTERS:
        raise UserError(
            f"the chat template in {folder} writes {format_count(len(whole), 'character')} around a question"
        )
    if whole.count(QUESTION) == whole.count(ANSWER) == 1 and tried != re.sub(
        f"[{QUESTION}{ANSWER}]", lambda _: TRIAL, whole
    ):
        raise UserError(f"the chat template in {folder} changes texts, or writes other texts around others")
    bare = prompt.rstrip()
    if not whole.startswith(prompt) and whole.startswith(bare) and whole[len(bare) :].lstrip().startswith(ANSWER):
        # Some templates write other white space before an answer than where one is asked for (LLaVA-OneVision's); the
        # latter is what generation sees.
        whole = prompt + whole[len(bare) :].lstrip()
    once = prompt.count(QUESTION) == whole[len(prompt) :].count(ANSWER) == 1
    if not once or not whole.startswith(prompt) or MARKS.search(whole):
        raise UserError(
            f"the chat template in {folder} does not write a question and its answer one after another, each once: a "
            "prompt must be the same whether it is answered or not"
        )
    head, tail = prompt.split(QUESTION)
    answer_head, answer_end = whole[len(prompt) :].split(ANSWER)
    return Frame(head, tail, answer_head, answer_end)


def spell(shape: Shape, template: str | None, frame: Frame, placeholder: str, tokenizer: Any) -> tuple[str | int, ...]:
    """Render a conversation up to where the model answers: texts as their numbers, and what stands around them.

    Raises:
        UserError: the template fails, changes or leaves out a part, or asks for the answer otherwise than after one
            question.
    """
    if shape == (("user", (False, True)),):
        return (frame.head, 0, frame.tail)
    if template is None:
        raise UserError("the model takes one question about one picture")
    marks, messages = iter(range(FIRST_MARK, 0xF900)), list[dict[str, Any]]()
    for role, parts in shape:
        content = [{"type": "text", "text": chr(next(marks))} if text else {"type": "image"} for text in parts]
        messages.append({"role": role, "content": content})
    try:
        written = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # of Jinja, or a template's own, as of two questions one after another
        raise UserError(f"the chat template refuses the turns: {explain_error(error)}") from None
    pieces = [ord(piece) - FIRST_MARK if MARKS.fullmatch(piece) else piece for piece in MARKS.split(written)]
    kinds = [text for _, parts in shape for text in parts]
    placed = [piece for piece in pieces if isinstance(piece, int)] == [*range(sum(kinds))]
    if not placed or written.count(placeholder) != kinds.count(False) or not written.endswith(frame.tail):
        raise UserError("the chat template does not write these turns one after another, each part once")
    return tuple(pieces)


@dataclass(frozen=True, eq=False)
class ChatProcessor:
    """The processor of a chatting model.

    Attributes:
        tokenizer: transformers' tokenizer.
        images: transformers' image processor, for its settings.
        frame: the texts around questions and answers.
        image_token: the token in whose places image tokens are put, as text.
        write_picture: how a picture is cut -> what stands for it in a prompt, `image_token` repeated in it. For one on
            a grid of its own it is `image_token` alone, repeated.
        render: pictures in RGB -> pixels [B, 3, H, W], a picture's tiles first and then the whole of it.
        placeholder: what `frame` and the template write in the place of a picture.
        template: the chat template; None where only a question can be asked.
        most_pictures: that a prompt may hold.
        cut: (height, width) of a picture in pixels -> its tiles, or its grid; None where all stay whole in one size.
        tiles: along a picture's longer side.
        grids: how pictures get grids of their own; None where they have none.
    """

    tokenizer: Any
    images: Any
    frame: Frame
    image_token: str
    write_picture: Callable[[Tiles], str]
    size: tuple[int, int]
    render: Callable[[list[Image.Image]], np.ndarray]
    placeholder: str
    template: str | None = None
    most_pictures: int = MOST_PICTURES
    cut: Callable[[int, int], Tiles | Grid] | None = None
    tiles: int = 1
    grids: PictureGrids | None = None

    @cached_property
    def _special(self) -> dict[int, str]:
        """Tokens that no text may hold, by id."""
        added = {number: str(token) for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        named = [self.image_token, *self.tokenizer.all_special_tokens]
        return added | {self.tokenizer.convert_tokens_to_ids(token): token for token in named}

    @cached_property
    def _strange(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in self._special.values() if token))

    @property
    def image_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))

    @property
    def image_tokens(self) -> int:
        return self.write_picture(Tiles()).count(self.image_token)

    @property
    def eos_token_id(self) -> int:
        ids = self.tokenise([self.frame.answer_end])[0] if self.frame.answer_end.strip() else []
        return int(ids[0]) if ids else int(self.tokenizer.eos_token_id)

    @property
    def largest_id(self) -> int:
        # In the places of image tokens no embedding is read, so theirs may lie outside of the model's vocabulary.
        return max(number for token, number in self.tokenizer.get_vocab().items() if token != self.image_token)

    @property
    def framing(self) -> frozenset[int]:
        return frozenset(self._special)

    @property
    def fingerprint(self) -> str:
        if self.grids is not None:
            return f"{digest_settings(self.images)}-{self.grids.pixels}"
        tiles = f"-{self.tiles}" if self.cut else ""
        return f"{digest_settings(self.images)}-{self.size[0]}x{self.size[1]}{tiles}"

    @property
    def reads_turns(self) -> bool:
        return self.template is not None

    def pixels(self, images: Sequence[Image.Image], /) -> Float[np.ndarray, "B H W 3"]:
        return make_pixels(self.render, images, self.size)

    def prompts(self, asked: Sequence[str | Prompt], /) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        rows = [to_prompt(one) for one in asked]
        ids = self.tokenise([self.write(prompt) for prompt in rows], whole=True)
        image = self.image_token_id
        for prompt, row in zip(rows, ids, strict=True):
            if row.count(image) != (count := sum(map(self._count_tokens, prompt.pictures))):
                raise UserError(
                    f"the tokenizer makes {format_count(row.count(image), 'image token')} of a prompt, expected {count}"
                )
        return pad(ids, self.tokenizer.pad_token_id or 0), pad([[1] * len(row) for row in ids], 0)

    def _count_tokens(self, picture: Tiles | Grid) -> int:
        return picture.tokens if isinstance(picture, Grid) else picture.views * self.image_tokens

    def write(self, prompt: Prompt) -> str:
        """Write out what is asked, up to where the model answers.

        Raises:
            UserError: a text holds a token that stands for something else, or the template refuses the turns.
        """
        said = prompt.said
        texts = [part for turn in said for part in turn.content if part is not None]
        for text in texts:
            self._refuse_special(text)
        shape = tuple((turn.role, tuple(part is not None for part in turn.content)) for turn in said)
        pictures, written = iter(prompt.pictures), list[str]()
        for piece in self._spell(shape):
            if isinstance(piece, int):
                written.append(texts[piece])
                continue
            first, *others = piece.split(self.placeholder)
            written += [first, *(part for other in others for part in (self._stand_for(next(pictures)), other))]
        return "".join(written)

    def _stand_for(self, picture: Tiles | Grid) -> str:
        return self.image_token * picture.tokens if isinstance(picture, Grid) else self.write_picture(picture)

    def _refuse_special(self, text: str) -> None:
        if found := self._strange.search(text):
            raise UserError(f"the text holds {found[0]}, which stands for something else")

    @cached_property
    def _spell(self) -> Callable[[Shape], tuple[str | int, ...]]:
        """Return the function from who speaks to what is written: texts by their numbers, and what is around them."""
        # One or two of a kind are asked all the time; long conversations have no two alike.
        return lru_cache(256)(lambda shape: spell(shape, self.template, self.frame, self.placeholder, self.tokenizer))

    def answers(self, texts: Sequence[str], max_tokens: int, /) -> Int[np.ndarray, "B U"]:
        for text in texts:
            self._refuse_special(text)
        rows, eos = self._continue([self.frame.answer_head + text for text in texts]), self.eos_token_id
        return pad([[*row[: max_tokens - 1], eos] for row in rows], IGNORED)

    def _continue(self, texts: list[str]) -> list[list[int]]:
        """Tokenise texts as they stand behind a prompt: Llama's tokenizer puts a space before what begins a text."""
        tail = self.frame.tail
        before = self.tokenise([tail])[0]
        rows = self.tokenise([tail + text for text in texts])
        # Where the end of the prompt is joined with what follows, the prompt still ends as it was asked.
        return [
            row[len(before) :] if row[: len(before)] == before else self.tokenise([text])[0]
            for row, text in zip(rows, texts, strict=True)
        ]

    def decode(self, ids: Int[np.ndarray, "B U"], /) -> list[str]:
        return decode(self.tokenizer, ids, self.framing)

    def tokenise(self, texts: list[str], *, whole: bool = False) -> list[list[int]]:
        """Tokenise; of `whole` prompts the tokenizer adds what it begins texts with, unless the template has."""
        bos = self.tokenizer.bos_token
        begins = whole and not (bos and bos in self.frame.head)
        return self.tokenizer(texts, add_special_tokens=begins)["input_ids"] if texts else []


def open_chat_processor(
    folder: Path, needs: str, tokens: Sequence[str], build: Callable[[Any, Any], ChatProcessor]
) -> ChatProcessor:
    """Open the files of a folder's processor, and try it out.

    Args:
        needs: the parts that the family needs, for a message.
        tokens: those that stand for a picture, and around it.
        build: (image processor, tokenizer) -> the processor.

    Raises:
        UserError: its files cannot be read, lack a token, or make nonsense.
    """

    def join(images: Any, tokenizer: Any) -> ChatProcessor:
        if missing := [token for token in tokens if token not in tokenizer.get_vocab()]:
            raise UserError(f"the tokenizer in {folder} lacks {', '.join(missing)}, which a picture needs")
        made = build(images, tokenizer)
        if (count := (made.frame.head + made.frame.tail).count(made.placeholder)) != 1:
            raise UserError(
                f"the chat template in {folder} writes {made.placeholder} {format_count(count, 'time')} for a picture"
            )
        return made

    processor = open_files(folder, join, needs)
    try_out(processor, processor.images, folder)
    check_frame(processor, folder)
    return processor


def check_frame(processor: ChatProcessor, folder: Path) -> None:
    """See that an answer's tokens are those that it has behind its prompt.

    Raises:
        UserError: they are not, or the template ends answers with no token.
    """
    if processor.eos_token_id not in processor.framing:
        raise UserError(f"the chat template in {folder} does not end answers with a token that only ends answers")
    frame = processor.frame
    prompt, _ = processor.prompts(["What is it?"])
    asked = processor.write(Prompt("What is it?"))
    joint = processor.tokenise([f"{asked}{frame.answer_head}A cat."], whole=True)[0]
    apart = [*prompt[0].tolist(), *processor.answers(["A cat."], 64)[0].tolist()[:-1]]
    if joint != apart:
        raise UserError(f"the tokenizer in {folder} joins the end of a prompt with its answer")
