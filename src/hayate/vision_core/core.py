"""VisionCore: images in, descriptions in fields out."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hayate.checkpoint.hub import resolve_model
from hayate.config import EngineOptions, parse_size
from hayate.errors import OutOfMemory, UsageError
from hayate.runtime import device as devices
from hayate.runtime.llm import LLM
from hayate.runtime.loading import make_plan, open_checkpoint
from hayate.runtime.outputs import RequestOutput
from hayate.sampling_params import SamplingParams
from hayate.vision.image import ImageSource, limit_side, open_image
from hayate.vision_core.answers import Analysis, Answer, Timings
from hayate.vision_core.profile import load_profile

DEFAULT_MODEL = "openbmb/MiniCPM-V-2_6-int4"
DEFAULT_MAX_SIDE = 512
Images = ImageSource | list[ImageSource]

# For one caller and little memory, where `LLM` has many callers in mind.
_ENGINE = {"max_num_seqs": 1, "max_num_batched_tokens": 2048, "image_cache": "64M"}
_MAX_LEN = 8192
_LEAST_LEN = 1536  # an image in ten pictures (660 tokens), some text, 512 tokens of answer


class VisionCore:
    """Describes images with a vision-language model, which is loaded when first needed.

    Args:
        model: a checkpoint folder or a hub id.
        profile: what is asked, in which words and fields: a built-in name or a TOML file (`vision_core.profile`).
        language: of the profile, such as "en" or "ja"; default: its first.
        max_side: images are made smaller so that their longest side has so many pixels; None: as they are, cut into
            up to `max_slices` tiles.
        max_slices: most tiles of an image; default: the model's, 9.
        sampling: options in place of the profile's. seed: the same seed gives the same answers.
        memory_limit: bytes, "7G", or a share of what is free: the weights, the KV cache and the work of the encoder
            must fit, else OutOfMemory is raised before anything is loaded. On a GPU PyTorch's allocator is held to it
            too; the driver's context, some 0.5 GB, comes on top. Default: what is free.
        engine: options of `LLM`. Defaults of our own: max_model_len 8,192, or what fits from 1,536 on; max_num_seqs 1,
            max_num_batched_tokens 2,048, image_cache "64M".

    An image is a path, the bytes of a file, a Pillow image or an array (H, W, 3); a list of them is shown together, in
    one prompt. Use one VisionCore from one thread. Closing it frees the model; it is a context manager.

    Raises UsageError, ImageError, ModelError, DeviceError, OutOfMemory (see `hayate.errors`).
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        profile: str | Path | None = None,
        language: str | None = None,
        max_side: int | None = DEFAULT_MAX_SIDE,
        max_slices: int | None = None,
        sampling: SamplingParams | None = None,
        seed: int | None = None,
        memory_limit: str | int | None = None,
        **engine: Any,
    ) -> None:
        self.model = model
        self.profile = load_profile(profile or "default")
        self.wording = self.profile.wording(language)
        self.sampling = sampling or self.profile.sampling
        if seed is not None:
            self.sampling = dataclasses.replace(self.sampling, seed=seed)
        if max_side is not None and (not isinstance(max_side, int) or max_side < 1):
            raise UsageError(f"max_side must be a number of pixels or None; it is {max_side!r}")
        self.max_side = max_side
        self.max_slices = max_slices
        known = inspect.signature(LLM.__init__).parameters
        if unknown := engine.keys() - known.keys():
            raise UsageError(f"{sorted(unknown)[0]} is no option of VisionCore, and none of LLM")
        self._engine = engine
        self._memory_limit = memory_limit
        self._llm: LLM | None = None

    # -- the model --------------------------------------------------------------------------------

    @property
    def loaded(self) -> bool:
        return self._llm is not None

    def load(self) -> LLM:
        """The model, loaded if it is not yet."""
        if self._llm is None:
            folder = resolve_model(self.model, self._engine.get("revision"))
            options = self._options(folder)
            self._llm = LLM(folder, **options)
        return self._llm

    def _options(self, folder: Path) -> dict[str, Any]:
        """The options of the engine, within the memory limit. Nothing is loaded yet."""
        config, _ = open_checkpoint(folder)
        if config.vision is None:
            raise UsageError(
                f"{folder} is a language model and takes no images; use one that does, such as MiniCPM-V 2.6"
            )
        options = {**_ENGINE, **self._engine}
        options.pop("revision", None)
        names = {field.name for field in dataclasses.fields(EngineOptions)}
        wanted = EngineOptions(**{k: v for k, v in options.items() if k in names})
        device = devices.resolve_device(wanted.device)
        room = free = devices.free_bytes(device)
        if self._memory_limit is not None:
            limit = parse_size(self._memory_limit, option="--memory-limit", free_bytes=free)
            room = min(limit, free)
        try:
            if wanted.max_model_len is None:
                fits = make_plan(config, wanted, device, free_bytes=room).max_model_len
                length = min(max(fits, _LEAST_LEN), _MAX_LEN, config.max_position_embeddings)
                wanted = dataclasses.replace(wanted, max_model_len=length)
            plan = make_plan(config, wanted, device, free_bytes=room)
        except OutOfMemory as error:
            if self._memory_limit is None:
                raise
            raise OutOfMemory(
                f"--memory-limit {self._memory_limit}, so that no more counts as free: {error}"
            ) from error
        if self._memory_limit is not None and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device)
        fixed = {"max_model_len": plan.max_model_len, "kv_memory": plan.kv_bytes}
        return {**options, **fixed, "image_cache": plan.image_cache_bytes}

    def close(self) -> None:
        """Free the model; the next call loads it again. Twice is fine."""
        if self._llm is None:
            return
        device, self._llm = self._llm.device, None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            if self._memory_limit is not None:
                torch.cuda.set_per_process_memory_fraction(1.0, device)

    def __enter__(self) -> VisionCore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def clear_cache(self) -> None:
        """Forget images and prompts seen before, and give the memory that PyTorch holds in reserve back."""
        if self._llm is None:
            return
        self._llm.engine.pages.forget()
        self._llm.engine.images.forget()
        gc.collect()
        if self._llm.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- calls ------------------------------------------------------------------------------------

    def analyze(self, image: Images) -> Analysis:
        """The fields of the profile's form `analyze`: summary, objects, text, mood in the built-in one."""
        return self._fill("analyze", image)

    def analyze_simple(self, image: Images) -> Analysis:
        """The fields of the form `simple`: summary, objects, text, and shorter."""
        return self._fill("simple", image)

    def ask(self, image: Images, question: str) -> Answer:
        """The answer to a question about the image, as text."""
        text, reason, timings, memory = self._run(image, _checked(question), self.sampling)
        return Answer(text.strip(), reason, timings, memory)

    def stream(self, image: Images, question: str) -> Iterator[str]:
        """`ask`, piece by piece; closing the iterator early ends the work."""
        question, llm = _checked(question), self.load()
        pixels, _, _ = self._open(image)
        messages = self.wording.messages(pixels, question)
        for chunk in llm.stream_chat(messages, self.sampling, max_slices=self.max_slices):
            if chunk.text:
                yield chunk.text

    def _fill(self, name: str, image: Images) -> Analysis:
        form = self.wording.form(name)
        text, reason, timings, memory = self._run(image, form.prompt, form.params(self.sampling))
        return Analysis(text, reason, timings, memory, form.read(text))

    def _run(
        self, image: Images, prompt: str, params: SamplingParams
    ) -> tuple[str, Any, Timings, dict[str, int]]:
        llm = self.load()
        begin = time.perf_counter()
        pixels, open_time, shrink_time = self._open(image)
        messages = self.wording.messages(pixels, prompt)
        output: RequestOutput = llm.chat(messages, params, max_slices=self.max_slices)[0]
        timings = Timings.of(
            output.metrics,
            open_time=open_time,
            shrink_time=shrink_time,
            total=time.perf_counter() - begin,
        )
        answer = output.outputs[0]
        return answer.text, answer.finish_reason, timings, llm.peak_memory_bytes()

    def _open(self, image: Images) -> tuple[list[np.ndarray], float, float]:
        """The images' pixels within `max_side`; seconds of opening and of making them smaller."""
        sources = image if isinstance(image, list) else [image]
        if not sources:
            raise UsageError("the list of images is empty; give at least one")
        begin = time.perf_counter()
        many = len(sources) > 1
        opened = [
            open_image(source, name=f"image {i} of {len(sources)}" if many else "the image")
            for i, source in enumerate(sources, start=1)
        ]
        opened_at = time.perf_counter()
        if self.max_side is not None:
            opened = [limit_side(pixels, self.max_side) for pixels in opened]
        return opened, opened_at - begin, time.perf_counter() - opened_at


def _checked(question: str) -> str:
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"a question is a text that is not empty; it is {question!r}")
    return question
