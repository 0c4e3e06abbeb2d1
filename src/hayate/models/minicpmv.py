"""MiniCPM-V 2.6: SigLIP encoder, resampler, and a Qwen2 decoder that reads their vectors as tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hayate.errors import UsageError
from hayate.models.batch import Batch
from hayate.models.config import ModelConfig
from hayate.models.decoder import CausalLM
from hayate.models.resampler import Resampler
from hayate.models.siglip import SiglipEncoder, pack_pictures


class MiniCPMV(nn.Module):
    """The whole model, with the checkpoint's names. To the engine it is its language model."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        assert config.vision is not None
        self.config = config
        self.vision = config.vision
        self.llm = CausalLM(config, dtype=dtype)
        self.vpm = SiglipEncoder(self.vision, dtype=dtype)
        self.resampler = Resampler(self.vision, dtype=dtype)

    def forward(self, batch: Batch) -> Tensor:
        """Logits, as `CausalLM.forward`; where pictures stand is in the batch."""
        logits: Tensor = self.llm(batch)
        return logits

    @torch.inference_mode()
    def encode(self, patches_NP: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """What the decoder reads in place of pictures: (len(sizes), num_queries, D) in the model's dtype.

        Args:
            patches_NP: (N, 3 * p * p) on the model's device and in its dtype: the patches of all pictures,
                row by row within a picture, each flattened as (colour, y, x), values from -1 to 1.
            sizes: (height, width) of each picture in patches, of which there are sum(h * w) = N.

        A picture's result does not depend on the others' pixels. Raises UsageError when N does not fit `sizes`.
        """
        D = self.vision.output_size
        num_patches = sum(h * w for h, w in sizes)
        if tuple(patches_NP.shape) != (num_patches, self.vision.patch_values):
            raise UsageError(
                f"pictures of {list(sizes)} patches have {num_patches} rows of {self.vision.patch_values} values, "
                f"got {tuple(patches_NP.shape)}"
            )
        if any(side < 1 for size in sizes for side in size):
            raise UsageError(f"pictures of {list(sizes)} patches: a picture has at least one patch")
        if not sizes:
            return patches_NP.new_empty(0, self.vision.num_queries, D)
        pictures = pack_pictures(sizes, self.vision.grid_side, patches_NP.device)
        y: Tensor = self.resampler(self.vpm(patches_NP, pictures), pictures)
        return y
