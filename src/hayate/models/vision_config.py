"""VisionConfig: the vision half of MiniCPM-V 2.6, from its config.json.

The language model's fields lie at the top level of the file, the encoder's in `vision_config`, the slicing rules in
`slice_config`, the resampler's again at the top level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hayate.checkpoint.config_json import ConfigReader
from hayate.errors import ModelError
from hayate.models.unknown_fields import refuse_unknown_fields

_RESAMPLER_HEAD_DIM = 128


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP encoder, resampler, and how a picture is cut. Sizes are counts, lengths are pixels."""

    hidden_size: int  # E, width of the encoder
    num_layers: int
    num_heads: int
    ffn_size: int  # F
    patch_size: int  # side of a patch
    image_size: int  # side of the pictures the positions were trained for
    norm_eps: float
    num_queries: int  # vectors a picture becomes
    output_size: int  # D, width of the language model
    max_slices: int  # tiles of a picture, the overview not counted
    slice_side: int  # a picture has about slice_side^2 pixels
    slice_mode: bool  # cut large pictures into tiles
    use_image_id: bool  # number the pictures in the prompt

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_resampler_heads(self) -> int:
        return self.output_size // _RESAMPLER_HEAD_DIM

    @property
    def patch_values(self) -> int:
        """Values of one patch: three colours."""
        return 3 * self.patch_size**2

    @property
    def grid_side(self) -> int:
        """Position buckets along one side."""
        return self.image_size // self.patch_size

    @property
    def num_parameters(self) -> int:
        E, F, D = self.hidden_size, self.ffn_size, self.output_size
        patches = self.patch_values * E + E
        attention, mlp, norms = 4 * (E * E + E), 2 * E * F + F + E, 4 * E
        encoder = patches + self.grid_side**2 * E + self.num_layers * (attention + mlp + norms)
        resampler = self.num_queries * D + D * E + 4 * (D * D + D) + D * D + 6 * D
        return encoder + 2 * E + resampler


def read_vision(config: ConfigReader, output_size: int) -> VisionConfig:
    """The vision fields of a MiniCPMV config.json; `output_size` is the language model's width.

    Raises ModelError naming the field for another version, a missing field, or what is not implemented.
    """
    version = config.require("version", (float, str))
    if str(version) != "2.6":
        raise ModelError(
            f"{config.where('version')} is {version}: another model than MiniCPM-V 2.6, the only one hayate runs"
        )
    if config.get("drop_vision_last_layer", bool, True):  # absent means true
        raise ModelError(
            f"{config.where('drop_vision_last_layer')} is true or missing; hayate implements false"
        )
    config.expect("batch_vision_input", (True,), True)
    # Read by other versions, or how many pictures the original encodes at a time: no maths.
    config.get("image_size", int, None)
    config.get("vision_batch_size", int, None)
    encoder, slices = (_section(config, name) for name in ("vision_config", "slice_config"))
    fields = _encoder_fields(encoder)
    patch_size = fields["patch_size"]
    config.expect("patch_size", (patch_size,), patch_size)
    vision = VisionConfig(
        **fields,
        **_slice_fields(slices, patch_size),
        num_queries=config.require("query_num", int),
        output_size=output_size,
        slice_mode=config.get("slice_mode", bool, True),
        use_image_id=config.get("use_image_id", bool, True),
    )
    for name in ("num_layers", "num_heads", "ffn_size", "patch_size", "num_queries", "max_slices"):
        if getattr(vision, name) < 1:
            raise ModelError(f"{config.file}: {name} of the vision half must be at least 1")
    if vision.hidden_size % vision.num_heads or vision.hidden_size < 1:
        raise ModelError(
            f"{encoder.where('hidden_size')} is {vision.hidden_size}, not a multiple of "
            f"num_attention_heads {vision.num_heads}"
        )
    if vision.slice_side < patch_size or vision.image_size < patch_size:
        raise ModelError(f"{encoder.where('image_size')}: a picture is smaller than a patch")
    if output_size % _RESAMPLER_HEAD_DIM:
        raise ModelError(
            f"{config.where('hidden_size')} is {output_size}; the resampler needs a multiple of {_RESAMPLER_HEAD_DIM}"
        )
    return vision


def _section(config: ConfigReader, key: str) -> ConfigReader:
    section = config.section(key)
    if section is None:
        raise ModelError(f"{config.where(key)} is missing; it must be an object")
    return section


def _encoder_fields(config: ConfigReader) -> dict[str, Any]:
    config.expect("model_type", ("siglip", "siglip_vision_model"), "siglip")
    config.expect("num_channels", (3,), 3)
    config.get("vision_use_head", bool, None)  # of SigLIP's pooling head, which MiniCPM-V has not
    config.expect("hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    fields = {
        "hidden_size": config.require("hidden_size", int),
        "num_layers": config.require("num_hidden_layers", int),
        "num_heads": config.require("num_attention_heads", int),
        "ffn_size": config.require("intermediate_size", int),
        "patch_size": config.require("patch_size", int),
        "image_size": config.require("image_size", int),
        "norm_eps": config.get("layer_norm_eps", float, 1e-6),
    }
    refuse_unknown_fields(config, "MiniCPMV")
    return fields


def _slice_fields(config: ConfigReader, patch_size: int) -> dict[str, Any]:
    config.expect("patch_size", (patch_size,), patch_size)
    fields = {
        "max_slices": config.require("max_slice_nums", int),
        "slice_side": config.get("scale_resolution", int, 448),
    }
    refuse_unknown_fields(config, "MiniCPMV")
    return fields
