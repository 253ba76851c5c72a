"""Pure functions of the step: nothing to save, nothing to restore when a run is resumed."""

import hashlib
import math

from configs.schema import Config


def learning_rate(cfg: Config, step: int) -> float:
    """The learning rate of the step after `step` completed ones."""
    if step < cfg.lr_warmup_steps:
        return cfg.lr * (step + 1) / cfg.lr_warmup_steps
    done = (step - cfg.lr_warmup_steps) / max(1, cfg.max_steps - cfg.lr_warmup_steps)
    return (
        cfg.lr * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.lr_schedule]
    )


def seed_of(*key: object) -> int:
    """A seed of 31 bits that is a pure function of `key`: nothing to restore when a run is resumed."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1
