"""The learning rate of each step, as a share of its peak.

warm-up     step / warmup_steps, linear; the first step already learns
cosine      then half a cosine from 1 to `final` at the last step       (arXiv 1608.03983)
wsd         then 1, and in the last `decay_share` of the run 1 - sqrt(progress) down to `final`
            (warm-up, stable, decay: arXiv 2404.06395; the square root: arXiv 2405.18392)
constant    then 1
"""

from __future__ import annotations

import math

from hayate.training.config import ScheduleConfig


def learning_rate_share(step: int, num_steps: int, schedule: ScheduleConfig) -> float:
    """The factor of the peak learning rate in `step`, 0 <= step < num_steps."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    span = max(num_steps - 1 - warmup, 1)
    progress = min((step - warmup) / span, 1.0)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "wsd":
        stable = 1.0 - schedule.decay_share
        if progress <= stable:
            return 1.0
        fall = 1.0 - math.sqrt((progress - stable) / schedule.decay_share)
    else:
        fall = 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final + (1.0 - schedule.final) * fall
