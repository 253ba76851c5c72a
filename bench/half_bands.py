"""Two rules of the study: one bound of the Band, the other one of GRPO. Also an example of rules of one's own.

accelerate launch train.py --config demo_band.yaml --rule bench/half_bands.py:band_upper
"""

import torch

from bandpo.rule import Result, View
from bandpo.rules import RULES


def band_upper(view: View, *, clip_low: float = 0.2) -> Result:
    """Band's upper bound with GRPO's lower one."""
    _, upper = RULES["band"](view)
    return torch.full_like(upper, 1 - clip_low), upper


def band_lower(view: View, *, clip_high: float = 0.2) -> Result:
    """Band's lower bound with GRPO's upper one."""
    lower, _ = RULES["band"](view)
    return lower, torch.full_like(lower, 1 + clip_high)
