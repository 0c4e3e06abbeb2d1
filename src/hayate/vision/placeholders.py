"""Where pictures stand in a prompt: a conversation with images to token ids.

A picture is `num_queries` `<unk>` tokens between two tags; their embeddings are replaced by what the vision model makes
of the picture. A text that a user wrote can hold the same tags (`<image>`, `</slice>`, `<|im_end|>`): such strings are
hidden from the chat template's text behind markers nobody can guess, and encoded as the ordinary text they are.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image

from hayate.errors import ModelError, UsageError
from hayate.text.chat_template import ChatTemplate, Message
from hayate.text.tokenizer import Tokenizer
from hayate.vision.image import ImageSource
from hayate.vision.slicing import SlicePlan

SLOT = "<unk>"  # of one query of a picture


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation; starts[i][p] is the position of the first slot of picture p of image i in `ids`."""

    text: str
    ids: list[int]
    starts: list[list[int]]


def image_prompt(
    plan: SlicePlan, index: int, *, use_image_id: bool = True, num_queries: int = 64
) -> str:
    """The text that stands for image number `index` of a conversation, counted from 0."""
    slots = SLOT * num_queries
    prompt = f"<image_id>{index}</image_id>" if use_image_id else ""
    prompt += f"<image>{slots}</image>"
    if plan.grid is not None:
        columns, rows = plan.grid
        prompt += "\n".join([f"<slice>{slots}</slice>" * columns] * rows)
    return prompt


def image_sources(messages: Sequence[Message], *, files: bool = True) -> list[ImageSource]:
    """All images of a conversation in order, each fit for `open_image`.

    A message's content is a text or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image", "image": a
    path, bytes, Pillow image, array or data URL}`, OpenAI's `{"type": "image_url", "image_url": {"url": a data URL}}`;
    a bare text, Pillow image or array counts as such a part. files: take paths too; False for messages of strangers.

    Raises:
        UsageError: a part is malformed, or an image is one that is not fetched (http) or not allowed (files).
    """
    return [
        _source(part, where, files)
        for i, message in enumerate(messages)
        for part, where in _parts(message, i)
        if not isinstance(part, str)
    ]


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    plans: Sequence[SlicePlan],
    *,
    use_image_id: bool = True,
    num_queries: int = 64,
    add_generation_prompt: bool = True,
    **kwargs: Any,
) -> ChatPrompt:
    """Render a conversation and encode it, with the slots of its images.

    plans: one for each image of `messages` (see `image_sources`), in order. The parts of a message are joined by
    newlines. kwargs: variables of the template. The ids are those of the whole text encoded at once, but for special
    tokens in the messages' own texts, which stay ordinary text.

    Raises:
        UsageError: the messages are malformed, or there is not one plan an image.
        ModelError: the template fails or loses an image, or the tokenizer lacks the tags.
    """
    hider = _Hider(tokenizer.special_texts)
    hidden = [hider.message(message, i) for i, message in enumerate(messages)]
    if hider.num_images != len(plans):
        raise UsageError(f"{len(plans)} slice plans for {hider.num_images} images")
    rendered = template.render(hidden, add_generation_prompt=add_generation_prompt, **kwargs)
    pieces, images = hider.split(rendered)
    if images != list(range(len(plans))):
        raise ModelError(
            f"the chat template has turned images 0 to {len(plans) - 1} into {images}; it must keep each message's text"
        )
    text, ids = hider.reveal(pieces[0]), hider.encode(tokenizer, pieces[0])
    starts = []
    for index, (plan, piece) in enumerate(zip(plans, pieces[1:], strict=True)):
        block = image_prompt(plan, index, use_image_id=use_image_id, num_queries=num_queries)
        block_ids = tokenizer.encode(block, add_special_tokens=False)
        starts.append(
            [len(ids) + i for i in _slots(tokenizer, block_ids, plan, num_queries)[::num_queries]]
        )
        text += block + hider.reveal(piece)
        ids += block_ids + hider.encode(tokenizer, piece)
    return ChatPrompt(text, ids, starts)


def _slots(
    tokenizer: Tokenizer, block_ids: list[int], plan: SlicePlan, num_queries: int
) -> list[int]:
    slot_id = tokenizer.backend.token_to_id(SLOT)
    slots = [i for i, token_id in enumerate(block_ids) if token_id == slot_id]
    if slot_id not in tokenizer.special_ids or len(slots) != num_queries * plan.num_pictures:
        raise ModelError(
            f"the tokenizer of {tokenizer.folder} does not know {SLOT} as a special token, which marks where a picture "
            "stands; its files are incomplete, or of another model"
        )
    return slots


