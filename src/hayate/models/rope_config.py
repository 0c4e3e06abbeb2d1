"""RoPE fields of config.json, in both spellings, into `RopeParameters`.

transformers 5 writes one object `rope_parameters`; before, the base stood at the top level as `rope_theta` and
the scaling in `rope_scaling` (null or an object whose type is `rope_type`, earlier `type`). A non-empty
`rope_scaling` wins, as in transformers 5.
"""

from __future__ import annotations

from hayate.checkpoint.config_json import ConfigReader
from hayate.errors import ModelError
from hayate.kernels.rope import RopeParameters

_PARTIAL_SPELLINGS = (
    "partial_rotary_factor",
    "rope_percent",
    "rope_percentage",
    "rotary_pct",
    "rotary_percent",
    "rotary_percentage",
)
_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_TYPE_ALIASES = {"su": "longrope"}
_NEEDS_ORIGINAL_LEN = ("yarn", "llama3", "longrope")


def read_rope(
    config: ConfigReader,
    *,
    head_dim: int,
    max_position_embeddings: int,
    default_theta: float = 10_000.0,
    default_partial: float = 1.0,
) -> RopeParameters:
    """Read every RoPE field of `config`.

    Raises ModelError naming the field when the type is unknown or a field the type needs is missing.
    """
    theta = config.get("rope_theta", float, default_theta)
    partial = default_partial
    for key in _PARTIAL_SPELLINGS:
        partial = config.get(key, float, partial)
    rotary_dim = config.get("rotary_dim", int, None)
    original = config.get("original_max_position_embeddings", int, None)

    parameters = config.section("rope_parameters")
    section = config.section("rope_scaling") or parameters
    if section is None:
        plain = RopeParameters(
            rope_type="default",
            theta=theta,
            rotary_dim=rotary_dim or int(head_dim * partial),
            max_position_embeddings=max_position_embeddings,
        )
        return _checked(plain, config, head_dim)
    if parameters is not None and section is not parameters:
        theta = parameters.get("rope_theta", float, theta)
        partial = parameters.get("partial_rotary_factor", float, partial)
        parameters.get("rope_type", str, "default")

    legacy_type = section.get("type", str, "default")
    rope_type = section.get("rope_type", str, legacy_type)
    rope_type = _TYPE_ALIASES.get(rope_type, rope_type)
    if rope_type not in _TYPES:
        raise ModelError(
            f"{section.where('rope_type')} is {rope_type!r}; hayate has {', '.join(_TYPES)}"
        )
    theta = section.get("rope_theta", float, theta)
    partial = section.get("partial_rotary_factor", float, partial)
    inner_original = section.get("original_max_position_embeddings", int, None)
    original = original or inner_original
    if original is None and rope_type in _NEEDS_ORIGINAL_LEN:
        original = max_position_embeddings
    factor = section.get("factor", float, None)
    if factor is None:
        if rope_type in ("linear", "dynamic", "llama3"):
            raise ModelError(
                f"{section.where('factor')} is missing; RoPE type {rope_type} needs it"
            )
        factor = max_position_embeddings / original if original else 1.0
    rotary = rotary_dim or int(head_dim * partial)
    result = RopeParameters(
        rope_type=rope_type,
        theta=theta,
        rotary_dim=rotary,
        factor=factor,
        original_max_position_embeddings=original,
        max_position_embeddings=max_position_embeddings,
        low_freq_factor=section.get("low_freq_factor", float, 1.0),
        high_freq_factor=section.get("high_freq_factor", float, 4.0),
        beta_fast=section.get("beta_fast", float, 32.0),
        beta_slow=section.get("beta_slow", float, 1.0),
        truncate=section.get("truncate", bool, True),
        mscale=section.get("mscale", float, None),
        mscale_all_dim=section.get("mscale_all_dim", float, None),
        attention_factor=section.get("attention_factor", float, None),
        short_factor=_factors(section, "short_factor", rope_type, rotary),
        long_factor=_factors(section, "long_factor", rope_type, rotary),
    )
    if unread := section.unread():
        raise ModelError(
            f"{section.where(unread[0])} is a RoPE option hayate does not implement; "
            "the model's positions would be wrong"
        )
    return _checked(result, section, head_dim)


def _checked(rope: RopeParameters, config: ConfigReader, head_dim: int) -> RopeParameters:
    """Refuse values that have no frequencies."""
    sound = {
        "rope_theta": rope.theta > 0 and (rope.theta != 1 or rope.rope_type != "yarn"),
        "factor": rope.factor is None or rope.factor > 0,
        "high_freq_factor": rope.rope_type != "llama3"
        or rope.high_freq_factor != rope.low_freq_factor,
        "beta_fast": rope.beta_fast > 0 and rope.beta_slow > 0,
        "partial_rotary_factor": rope.rotary_dim % 2 == 0
        and (2 if rope.rope_type != "dynamic" else 4) <= rope.rotary_dim <= head_dim,
    }
    for key, is_sound in sound.items():
        if not is_sound:
            raise ModelError(
                f"{config.where(key)}: these RoPE values have no frequencies (theta {rope.theta}, factor "
                f"{rope.factor}, {rope.rotary_dim} of {head_dim} channels rotated)"
            )
    return rope


def _factors(
    section: ConfigReader, key: str, rope_type: str, rotary_dim: int
) -> tuple[float, ...] | None:
    values = section.get(key, list, None)
    if rope_type != "longrope":
        return None
    if values is None or len(values) != rotary_dim // 2:
        found = "missing" if values is None else f"a list of {len(values)}"
        raise ModelError(
            f"{section.where(key)} is {found}; longrope needs {rotary_dim // 2} numbers"
        )
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ModelError(f"{section.where(key)} must hold numbers only")
    return tuple(float(v) for v in values)
