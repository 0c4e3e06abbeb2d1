"""How a launch of decode attention is cut: tile, pipeline, splits, teams of the merge."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hayate.kernels._triton import cdiv, next_power_of_2

__all__ = ["Tuning", "decode_tuning", "length_block", "tile_constants"]

# Up to this many shares of keys a merge costs more than it saves.
# Measured on an H200: a context of 200 keys takes 4.8 us split, 7.4 us in one program.
_UNSPLIT_SHARES = 2


class Tuning(NamedTuple):
    """How a launch is cut.

    Nothing here depends on the lengths of the moment, which the kernel reads itself: a CUDA graph
    stays valid while the sequences grow.
    """

    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int
    splits: int  # of a sequence, at most: the grid is made for them, those without work end at once
    target: int  # programs to aim for where the lengths differ
    team: int  # splits merged by one program


def decode_tuning(
    num_sequences: int,
    num_kv_heads: int,
    rows: int,
    head_dim: int,
    dtype: torch.dtype,
    max_len: int,
    sms: int,
) -> Tuning:
    """What is best on an H200; `rows` a tile, `max_len` keys that the page table can hold."""
    num_pairs = num_sequences * num_kv_heads
    exact = dtype == torch.float32
    small = exact or head_dim > 128 or rows > 32  # what registers and shared memory hold
    block_n = 32 if small else 64
    # Between other kernels three stages are best: the more shared memory a program wants, the longer
    # it waits for the multiprocessor to be cut anew (98 us a layer of an 8B model instead of 107 with
    # five, at 200 keys). Many sequences hide that, and stream best with seven (256 of 1,100 keys: 97 %
    # of the read bandwidth instead of 91 %).
    num_stages = 7 if num_pairs >= 8 * sms else 3
    # One sequence is cut into equal shares, a long one into two a multiprocessor: they gather on few
    # of these otherwise. Of several sequences, a long one may take more than its share.
    splits = sms // num_pairs if num_sequences == 1 else cdiv(4 * sms, num_pairs)
    if num_sequences == 1 and max_len > 64 * block_n:
        splits *= 2
    splits = max(1, min(splits, 64, cdiv(max_len, block_n)))
    if max_len <= _UNSPLIT_SHARES * block_n:
        splits = 1
    # Two rounds of a merge cost less than one program reading so much.
    much = splits * next_power_of_2(rows) * next_power_of_2(head_dim) > 16_384
    return Tuning(
        block_n,
        num_warps=8 if rows > 16 else 4,
        num_stages=1 if exact else num_stages,
        splits=splits,
        target=sms if 2 * num_pairs <= sms else 4 * sms,
        team=8 if much else splits,
    )


def tile_constants(
    tuning: Tuning, rows: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The constants that follow from the shape of a tile."""
    block_r, block_k = next_power_of_2(rows), max(next_power_of_2(head_dim), 16)
    team = next_power_of_2(tuning.team)
    teams = cdiv(tuning.splits, team)
    # Partial results in 64 registers a thread; the largest fill the rest of them one by one.
    at_once = 2048 * tuning.num_warps // (block_r * block_k) if block_r * block_k <= 4096 else 1
    return {
        "K": head_dim,
        "ROWS": rows,
        "PAGE_SIZE": page_size,
        "SPLIT": tuning.splits > 1,
        "TEAM": team,
        "TEAMS": next_power_of_2(teams) if teams > 1 else 0,
        "UNSPLIT_SHARES": _UNSPLIT_SHARES,
        # A tile that fits a page lies in one; any other looks up the page of each of its keys.
        "GRAIN": tuning.block_n if tuning.block_n <= page_size else min(tuning.block_n, 64),
        "BLOCK_M": max(block_r, 16),
        "BLOCK_N": tuning.block_n,
        "BLOCK_K": block_k,
        "BLOCK_R": block_r,
        "BLOCK_I": max(min(team, at_once), 1),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def length_block(num_sequences: int) -> int:
    """For the sum of the lengths, in few sizes, as each is a kernel of its own."""
    return 1 if num_sequences == 1 else max(next_power_of_2(num_sequences), 64)
