"""Cost of clip bounds on one CPU thread: CPU nanoseconds per token for every method.

    python -m bench.band [--methods fixed "band kl" ...]

"plain bisection" is the baseline: 50 halvings of each bound in ratio form on the whole tensor. Every run is paired with
a run of the baseline, so that a busy machine slows both sides of a ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bandpo.rule import Result, load_rule

SIZES = {"4k": 1 << 12, "64k": 1 << 16, "1M": 1 << 20}
DELTA = 0.05
METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "fixed": ("fixed", {}),
    "dcpo": ("dcpo", {}),
    "band kl": ("band", {"delta": DELTA, "divergence": "kl"}),
    "band tv": ("band", {"delta": DELTA, "divergence": "tv"}),
    "band chi2": ("band", {"delta": DELTA, "divergence": "chi2"}),
    "band jensen_shannon": ("band", {"delta": DELTA, "divergence": "jensen_shannon"}),
}


def plain_bisection(old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """(lower, upper) of KL, directly: 50 halvings of [0, 1] and of [1, 1/p]."""
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


def bounds_of(method: str) -> Callable[[Tensor], Result]:
    """old_logprobs (T,) -> clip bounds."""
    rule = load_rule(*METHODS[method])

    def bounds(old: Tensor) -> Result:
        ids = torch.zeros(len(old), dtype=torch.int64, device=old.device)
        return rule(logprobs=old, old_logprobs=old, advantages=old, entropy=old, sequence_ids=ids)

    return bounds


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def paired(function: Callable[[], object], baseline: Callable[[], object], runs: int) -> tuple[float, float]:
    """Medians of CPU seconds of `function` and of baseline / function, from alternating runs."""
    function()
    pairs = [(cpu_seconds(function), cpu_seconds(baseline)) for _ in range(runs)]
    return statistics.median(a for a, _ in pairs), statistics.median(b / a for a, b in pairs)


def sample(tokens: int) -> Tensor:
    """Log-probs as a policy of entropy about 0.6 samples them: most tokens near p = 1, a long tail of rare ones."""
    generator = torch.Generator().manual_seed(0)
    return -torch.empty(tokens).exponential_(generator=generator).pow(2.5) * 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"CPU ns per token, one thread, delta {DELTA}; in brackets: times faster than the plain bisection\n")
    print(f"{'':22}" + "".join(f"{name:>20}" for name in SIZES))
    for name in ["plain bisection", *args.methods]:
        bounds, cells = plain_bisection if name == "plain bisection" else bounds_of(name), []
        for tokens in SIZES.values():
            old = sample(tokens)
            repeats = max(1, (1 << 16) // tokens)  # small sizes repeat, against the clock's resolution

            def many(f: Callable[[Tensor], object], old: Tensor = old, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    f(old)

            runs = 3 if tokens == SIZES["1M"] else 7
            seconds, ratio = paired(lambda f=bounds, m=many: m(f), lambda m=many: m(plain_bisection), runs)
            cells.append(f"{seconds / tokens / repeats * 1e9:11.1f} ({ratio:5.1f}x)")
        print(f"{name:22}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
