"""Samples to micro-batches: assign sequences to ranks, split by a token budget, pad or pack into tensors.

    minibatches = make_minibatches(run, samples)                # list[list[MicroBatch]]

    shares = assign_to_ranks(lengths, groups, ranks=8)          # indices of each rank's sequences
    parts = make_micro_batches(lengths, groups, zeros, ...)     # indices of the sequences of each micro-batch
    inputs = model_inputs(prompts, responses, layout="padded")  # input tensors of one micro-batch

Every rank runs the same number of micro-batches, because their collectives pair up. Masks come from lengths, never from
token ids: the pad token may be the end token too.

Axes: n sequences of a micro-batch, T their response tokens, flat, one sequence after another.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trainer.run import Run
from trainer.types import MicroBatch, Sample


def make_minibatches(run: Run, samples: list[Sample]) -> list[list[MicroBatch]]:
    """One minibatch per update of an epoch, each a list of this rank's micro-batches, one per forward pass; collective.

    A sample's minibatch follows from its `index`. Within a minibatch, sequences are reassigned to ranks: about the same
    number of tokens and the same number of micro-batches for each. Denominators of the loss are those of the whole
    minibatch over all ranks. Raises ValueError for a minibatch with fewer sequences than ranks.
    """
    minibatches: list[list[Sample]] = [[] for _ in range(run.plan.minibatches)]
    for sample in run.ranks.gather(samples):
        minibatches[sample.index // run.plan.sequences_per_minibatch].append(sample)
    made = []
    for m, minibatch in enumerate(minibatches):
        if len(minibatch) < run.plan.processes:
            raise ValueError(f"minibatch {m} has {len(minibatch)} samples for {run.plan.processes} processes")
        with_loss = [s for s in minibatch if not (run.cfg.mask_truncated and s.truncated)]
        counts = {
            "sequences": len(with_loss),
            "tokens": sum(len(s.completion.token_ids) for s in with_loss),
        }
        made.append([micro_batch(run, rows, **counts) for rows in split_minibatch(run, minibatch)])
    return made


def split_minibatch(run: Run, minibatch: list[Sample]) -> list[list[Sample]]:
    """This rank's micro-batches of a minibatch, as many as every other rank has."""
    lengths = [len(s.prompt) + len(s.completion.token_ids) for s in minibatch]
    groups = group_numbers(minibatch) if run.layout == "by_sequence" else list(range(len(minibatch)))
    zeros = [s.advantage == 0 for s in minibatch]
    shares = assign_to_ranks(lengths, groups, run.plan.processes)

    def split(share: list[int], at_least: int) -> list[list[int]]:
        parts = make_micro_batches(
            [lengths[i] for i in share],
            [groups[i] for i in share],
            [zeros[i] for i in share],
            budget=run.cfg.micro_batch_tokens,
            padded=run.layout != "packed",
            at_least=at_least,
        )
        return [[share[i] for i in part] for part in parts]

    busiest = max(len(split(share, 1)) for share in shares)
    return [[minibatch[i] for i in part] for part in split(shares[run.plan.rank], busiest)]


def group_numbers(samples: Sequence[Sample]) -> list[int]:
    """For each sample the number of its run of equal prompts. Example: prompts A, A, B, A -> 0, 0, 1, 2."""
    numbers = [0]
    for before, sample in pairwise(samples):
        numbers.append(numbers[-1] + (sample.prompt != before.prompt))
    return numbers


