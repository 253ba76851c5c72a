"""What every rule costs on one CPU thread beside fixed clipping: losses, their gradient and statistics of 1M tokens.

    python -m bench.rules [--tokens 1048576] [--rules sapo cppo ...]

CPU nanoseconds per token, medians of runs paired with the baseline, so that a busy machine slows both sides alike. A
rule that looks at the whole update has its sums in it, but not the forward pass that all but the first update of a step
need for them.
"""

import argparse
from dataclasses import replace

import torch

from bandpo.rule import Rule, View, clipped_loss, totals
from bandpo.rules import RULES, load_rule
from bench.band import paired, sample

NEEDED = {"atr": {"delta": 0.03}}
RESPONSE = 1024  # tokens


def view_of(tokens: int) -> View:
    """Responses of an update's last minibatch: most ratios next to one."""
    generator = torch.Generator().manual_seed(0)
    old = sample(tokens)
    moved = (old + 0.02 * torch.randn(tokens, generator=generator) * (1 - old.exp())).clamp(max=-1e-7)
    sequences = tokens // RESPONSE
    return View(
        logprobs=moved,
        old_logprobs=old,
        advantages=torch.randn(sequences, generator=generator).repeat_interleave(RESPONSE),
        entropy=torch.rand(tokens, generator=generator),
        lengths=torch.full((sequences,), RESPONSE),
        numbers=torch.arange(sequences),
    )


def update(rule: Rule, view: View) -> None:
    """All that a rule adds to an update of these tokens."""
    view = replace(view, logprobs=view.logprobs.detach().requires_grad_())
    view = replace(view, totals=totals(rule, [view], lambda sums: sums, surrogate="ppo"))
    result = clipped_loss(rule, view, surrogate="ppo", dual_clip=10.0)
    result.losses.sum().backward()
    result.statistics(view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20, help=f"a multiple of {RESPONSE}")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    view, fixed = view_of(args.tokens), load_rule("fixed", {})
    print(f"{'':18}{'CPU ns per token':>18}{'against fixed':>16}")
    for name in args.rules:
        rule = load_rule(name, NEEDED.get(name, {}))
        seconds, ratio = paired(lambda r=rule: update(r, view), lambda: update(fixed, view), args.runs)
        print(f"{name:18}{seconds / args.tokens * 1e9:18.0f}{1 / ratio:15.2f}x", flush=True)


if __name__ == "__main__":
    main()
