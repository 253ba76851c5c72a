"""Radii of the Band that are not constant: what docs/atlas.md tried. Also examples of rules of one's own.

accelerate launch train.py --config demo_band.yaml --rule bench/radii.py:by_difficulty

All keep `delta` as the mean radius, roughly, so that a difference is one of shape and not of size.
"""

from torch import Tensor

from bandpo.band import band_bounds
from bandpo.rule import Result, View


def _band(view: View, delta: Tensor) -> Result:
    return band_bounds(view.old_logprobs, delta=delta, divergence="kl", cap=10.0)


def by_difficulty(view: View, *, delta: float = 0.05) -> Result:
    """delta A^2: wide for the surprising answers of a group (the mean of A^2 over a group is one)."""
    return _band(view, delta * view.advantages.square().clamp(0.1, 10))


def early(view: View, *, delta: float = 0.05) -> Result:
    """From 2 delta at the first token down to delta / 10 at the last."""
    last = (view.lengths - 1).clamp(min=1)[view.sequence]
    return _band(view, delta * (2 - 1.9 * view.position / last))


def late(view: View, *, delta: float = 0.05) -> Result:
    """From delta / 10 at the first token up to 2 delta at the last: what comes early moves all that follows."""
    last = (view.lengths - 1).clamp(min=1)[view.sequence]
    return _band(view, delta * (0.1 + 1.9 * view.position / last))
