"""Models: one decoder wiring, configured by ModelConfig."""

from hayate.models.config import ModelConfig, MoEConfig
from hayate.models.families import FAMILIES, load_config, parse_config
from hayate.models.presets import PRESETS, preset_config

__all__ = [
    "FAMILIES",
    "PRESETS",
    "MoEConfig",
    "ModelConfig",
    "load_config",
    "parse_config",
    "preset_config",
]