class _Hider:
    """Puts markers into messages in place of images and of special tokens in texts; finds them in the rendered text.

    A marker is a random number, so no text can contain it.
    """

    def __init__(self, special_texts: Sequence[str]) -> None:
        self.num_images = 0
        self._special_texts = special_texts
        self._special = re.compile("|".join(map(re.escape, special_texts)) or r"(?!)")
        nonce = secrets.token_hex(16)
        self._image_marker, self._text_marker = f"image{nonce}n", f"text{nonce}n"
        self._image = re.compile(rf"{self._image_marker}(\d+)_")
        self._text = re.compile(rf"{self._text_marker}(\d+)_")

    def message(self, message: Message, index: int) -> Message:
        if not isinstance(message, Mapping):
            return message  # the template's own checks name it
        hidden = {k: v if k == "role" else self._hide(v) for k, v in message.items()}
        if isinstance(message.get("content"), list | tuple):
            parts = [
                self._hide(part) if isinstance(part, str) else self._next_image()
                for part, _ in _parts(message, index)
            ]
            hidden["content"] = "\n".join(parts)
        return hidden

    def _next_image(self) -> str:
        self.num_images += 1
        return f"{self._image_marker}{self.num_images - 1}_"

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(self._text_marker_of, value)
        if isinstance(value, Mapping):
            return {key: self._hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(item) for item in value]
        return value

    def _text_marker_of(self, match: re.Match[str]) -> str:
        return f"{self._text_marker}{self._special_texts.index(match[0])}_"

    def split(self, rendered: str) -> tuple[list[str], list[int]]:
        """The pieces between the images, and the images' numbers."""
        pieces = self._image.split(rendered)
        return pieces[::2], [int(number) for number in pieces[1::2]]

    def reveal(self, piece: str) -> str:
        """`piece` with the special tokens that were hidden in it."""
        return self._text.sub(lambda match: self._special_texts[int(match[1])], piece)

    def encode(self, tokenizer: Tokenizer, piece: str) -> list[int]:
        """Token ids of `piece`, which ends at images or at the prompt's ends; what was hidden is ordinary text."""
        if not self._text.search(piece):
            return tokenizer.encode(piece, add_special_tokens=False)
        ids: list[int] = []
        end = 0
        for match in self._special.finditer(piece):  # the template's own
            ids += tokenizer.encode_as_text(self.reveal(piece[end : match.start()]))
            ids += tokenizer.encode(match[0], add_special_tokens=False)
            end = match.end()
        return ids + tokenizer.encode_as_text(self.reveal(piece[end:]))


def _parts(message: Message, index: int) -> Iterator[tuple[Any, str]]:
    """The parts of a message's content with their names: a text as a str, an image as what holds it."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple):
        return
    for j, part in enumerate(content):
        where = f"messages[{index}].content[{j}]"
        if not isinstance(part, Mapping):
            if not isinstance(part, str | Image.Image | np.ndarray):
                raise UsageError(f'{where} must be an object with "type"; it is {part!r:.80}')
            yield part, where
            continue
        kind = part.get("type")
        if kind not in ("text", "image", "image_url") or kind not in part:
            raise UsageError(
                f'{where} must be {{"type": "text", "text": ...}}, {{"type": "image", "image": ...}} or {{"type": '
                f'"image_url", "image_url": {{"url": ...}}}}; it is {part!r:.80}'
            )
        if kind == "text" and not isinstance(part["text"], str):
            raise UsageError(f'{where}: "text" must be a string; it is {part["text"]!r:.80}')
        yield part["text"] if kind == "text" else part, where


def _source(part: Any, where: str, files: bool) -> ImageSource:
    if not isinstance(part, Mapping):
        return part
    source = part[part["type"]]
    if part["type"] == "image_url":
        url = source.get("url") if isinstance(source, Mapping) else source
        if not isinstance(url, str) or url[:5].lower() != "data:":
            raise UsageError(
                f"{where}: an image_url must be a data URL (data:image/png;base64,...), nothing is fetched; "
                f"it is {url!r:.80}"
            )
        return _data_of(url, where)
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return _data_of(source, where)
        if re.match(r"https?://", source, re.IGNORECASE):
            raise UsageError(
                f"{where}: {source!r:.80} is not fetched; download it and give its path"
            )
    if not files and not isinstance(source, bytes | Image.Image | np.ndarray):
        raise UsageError(
            f"{where}: an image must be sent as a data URL; paths are not read: {source!r:.80}"
        )
    return source


def _data_of(url: str, where: str) -> bytes:
    """The bytes of a data URL (RFC 2397)."""
    header, comma, data = url.partition(",")
    try:
        if not comma:
            raise ValueError("there is no comma before the data")
        if header.lower().endswith(";base64"):
            return base64.b64decode("".join(data.split()), validate=True)
        return unquote_to_bytes(data)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"{where}: the data URL {url[:40]!r}... is not valid: {error}") from error
