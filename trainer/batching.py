"""Samples to micro-batches: assign sequences to ranks, split by a token budget, pad or pack into tensors.

    minibatches = make_minibatches(run, samples)                # list[list[MicroBatch]]

    shares = assign_to_ranks(lengths, groups, ranks=8)          # indices of each rank's sequences
    parts = make_micro_batches(lengths, groups, zeros, ...)     # indices of the sequences of each micro-batch

Every rank runs the same number of micro-batches, because each pass is collective. Masks are built from lengths rather
than token ids, because the pad token may also be the end-of-sequence token.

Axes: n sequences of a micro-batch; T response tokens of these sequences, concatenated.
"""

from collections.abc import Sequence
from typing import Any

import torch

from trainer.attention import model_inputs
from trainer.run import Run
from trainer.types import MicroBatch, Sample


def make_minibatches(run: Run, samples: list[Sample]) -> list[list[MicroBatch]]:
    """Build the minibatches of an epoch, one per update, each a list of this rank's micro-batches. Collective.

    A sample's `index` determines its minibatch. Within a minibatch, sequences are reassigned to ranks to balance their
    tokens. All ranks get the same number of micro-batches. Loss denominators count the whole minibatch over all ranks.
    Raises ValueError if a rank has fewer sequences of a minibatch than another has micro-batches.
    """
    minibatches: list[list[Sample]] = [[] for _ in range(run.plan.minibatches)]
    for sample in run.ranks.gather(samples):
        minibatches[sample.index // run.plan.sequences_per_minibatch].append(sample)
    micro_batches = []
    for minibatch in minibatches:
        with_loss = [s for s in minibatch if not (run.cfg.mask_truncated and s.truncated)]
        counts = {
            "sequences": len(with_loss),
            "tokens": sum(len(s.completion.token_ids) for s in with_loss),
        }
        micro_batches.append([micro_batch(run, rows, **counts) for rows in split_minibatch(run, minibatch)])
    return micro_batches


def split_minibatch(run: Run, minibatch: list[Sample]) -> list[list[Sample]]:
    """Return this rank's micro-batches of a minibatch. All ranks get the same number."""
    lengths = [len(s.prompt) + len(s.completion.token_ids) for s in minibatch]
    by_prompt, G = run.policy.layout == "by_sequence", run.cfg.samples_per_prompt
    groups: list[Any] = [(s.step, s.index // G) if by_prompt else i for i, s in enumerate(minibatch)]
    zeros = [s.advantage == 0 for s in minibatch]
    shares = assign_to_ranks(lengths, groups, run.plan.processes)

    def split(share: list[int], at_least: int) -> list[list[int]]:
        parts = make_micro_batches(
            [lengths[i] for i in share],
            [groups[i] for i in share],
            [zeros[i] for i in share],
            budget=run.cfg.micro_batch_tokens,
            padded=run.policy.layout != "packed",
            at_least=at_least,
        )
        return [[share[i] for i in part] for part in parts]

    busiest = max((len(split(share, 1)) for share in shares if share), default=1)
    if busiest > min(map(len, shares)):
        raise ValueError(
            f"a minibatch has {len(minibatch)} samples for {run.plan.processes} processes, and one of them runs "
            f"{busiest} micro-batches; add a multiple of {run.plan.processes} samples, or raise micro_batch_tokens"
        )
    return [[minibatch[i] for i in part] for part in split(shares[run.plan.rank], busiest)]


def assign_to_ranks(lengths: Sequence[int], groups: Sequence[Any], ranks: int) -> list[list[int]]:
    """Assign sequences to ranks, balanced by tokens; return the indices of `lengths` for each rank.

    Assigns whole groups if they have the same size and their number is a multiple of `ranks`, else single sequences.
    The order is by tokens, descending, in snake order (ranks 0, 1, 1, 0, 0, 1, ...). Two ranks differ by at most the
    tokens of the largest group or sequence.
    """
    of_group: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        of_group.setdefault(group, []).append(i)
    units = list(of_group.values())
    if len(units) % ranks or len({len(unit) for unit in units}) > 1:
        units = [[i] for i in range(len(lengths))]
    order = sorted(units, key=lambda unit: -sum(lengths[i] for i in unit))  # stable sort: same order on every rank
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for k, unit in enumerate(order):
        turn, place = divmod(k, ranks)
        shares[place if turn % 2 == 0 else ranks - 1 - place] += unit
    return shares


def make_micro_batches(
    lengths: Sequence[int],
    groups: Sequence[Any],
    zeros: Sequence[bool],
    *,
    budget: int,
    padded: bool,
    at_least: int,
) -> list[list[int]]:
    """Split sequences into at least `at_least` micro-batches of at most `budget` tokens; return indices of `lengths`.

    zeros: whether the advantage of each sequence is 0. Zero-advantage groups come first, since their micro-batches may
    need no backward pass. Groups are sorted by length to reduce padding, which counts as tokens if `padded`. The order
    is longest first: an out-of-memory error occurs early. A sequence longer than `budget` gets its own micro-batch.
    `at_least` is at most the number of sequences.
    """
    longest: dict[Any, int] = {}
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(length, longest.get(group, 0))
    several = (max(lengths) * len(lengths) if padded else sum(lengths)) > budget  # one micro-batch: never skipped
    trained = {group for group, zero in zip(groups, zeros, strict=True) if several and not zero}
    # Ties are broken by index, so that the order is the same in every run.
    order = sorted(
        range(len(lengths)), key=lambda i: (groups[i] in trained, -longest[groups[i]], groups[i], -lengths[i], i)
    )
    parts: list[list[int]] = []
    width = tokens = 0
    for i in order:
        width = max(width, lengths[i])
        if not parts or (width * (len(parts[-1]) + 1) if padded else tokens + lengths[i]) > budget:
            parts.append([])
            width, tokens = lengths[i], 0
        parts[-1].append(i)
        tokens += lengths[i]
    while len(parts) < at_least:  # halve the largest
        k = max(range(len(parts)), key=lambda k: len(parts[k]))
        middle = len(parts[k]) // 2
        parts[k : k + 1] = [parts[k][:middle], parts[k][middle:]]
    return parts


def micro_batch(run: Run, samples: list[Sample], *, sequences: int, tokens: int) -> MicroBatch:
    """Build the tensors of one micro-batch. sequences, tokens: counts of the minibatch that enter the loss."""
    cfg, device, dtype = run.cfg, run.ranks.device, torch.float32
    lengths = [len(s.completion.token_ids) for s in samples]
    weights = loss_weights(
        lengths,
        aggregation=cfg.loss_aggregation,
        sequences=sequences,
        tokens=tokens,
        max_response_tokens=cfg.max_response_tokens,
    )
    if cfg.mask_truncated:
        weights = [0.0 if s.truncated else weight for s, weight in zip(samples, weights, strict=True)]
    repeats = torch.tensor(lengths)

    return MicroBatch(
        samples=samples,
        sequence_ids=torch.arange(len(samples)).repeat_interleave(repeats).to(device),
        rollout_logprobs=torch.tensor([x for s in samples for x in s.completion.logprobs], dtype=dtype).to(device),
        advantages=torch.tensor([x for s in samples for x in s.token_advantages], dtype=dtype).to(device),
        loss_weights=torch.tensor(weights, dtype=dtype).repeat_interleave(repeats).to(device),
        **model_inputs(
            [s.prompt for s in samples],
            [s.completion.token_ids for s in samples],
            layout=run.policy.layout,
            device=device,
        ),
    )


def loss_weights(
    lengths: Sequence[int], *, aggregation: str, sequences: int, tokens: int, max_response_tokens: int
) -> list[float]:
    """Return the token weight of each sequence, so that the loss of an update is sum(weights * token losses).

    seq-mean-token-mean      1 / (sequences * length): every sequence counts the same (GRPO, arXiv 2402.03300)
    token-mean               1 / tokens: every token counts the same (DAPO, arXiv 2503.14476)
    seq-mean-token-sum-norm  1 / (sequences * max_response_tokens): independent of length (Dr. GRPO, arXiv 2503.20783)

    lengths: response tokens of each sequence of this micro-batch. sequences, tokens: counts over all micro-batches and
    ranks of the update, so that the loss does not depend on the split. Raises ValueError for an unknown aggregation.
    """
    sequences, tokens = max(1, sequences), max(1, tokens)  # 0 where every response is masked: all weights become 0
    weights = {
        "seq-mean-token-mean": [1 / (sequences * length) for length in lengths],
        "token-mean": [1 / tokens] * len(lengths),
        "seq-mean-token-sum-norm": [1 / (sequences * max_response_tokens)] * len(lengths),
    }
    if aggregation not in weights:
        raise ValueError(f"loss_aggregation: {aggregation!r} is not known; use {', '.join(weights)}")
    return weights[aggregation]
