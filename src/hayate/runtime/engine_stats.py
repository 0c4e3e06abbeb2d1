"""EngineStats: what an engine is doing, and has done since it began."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hayate.runtime.engine import Engine


@dataclass(frozen=True)
class EngineStats:
    """Counts of this moment, then totals."""

    num_running: int
    num_waiting: int  # those included whose images are being encoded
    num_pages: int
    num_pages_used: int  # held by sequences
    num_pages_cached: int  # held by nobody, but reusable by a prompt that begins alike
    image_cache_bytes: int  # of encoded images, in use or reusable

    num_steps: int
    num_verify_steps: int
    num_prompt_tokens: int  # computed, not found in the prefix cache
    num_generated_tokens: int
    num_preemptions: int
    num_prefix_tokens_asked: int  # prompt tokens looked up in the prefix cache
    num_prefix_tokens_found: int
    num_draft_tokens: int
    num_accepted_tokens: int  # of the drafts
    num_images: int  # shown by prompts
    num_images_found: int  # of these, encoded for an earlier one

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the prompt tokens found in the cache; 0 before the first."""
        asked = self.num_prefix_tokens_asked
        return self.num_prefix_tokens_found / asked if asked else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the draft tokens accepted; 0 before the first."""
        drafts = self.num_draft_tokens
        return self.num_accepted_tokens / drafts if drafts else 0.0

    @classmethod
    def of(cls, engine: Engine) -> EngineStats:
        """Read from plain counters: no lock, at any time, from any thread."""
        scheduler, pages, images = engine.scheduler, engine.pages, engine.images
        drafts = engine.speculation.stats if engine.speculation is not None else None
        return cls(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + images.num_waiting,
            num_pages=pages.num_pages,
            num_pages_used=pages.num_pages - pages.num_free,
            num_pages_cached=pages.num_cached,
            image_cache_bytes=images.num_bytes,
            num_steps=engine.num_steps,
            num_verify_steps=drafts.num_verify_steps if drafts else 0,
            num_prompt_tokens=engine.num_prompt_tokens,
            num_generated_tokens=engine.num_generated_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_tokens_asked=scheduler.num_prompt_tokens_queried,
            num_prefix_tokens_found=scheduler.num_prompt_tokens_cached,
            num_draft_tokens=drafts.num_drafted if drafts else 0,
            num_accepted_tokens=drafts.num_accepted if drafts else 0,
            num_images=images.num_images,
            num_images_found=images.num_images - images.num_images_encoded,
        )