def assign_to_ranks(lengths: Sequence[int], groups: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of `lengths` for each rank, about the same number of tokens for each.

    Whole groups where they are equally large and divide evenly, else single sequences. From the most tokens to the
    fewest in snake order (ranks 0, 1, 1, 0, 0, 1, ...): no two ranks differ by more tokens than the largest.
    """
    of_group: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        of_group.setdefault(group, []).append(i)
    units = list(of_group.values())
    if len(units) % ranks or len({len(unit) for unit in units}) > 1:
        units = [[i] for i in range(len(lengths))]
    order = sorted(units, key=lambda unit: -sum(lengths[i] for i in unit))  # stable: the same on every rank
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for k, unit in enumerate(order):
        turn, place = divmod(k, ranks)
        shares[place if turn % 2 == 0 else ranks - 1 - place] += unit
    return shares


def make_micro_batches(
    lengths: Sequence[int],
    groups: Sequence[int],
    zeros: Sequence[bool],
    *,
    budget: int,
    padded: bool,
    at_least: int,
) -> list[list[int]]:
    """Indices of `lengths` in micro-batches: at least `at_least` of them, each within `budget` tokens.

    Groups in which every advantage is 0 (`zeros`) come first: their micro-batches may need no backward pass. Then by
    length, to save padding; a group stays together. The longest come first, so that running out of memory shows at
    once. A sequence longer than the budget gets a micro-batch of its own.
    """
    assert at_least <= len(lengths), f"{at_least} micro-batches from {len(lengths)} sequences"
    longest: dict[int, int] = {}
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(length, longest.get(group, 0))
    several = (max(lengths) * len(lengths) if padded else sum(lengths)) > budget  # else no backward pass can be skipped
    trained = {group for group, zero in zip(groups, zeros, strict=True) if several and not zero}
    # Ties by number: the same order in every run.
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
    """The tensors of one micro-batch. sequences, tokens: those of the minibatch that carry loss."""
    cfg, device = run.cfg, run.ranks.device
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

    def per_token(values: Sequence[Any], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(repeats).to(device)

    return MicroBatch(
        samples=samples,
        sequence_ids=torch.arange(len(samples)).repeat_interleave(repeats).to(device),
        rollout_logprobs=concat([s.completion.logprobs for s in samples]).to(device),
        advantages=concat([s.token_advantages for s in samples]).to(device),
        loss_weights=per_token(weights),
        **model_inputs(
            [s.prompt for s in samples], [s.completion.token_ids for s in samples], layout=run.layout, device=device
        ),
    )


def concat(rows: Sequence[list[float]]) -> Tensor:
    """(T,) float32, the numbers of sequences one after another."""
    return torch.tensor([x for row in rows for x in row], dtype=torch.float32)


def loss_weights(
    lengths: Sequence[int], *, aggregation: str, sequences: int, tokens: int, max_response_tokens: int
) -> list[float]:
    """For each sequence the weight of its tokens, so that the loss of an update is sum(weights * token losses).

    seq-mean-token-mean      1 / (sequences * length): every sequence counts the same (GRPO, arXiv 2402.03300)
    token-mean               1 / tokens: every token counts the same (DAPO, arXiv 2503.14476)
    seq-mean-token-sum-norm  1 / (sequences * max_response_tokens): independent of length (Dr. GRPO, arXiv 2503.20783)

    lengths: response tokens of each sequence of this micro-batch. sequences, tokens: counts of the whole update, over
    all micro-batches and ranks, so that the split does not matter. Raises ValueError for an unknown aggregation.
    """
    sequences, tokens = max(1, sequences), max(1, tokens)  # 0 where every response is masked: all weights become 0
    if aggregation == "seq-mean-token-mean":
        return [1 / (sequences * length) for length in lengths]
    if aggregation == "token-mean":
        return [1 / tokens] * len(lengths)
    if aggregation == "seq-mean-token-sum-norm":
        return [1 / (sequences * max_response_tokens)] * len(lengths)
    raise ValueError(
        f"loss_aggregation: {aggregation!r} is not known; use seq-mean-token-mean, token-mean or "
        "seq-mean-token-sum-norm"
    )


def model_inputs(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], *, layout: str, device: torch.device
) -> dict[str, Any]:
    """The input tensors of a `MicroBatch`. The last token of a response predicts nothing and is not an input.

    padded: (n, L), for any attention. packed: end to end, for an attention that finds the sequences by their positions.
    by_sequence: end to end, for attention_by_sequence (policy.py); a prompt that follows itself is packed once.
    """
    inputs = [r[:-1] for r in responses]
    width = max(len(p) + len(r) for p, r in zip(prompts, inputs, strict=True))
    pieces: list[list[int]] = []  # tokens, in order
    starts: list[int] = []  # position of each piece in its sequence
    places: list[Tensor] = []  # (length,) flat position of each token of a sequence
    end = 0
    for i, (p, r) in enumerate(zip(prompts, inputs, strict=True)):
        if layout == "by_sequence" and i and p == prompts[i - 1]:
            of_prompt = places[-1][: len(p)]
        else:
            of_prompt = torch.arange(end, end + len(p))
            end += len(p)
            pieces.append(p)
            starts.append(0)
        places.append(torch.cat([of_prompt, torch.arange(end, end + len(r))]))
        end += len(r)
        pieces.append(r)
        starts.append(len(p))
        if layout == "padded":
            pieces.append([0] * ((i + 1) * width - end))
            starts.append(len(p) + len(r))
            end = (i + 1) * width
    shape = (len(inputs), width) if layout == "padded" else (1, end)
    position_ids = torch.cat([torch.arange(s, s + len(piece)) for s, piece in zip(starts, pieces, strict=True)])
    tensors: dict[str, Tensor | None] = {
        "input_ids": torch.tensor([token for piece in pieces for token in piece]).view(shape),
        "position_ids": position_ids.view(shape),
        "predictors": torch.cat([place[len(p) - 1 :] for p, place in zip(prompts, places, strict=True)]),
        "targets": torch.tensor([token for r in responses for token in r]),
        "attention_mask": None,
    }
    if layout == "padded":
        lengths = torch.tensor([len(place) for place in places])
        tensors["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    elif layout == "by_sequence":
        first = torch.empty(end, dtype=torch.long)
        for i in reversed(range(len(places))):
            first[places[i]] = torch.arange(i * width, i * width + len(places[i]))
        tensors["sequences"] = torch.nn.utils.rnn.pad_sequence(places, batch_first=True)  # (n, L)
        tensors["places"] = first
    return {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
