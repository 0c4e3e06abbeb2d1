"""MiniCPM-V's encoder and resampler written down once more from their formulas: fp32, one picture, one head and
one patch at a time. From the checkpoint's own tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def project(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    heads = []
    for q_h, k_h, v_h in zip(*(x.chunk(num_heads, -1) for x in (q, k, v)), strict=True):
        scores = q_h @ k_h.T / math.sqrt(q_h.shape[-1])
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ v_h)
    return torch.cat(heads, -1)


def siglip(picture: Tensor, w: Weights, config: dict[str, Any]) -> Tensor:
    """Features (h * w, E) of one picture (3, H, W)."""
    vision = config["vision_config"]
    p, side = vision["patch_size"], vision["image_size"] // vision["patch_size"]
    h, w_ = picture.shape[1] // p, picture.shape[2] // p
    name = "vpm.embeddings.patch_embedding"
    grid = F.conv2d(picture[None], w[f"{name}.weight"], w[f"{name}.bias"], stride=p)[0]
    ids = [
        math.floor(side * r / h) * side + math.floor(side * c / w_)
        for r in range(h)
        for c in range(w_)
    ]
    x = grid.flatten(1).T + w["vpm.embeddings.position_embedding.weight"][ids]
    for i in range(vision["num_hidden_layers"]):
        layer = f"vpm.encoder.layers.{i}."
        y = layer_norm(x, w, f"{layer}layer_norm1")
        q, k, v = (project(y, w, f"{layer}self_attn.{n}_proj") for n in "qkv")
        x = x + project(
            attend(q, k, v, vision["num_attention_heads"]), w, f"{layer}self_attn.out_proj"
        )
        y = project(layer_norm(x, w, f"{layer}layer_norm2"), w, f"{layer}mlp.fc1")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + project(y, w, f"{layer}mlp.fc2")
    return layer_norm(x, w, "vpm.post_layernorm")


def position_code(h: int, w: int, size: int) -> Tensor:
    """(h * w, size), one number at a time."""
    quarter = size // 4
    rows = []
    for r in range(h):
        for c in range(w):
            angles = [[n * 10000 ** (-i / quarter) for i in range(quarter)] for n in (c, r)]
            rows.append([f(a) for angle in angles for f in (math.sin, math.cos) for a in angle])
    return torch.tensor(rows)


def resampler(features: Tensor, size: tuple[int, int], w: Weights) -> Tensor:
    D = w["resampler.query"].shape[1]
    kv = layer_norm(features @ w["resampler.kv_proj.weight"].T, w, "resampler.ln_kv")
    weights, biases = w["resampler.attn.in_proj_weight"], w["resampler.attn.in_proj_bias"]
    q = layer_norm(w["resampler.query"], w, "resampler.ln_q") @ weights[:D].T + biases[:D]
    k = (kv + position_code(*size, D)) @ weights[D : 2 * D].T + biases[D : 2 * D]
    v = kv @ weights[2 * D :].T + biases[2 * D :]
    out = project(attend(q, k, v, D // 128), w, "resampler.attn.out_proj")
    return layer_norm(out, w, "resampler.ln_post") @ w["resampler.proj"]


def encode(picture: Tensor, w: Weights, config: dict[str, Any]) -> Tensor:
    """(query_num, D) of one picture (3, H, W) with values from -1 to 1."""
    p = config["vision_config"]["patch_size"]
    size = (picture.shape[1] // p, picture.shape[2] // p)
    return resampler(siglip(picture, w, config), size, w)
