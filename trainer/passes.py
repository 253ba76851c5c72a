"""Forward passes over the micro-batches of a step, and what they are for: anchors, references, what a rule needs."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from bandpo.rule import View
from bandpo.rule import totals as add_up
from trainer.batching import Tokens, collate
from trainer.policy import Policy
from trainer.run import Run
from trainer.state import Sample


@dataclass(frozen=True)
class Anchor:
    """What the ratios of a micro-batch's tokens are relative to, (T,) float32 each: made once in a step, before the
    first update that uses the tokens."""

    old_logprobs: Tensor  # under the old policy: the ratio is r = exp(logprobs - old_logprobs)
    trainer_logprobs: Tensor  # of the pass that made it; the same as old_logprobs unless old_policy is sampler
    entropy: Tensor  # of that pass
    parameters: dict[str, float | Tensor]  # of the rule, for these tokens: {"delta": the radius} of a Band
    before_updates: bool  # whether the pass was made by the policy that sampled, before an update of it


Anchors = list[list[Anchor | None]]  # [minibatch][micro-batch]; None: the first update's own pass makes it


def forward(
    run: Run, policy: Policy, minibatches: Sequence[Sequence[Tokens]], phase: str
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(log-probs, entropy) of every micro-batch, behind a progress bar."""
    with run.tracker.progress(sum(map(len, minibatches)), f"step {run.step + 1} {phase}", "micro-batches") as bar:
        return [[(policy(tokens.batch), bar.update())[0] for tokens in minibatch] for minibatch in minibatches]


def has_gradient(run: Run, tokens: Tokens, loss: Tensor, *of_policy: Tensor) -> bool:
    """Whether a micro-batch's backward pass would change a gradient, on any rank; collective.

    Advantages of zero leave none, unless the loss has a term without them, such as a KL: so the loss itself is asked,
    as far back as what the policy gave, which costs nothing. of_policy: all tensors with a gradient that the loss is
    made of; one that is left out here is trained on only where there are advantages.
    """
    if tokens.has_signal:
        return True
    gradients = torch.autograd.grad(loss, of_policy, retain_graph=True, allow_unused=True)
    some = any(g.ne(0).any().item() for g in gradients if g is not None)  # a NaN is not zero either
    return run.ranks.largest({"some": some})["some"] > 0


@torch.no_grad()
def reference_pass(run: Run, minibatches: list[list[Tokens]]) -> list[list[Tokens]]:
    """The micro-batches with the log-probs of the model started from; as they are when kl_coef is 0."""
    if not run.reference:
        return minibatches
    run.reference.to(run.ranks.device)
    passes = forward(run, run.reference, minibatches, "reference")
    if run.cfg.reference_offload:
        run.reference.to("cpu")
    return [
        [replace(tokens, ref_logprobs=logprobs) for tokens, (logprobs, _) in zip(minibatch, row, strict=True)]
        for minibatch, row in zip(minibatches, passes, strict=True)
    ]


@torch.no_grad()
def with_old_logprobs(run: Run, samples: list[Sample]) -> list[Sample]:
    """Samples that wait for a later step, with the trainer's log-probs and entropy of now: their anchor in that step.

    With `old_policy: sampler` the samples as they are. Collective.
    """
    if run.cfg.old_policy == "sampler" or samples[0].old_logprobs:
        return samples
    minibatches = collate(run, samples)
    passes = forward(run, run.policy, minibatches, "log-probs for later steps")
    everyone = range(len(samples) * run.plan.processes)  # samples are dealt out to ranks anew
    found = [
        item
        for minibatch, row in zip(minibatches, passes, strict=True)
        for tokens, (logprobs, entropy) in zip(minibatch, row, strict=True)
        for item in by_row(tokens, {"old_logprobs": logprobs, "old_entropy": entropy}, wanted=everyone)
    ]
    values, first = dict(run.ranks.gather(found)), run.plan.rank * len(samples)
    return [replace(sample, **values[first + i]) for i, sample in enumerate(samples)]


def by_row(
    tokens: Tokens, values: Mapping[str, torch.Tensor], wanted: Container[int]
) -> list[tuple[int, dict[str, list[float]]]]:
    """(T,) values by name, cut into those of each sequence whose number is wanted: (number, name -> its tokens')."""
    ends = list(accumulate(len(row.response) for row in tokens.rows))
    return [
        (row.number, {name: value[end - len(row.response) : end].tolist() for name, value in values.items()})
        for row, end in zip(tokens.rows, ends, strict=True)
        if row.number in wanted
    ]


def minibatches_left(run: Run, minibatches: Sequence[Sequence[Tokens]]) -> int:
    """How many minibatches, from the first on, need no pass before the updates.

    The first update's own forward pass is still under the old policy: the same numbers, one pass less. With
    `old_policy: sampler` the engine's log-probs are the anchor, and no minibatch needs a pass. But a radius by entropy
    needs the step's mean entropy before the first update, and some rules need sums over several micro-batches: then all
    need one.
    """
    if run.cfg.radius == "entropy" or (run.rule.sums and max(map(len, minibatches)) > 1):
        return 0
    return 1 if run.cfg.old_policy == "trainer" else run.plan.minibatches


def engine_gap(seen: Sequence[tuple[Tokens, Anchor]]) -> Tensor:
    """ln(trainer / sampler) of the step's tokens, float64, where both are the same policy: before any update, and not
    for answers of an older one."""
    gaps = [
        (old.trainer_logprobs - tokens.sampler_logprobs)[(tokens.ages == 0) | (tokens.kept is not None)]
        for tokens, old in seen
        if old.before_updates
    ]
    return torch.cat(gaps).double()


def view_of(run: Run, tokens: Tokens, old: Anchor, logprobs: Tensor, update: int, totals: Mapping[str, Tensor]) -> View:
    """What the rule may see of a micro-batch in the run's update number `update`, from 0. totals: of `rule_totals`."""
    view = _view(tokens, old, logprobs, update, totals)
    if not run.rule.sums or totals:
        return view
    alone = [replace(view, logprobs=logprobs.detach())]  # it is the whole update of this rank
    return replace(view, totals=add_up(run.rule, alone, run.ranks.add_tensors, surrogate=run.cfg.surrogate))


@torch.no_grad()
def rule_totals(run: Run, minibatch: list[Tokens], olds: list[Anchor | None], update: int) -> dict[str, Tensor]:
    """The sums over an update that some rules need, under the policy just before it; collective.

    {} for other rules, and for an update of one micro-batch, whose own pass gives them (view_of).
    """
    if not run.rule.sums or len(minibatch) == 1:
        return {}
    first = update == run.step * run.cfg.updates_per_step  # of the step: the pass over the old policy is of this one
    views = [
        _view(
            tokens, old, old.trainer_logprobs if first and not tokens.kept else run.policy(tokens.batch)[0], update, {}
        )
        for tokens, old in zip(minibatch, olds, strict=True)
        if old  # all are there: see minibatches_left
    ]
    return add_up(run.rule, views, run.ranks.add_tensors, surrogate=run.cfg.surrogate)


def _view(tokens: Tokens, old: Anchor, logprobs: Tensor, update: int, totals: Mapping[str, Tensor]) -> View:
    of_tokens = (old.old_logprobs, tokens.advantages, old.entropy, tokens.lengths, tokens.numbers)
    return View(logprobs, *of_tokens, update, totals)
