"""Conversations that may show images: messages -> token ids, and the images that some of these ids stand for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hayate.checkpoint.config_json import ConfigReader
from hayate.errors import ModelError, UsageError
from hayate.models.vision_config import VisionConfig
from hayate.text.chat_template import ChatTemplate
from hayate.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hayate.vision.slicing import SlicePlan

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class PromptImage:
    """An image that a prompt shows: opened, and how it will be cut into pictures."""

    pixels: np.ndarray  # (H, W, 3) uint8
    plan: SlicePlan
    digest: bytes  # SHA-256 of the pixels and the plan: of all that the embeddings depend on, given the model
    starts: Sequence[int]  # of each picture, the first of its tokens in the prompt
    num_tokens: int  # of one picture


@dataclass(frozen=True, eq=False)
class Conversation:
    """A conversation as the model reads it, up to the header of the answer. It may be given wherever a prompt may."""

    text: str | None  # None: only the ids are known
    ids: list[int]
    images: Sequence[PromptImage] = ()
    open_time: float = 0.0  # seconds in which the images were opened


def read_conversation(
    messages: Messages,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    vision: VisionConfig | None,
    *,
    max_len: int,
    max_slices: int | None = None,
    files: bool = True,
    **variables: Any,
) -> Conversation:
    """`messages` as a prompt; contents are texts or lists of parts (see `LLM.chat`).

    vision: None where the model takes no images. max_len: a prompt must be shorter, in tokens.
    max_slices: most tiles an image is cut into; default: the model's. files: read images from paths; False for
    messages of strangers. variables: for the chat template.

    Raises UsageError for messages that are malformed or do not fit the model, ImageError for an image that cannot be
    read.
    """
    only_text = vision is None and max_slices is None and not has_parts(messages)
    if only_text or not isinstance(messages, Sequence):  # the template says what is wrong with that
        text = template.render(messages, add_generation_prompt=True, **variables)
        return Conversation(text, tokenizer.encode(text, add_special_tokens=False))
    from hayate.vision.placeholders import encode_chat, image_sources

    sources = image_sources(messages, files=files)
    if vision is None:
        if sources or max_slices is not None:
            raise UsageError(
                f"{tokenizer.folder} is a language model and takes no images; use one that does, such as MiniCPM-V 2.6"
            )
        prompt = encode_chat(tokenizer, template, messages, [], **variables)
        return Conversation(prompt.text, prompt.ids)
    begin = time.perf_counter()
    opened = _open(sources, vision, max_slices, max_len)
    open_time = time.perf_counter() - begin if sources else 0.0
    prompt = encode_chat(
        tokenizer,
        template,
        messages,
        [plan for _, plan in opened],
        use_image_id=vision.use_image_id,
        num_queries=vision.num_queries,
        **variables,
    )
    images = [
        PromptImage(pixels, plan, _digest(pixels, plan), starts, vision.num_queries)
        for (pixels, plan), starts in zip(opened, prompt.starts, strict=True)
    ]
    return Conversation(prompt.text, prompt.ids, images, open_time)


def has_parts(messages: object) -> bool:
    """Whether the content of any message is a list of parts; `messages` may be malformed."""
    return isinstance(messages, Iterable) and any(
        isinstance(m, Mapping) and isinstance(m.get("content"), list | tuple) for m in messages
    )


def _open(
    sources: Sequence[Any], vision: VisionConfig, max_slices: int | None, max_len: int
) -> list[tuple[np.ndarray, SlicePlan]]:
    from hayate.vision.image import open_image
    from hayate.vision.slicing import plan_slices

    if max_slices is None:
        max_slices = vision.max_slices if vision.slice_mode else 1
    opened: list[tuple[np.ndarray, SlicePlan]] = []
    num_tokens = 0
    for number, source in enumerate(sources, start=1):
        pixels = open_image(source, name=f"image {number} of {len(sources)}")
        height, width, _ = pixels.shape
        plan = plan_slices(
            width,
            height,
            max_slices=max_slices,
            resolution=vision.slice_side,
            patch_size=vision.patch_size,
        )
        num_tokens += plan.num_pictures * vision.num_queries
        if num_tokens >= max_len:
            raise UsageError(
                f"the first {number} of {len(sources)} images take {num_tokens} tokens and the context holds "
                f"{max_len}; show fewer images, lower max_slices, or raise --max-model-len"
            )
        opened.append((pixels, plan))
    return opened


def _digest(pixels: np.ndarray, plan: SlicePlan) -> bytes:
    digest = sha256(repr(plan).encode())  # which says the size of the image too
    digest.update(pixels.data)
    return digest.digest()


def check_preprocessor_config(folder: Path, vision: VisionConfig) -> None:
    """ModelError unless preprocessor_config.json, if there is one, asks for what hayate does and config.json says."""
    file = folder / "preprocessor_config.json"
    if not file.exists():
        return
    fields = ConfigReader.open(file)
    half = [0.5, 0.5, 0.5]
    known = {
        "image_processor_type": "MiniCPMVImageProcessor",
        "version": 2.6,
        "max_slice_nums": vision.max_slices,
        "scale_resolution": vision.slice_side,
        "patch_size": vision.patch_size,
        "image_feature_size": vision.num_queries,
        "slice_mode": vision.slice_mode,
        "use_image_id": vision.use_image_id,
        "norm_mean": half,
        "norm_std": half,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "im_id_start": "<image_id>",
        "im_id_end": "</image_id>",
    }
    for key, value in known.items():
        fields.expect(key, (value,), value)
    for key in ("auto_map", "processor_class", "feature_extractor_type"):
        fields.get(key, (str, dict), None)
    if unknown := fields.unread():
        raise ModelError(
            f"{fields.where(unknown[0])} is a field hayate does not know; it may change what the model sees, "
            "so it is not ignored"
        )
