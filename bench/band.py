"""What clipping costs on one CPU thread: the bounds of every method, and a whole step with them.

    python -m bench.band [--skip_compiled] [--methods fixed "band kl" ...]

First table: CPU nanoseconds per token to compute the bounds of a step. "plain bisection" is 50 halvings of each bound
in ratio form on the whole tensor, written here as the baseline; runs are paired with it, so that a busy machine slows
both sides of a ratio. Second table: bounds, loss, gradient and statistics of 4 updates x 16 micro-batches.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bandpo.rule import Result, Rule, View, clipped_loss
from bandpo.rules import load_rule

SIZES = {"4k": 1 << 12, "64k": 1 << 16, "1M": 1 << 20}
DELTA = 0.05
METHODS = {
    "fixed": ("fixed", "kl"),
    "dcpo": ("dcpo", "kl"),
    "band kl": ("band", "kl"),
    "band tv": ("band", "tv"),
    "band chi2": ("band", "chi2"),
    "band jensen_shannon": ("band", "jensen_shannon"),
}


def plain_bisection(old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """(lower, upper) of KL as one would first write it: 50 halvings of [0, 1] and of [1, 1/p]."""
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


def rule_of(clip: str, divergence: str) -> Rule:
    knobs = {"delta": DELTA, "divergence": divergence, "ratio_cap": 10.0, "clip_low": 0.2, "clip_high": 0.2}
    rule = load_rule(clip, {})
    return rule.with_parameters({name: value for name, value in knobs.items() if name in rule.defaults})


def view_of(logprobs: Tensor, old: Tensor, advantages: Tensor) -> View:
    one = torch.tensor([len(old)])
    return View(logprobs, old, advantages, torch.zeros_like(old), one, one)


def bounds_of(clip: str, divergence: str) -> Callable[[Tensor], Result]:
    rule = rule_of(clip, divergence)
    return lambda old: rule(view_of(old, old, old))


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def paired(function: Callable[[], object], baseline: Callable[[], object], runs: int) -> tuple[float, float]:
    """Medians of (CPU seconds of `function`, baseline over function), of runs that alternate."""
    function()
    pairs = [(cpu_seconds(function), cpu_seconds(baseline)) for _ in range(runs)]
    return statistics.median(a for a, _ in pairs), statistics.median(b / a for a, b in pairs)


def sample(tokens: int) -> Tensor:
    """Log-probs as a policy of entropy about 0.6 samples them: most tokens sure, a long tail of rare ones."""
    generator = torch.Generator().manual_seed(0)
    return -torch.empty(tokens).exponential_(generator=generator).pow(2.5) * 0.2


def table_of_bounds(methods: list[str], skip_compiled: bool) -> None:
    print(f"CPU ns per token, one thread, KL's delta {DELTA}; in brackets: times faster than the plain bisection\n")
    print(f"{'':22}" + "".join(f"{name + how:>20}" for how in (" eager", " compiled") for name in SIZES))
    for name in ["plain bisection", *methods]:
        bounds = plain_bisection if name == "plain bisection" else bounds_of(*METHODS[name])
        cells = []
        for compiled in (False, True):
            if compiled and skip_compiled:
                break
            torch._dynamo.reset()
            function = torch.compile(bounds, dynamic=False) if compiled else bounds
            for tokens in SIZES.values():
                old = sample(tokens)
                repeats = max(1, (1 << 16) // tokens)  # small sizes many times, against the clock's grain

                def many(f: Callable[[Tensor], object], old: Tensor = old, repeats: int = repeats) -> None:
                    for _ in range(repeats):
                        f(old)

                runs = 3 if tokens == SIZES["1M"] else 7
                seconds, ratio = paired(lambda f=function, m=many: m(f), lambda m=many: m(plain_bisection), runs)
                cells.append(f"{seconds / tokens / repeats * 1e9:11.1f} ({ratio:5.1f}x)")
        print(f"{name:22}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


def step(clip: str, divergence: str, minibatches: list[list[Tensor]], advantages: Tensor) -> None:
    """The clip's share of a step: bounds, loss, its gradient and the statistics in every update."""
    rule = rule_of(clip, divergence)
    for minibatch in minibatches:
        for old in minibatch:
            # As one step in a token's logit moves it; next to no token is clipped, as in training.
            view = view_of((old - 0.01 * torch.expm1(old)).requires_grad_(), old, advantages)
            found = clipped_loss(rule, view, surrogate="ppo", dual_clip=10.0)
            found.losses.sum().backward()
            found.statistics(view)


def table_of_steps(methods: list[str]) -> None:
    tokens = 16384
    batch, advantages = [[sample(tokens) for _ in range(16)] for _ in range(4)], torch.randn(tokens)
    print(f"\nclip's part of a step: 4 updates x 16 micro-batches of {tokens} tokens, eager\n")
    print(f"{'':22}{'CPU ms':>10}{'against fixed':>16}")
    for name in methods:
        clip, divergence = METHODS[name]
        seconds, ratio = paired(
            lambda c=clip, d=divergence: step(c, d, batch, advantages),
            lambda: step("fixed", "kl", batch, advantages),
            runs=9,
        )
        print(f"{name:22}{seconds * 1e3:10.1f}{1 / ratio:15.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip_compiled", action="store_true", help="torch.compile needs a C++ compiler and minutes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    table_of_bounds(args.methods, args.skip_compiled)
    table_of_steps(args.methods)


if __name__ == "__main__":
    main()
