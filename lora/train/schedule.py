"""The learning rate of each step: a warm-up, then a schedule."""

import math

SCHEDULES = {  # progress after the warm-up, in [0, 1) -> share of the learning rate
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate(step: int, total: int, peak: float, warmup: int = 0, schedule: str = "cosine") -> float:
    """The rate of step `step` (from 0) of `total`: up in equal stairs over `warmup` steps, then by `schedule`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * SCHEDULES[schedule]((step - warmup) / max(1, total - warmup))
