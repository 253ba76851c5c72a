"""Cost of clip bounds on one CPU thread: CPU nanoseconds per token for every method.

    python -m bench.band

"plain bisection" is the baseline: 50 halvings per bound in ratio form on the whole tensor. Every run is paired with a
run of the baseline, so that the load of the machine affects both sides of a ratio.
"""

import statistics
import time
import timeit
from functools import partial

import torch
from torch import Tensor

from bandpo.rule import Result, load_rule

SIZES = {"4k": 1 << 12, "64k": 1 << 16, "1M": 1 << 20}
DELTA = 0.05
METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "fixed": ("fixed", {}),
    "dcpo": ("dcpo", {}),
    **{f"band {d}": ("band", {"delta": DELTA, "divergence": d}) for d in ("kl", "tv", "chi2", "jensen_shannon")},
}


def plain_bisection(old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (lower, upper) for KL directly: 50 halvings of [0, 1] and of [1, 1/p]."""
    p = old_logprobs.exp()
    q = 1 - p

    def solve(near: Tensor, far: Tensor) -> Tensor:
        for _ in range(50):
            middle = (near + far) / 2
            divergence = -p * middle.log() - q * ((1 - p * middle) / q).log()
            inside = divergence <= DELTA
            near, far = torch.where(inside, middle, near), torch.where(inside, far, middle)
        return near

    return solve(torch.ones_like(p), torch.zeros_like(p)), solve(torch.ones_like(p), 1 / p)


def bounds(method: str, old: Tensor) -> Result:
    """Compute the clip bounds of `method`. old: (T,) log-probs."""
    ids = torch.zeros(len(old), dtype=torch.int64)
    return load_rule(*METHODS[method])(logprobs=old, old_logprobs=old, advantages=old, entropy=old, sequence_ids=ids)


def sample(tokens: int) -> Tensor:
    """Draw log-probs of a policy with entropy of about 0.6: most tokens near p = 1, a long tail of rare tokens."""
    generator = torch.Generator().manual_seed(0)
    return -torch.empty(tokens).exponential_(generator=generator).pow(2.5) * 0.2


def main() -> None:
    torch.set_num_threads(1)
    print(f"CPU ns per token, one thread, delta {DELTA}; in brackets: times faster than the plain bisection\n")
    print(f"{'':22}" + "".join(f"{name:>20}" for name in SIZES))
    for name in ["plain bisection", *METHODS]:
        function, cells = partial(bounds, name) if name in METHODS else plain_bisection, []
        for tokens in SIZES.values():
            old, repeats = sample(tokens), max(1, (1 << 16) // tokens)  # small sizes repeat: the clock's resolution
            function(old)
            runs = range(3 if tokens == SIZES["1M"] else 7)
            timers = [timeit.Timer(partial(f, old), timer=time.thread_time) for f in (function, plain_bisection)]
            pairs = [[timer.timeit(repeats) for timer in timers] for _ in runs]
            nanoseconds = statistics.median(ours for ours, _ in pairs) / tokens / repeats * 1e9
            ratio = statistics.median(baseline / ours for ours, baseline in pairs)
            cells.append(f"{nanoseconds:11.1f} ({ratio:5.1f}x)")
        print(f"{name:22}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
