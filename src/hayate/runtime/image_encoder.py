"""ImageEncoder: what images of prompts are to the language model, made before their prompts are scheduled.

Between two steps at most `MAX_PICTURES` pictures are encoded, since every running sequence waits for them: a large
image has ten, 0.1 s or so on a large GPU. What was made is kept, in bounded memory: an image seen before is not encoded
again.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch

from hayate.config import EnginePlan, format_bytes
from hayate.errors import RequestTooLarge
from hayate.kernels import batch_invariant
from hayate.runtime.device import Stopwatch
from hayate.runtime.request import Request, RequestImage
from hayate.runtime.sequence import Sequence

MAX_PICTURES = 10


class VisionModel(Protocol):
    """The part of a vision-language model that looks."""

    def encode(self, patches: torch.Tensor, sizes: Seq[tuple[int, int]]) -> torch.Tensor:
        """Embeddings (pictures, queries, D) of packed patches (sum h * w, 3 * p * p); sizes: (h, w) in patches."""
        ...


@dataclass(eq=False)
class _Encoded:
    embeddings: torch.Tensor  # (pictures, queries, D)
    users: set[Sequence] = field(default_factory=set)

    @property
    def num_bytes(self) -> int:
        return self.embeddings.numel() * self.embeddings.element_size()


class ImageEncoder:
    """Requests whose images wait to be encoded, and embeddings by digest, those in use and those used before.

    All embeddings together take at most `plan.image_cache_bytes`: those longest unused go first, and a request waits
    while those in use leave no room. For one engine's thread; the counts may be read from any.
    """

    def __init__(self, model: torch.nn.Module, width: int, plan: EnginePlan) -> None:
        """width: D of the language model."""
        self._model = cast(VisionModel, model)
        self._plan = plan
        self._device = torch.device(plan.device)
        self._dtype: torch.dtype = getattr(torch, plan.dtype)
        self._token_bytes = width * self._dtype.itemsize
        self._waiting: list[Request] = []  # the most urgent first, save one that was begun
        self._encoded: OrderedDict[bytes, _Encoded] = OrderedDict()  # the longest unused first
        self.num_bytes = 0  # of the embeddings
        self.num_images = 0  # shown by prompts so far
        self.num_images_encoded = 0  # the others had been encoded before

    @property
    def num_waiting(self) -> int:
        """Sequences whose images are not all encoded yet."""
        return sum(len(request.samples) for request in self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request with images. RequestTooLarge if their embeddings could not be kept all at once."""
        need = sum(map(self._bytes_of, {image.digest: image for image in request.images}.values()))
        if need > self._plan.image_cache_bytes:
            raise RequestTooLarge(
                f"the images of the prompt take {format_bytes(need)} when encoded, and --image-cache holds "
                f"{format_bytes(self._plan.image_cache_bytes)}; show fewer images, or raise it"
            )
        # One that was begun is finished first: two of which each has what the other lacks would wait for ever.
        begun = bool(self._waiting) and any(i.is_encoded for i in self._waiting[0].images)
        insort(self._waiting, request, lo=int(begun), key=lambda r: (r.priority, r.arrival))

    def next(self) -> Request | None:
        """The request whose images are to be encoded next."""
        return self._waiting[0] if self._waiting else None

    @torch.inference_mode()
    def encode(self, request: Request) -> bool:
        """Give `request`, which is `next()`, the images kept, and encode `MAX_PICTURES` pictures of the others.

        Returns whether it now has all; then it waits no more. Nothing is encoded while there is no room.
        """
        missing = self._take(request)
        batch = self._batch(missing)
        if batch and self._make_room(sum(map(self._bytes_of, batch))):
            for image, embeddings in zip(batch, self._run(request, batch), strict=True):
                self._encoded[image.digest] = encoded = _Encoded(embeddings)
                self.num_bytes += encoded.num_bytes
            self.num_images_encoded += len(batch)
            missing = self._take(request)
        if missing:
            return False
        self._waiting.remove(request)
        request.images = []  # the pixels are not needed any more
        return True

    def release(self, sequence: Sequence) -> None:
        """A sequence has ended: it needs its images no more."""
        for digest in {span.digest for span in sequence.spans}:
            if digest in self._encoded:
                self._encoded[digest].users.discard(sequence)
        sequence.spans = ()
        for request in list(self._waiting):
            if all(s.sequence.status == "finished" for s in request.samples):
                self._waiting.remove(request)
                request.images = []

    def forget(self) -> None:
        """Let no later prompt have what was encoded so far; the sequences that use it keep it."""
        self._encoded.clear()
        self.num_bytes = 0

    # -- encoding ---------------------------------------------------------------------------------

    def _bytes_of(self, image: RequestImage) -> int:
        return self._token_bytes * sum(span.end - span.start for span in image.spans)

    def _take(self, request: Request) -> list[RequestImage]:
        """Give the request the images that are kept; returns those that are not."""
        missing = []
        for image in request.images:
            encoded = self._encoded.get(image.digest)
            if image.is_encoded:
                continue
            if encoded is None:
                missing.append(image)
                continue
            self._encoded.move_to_end(image.digest)
            encoded.users.update(
                s.sequence for s in request.samples if s.sequence.status != "finished"
            )
            for span in image.spans:
                span.embeddings = encoded.embeddings[span.index]
            self.num_images += 1
        return missing

    def _batch(self, missing: Seq[RequestImage]) -> list[RequestImage]:
        """The images to encode now, no two alike: as many as fit, or one."""
        batch: dict[bytes, RequestImage] = {}
        room = MAX_PICTURES
        for image in missing:
            if image.digest in batch:
                continue
            room -= len(image.spans)
            # An image's bits must not depend on those beside it in batch-invariant mode.
            if batch and (room < 0 or self._plan.batch_invariant):
                break
            batch[image.digest] = image
        return list(batch.values())

    def _make_room(self, need: int) -> bool:
        """Drop images that nobody uses, the longest unused first, until there is room for `need` bytes."""
        unused = [digest for digest, encoded in self._encoded.items() if not encoded.users]
        for digest in unused:
            if self.num_bytes + need <= self._plan.image_cache_bytes:
                break
            self.num_bytes -= self._encoded.pop(digest).num_bytes
        return self.num_bytes + need <= self._plan.image_cache_bytes

    def _run(self, request: Request, batch: Seq[RequestImage]) -> list[torch.Tensor]:
        """The embeddings (pictures, queries, D) of each image, in memory of its own."""
        from hayate.vision.image import preprocess  # and Pillow, which text alone does not need

        with Stopwatch(self._device) as preprocessing:
            pictures = [
                preprocess(i.image.pixels, i.image.plan, self._device, self._dtype) for i in batch
            ]
            patches = torch.cat([p.patches for p in pictures])
            sizes = [size for p in pictures for size in p.sizes]
        with (
            Stopwatch(self._device) as encoding,
            batch_invariant(self._plan.batch_invariant),
        ):
            embeddings = self._model.encode(patches, sizes)
        request.image_work.append((preprocessing, encoding))
        return [e.clone() for e in embeddings.split([len(image.spans) for image in batch])]
