"""From sampled answers to micro-batches: deal out to ranks, cut by a token budget, lay response tokens flat.

    minibatches = collate(run, samples)                         # of Tokens: all that the loss needs

    shares = deal(lengths, groups, signal, ranks=8)             # its parts: which sequences each rank trains on,
    parts = cut(lengths, groups=groups, signal=signal, ...)     # which of them go through the model together,
    batch = lay_out(prompts, responses, layout="padded", ...)   # their input tensors

Every rank must run the same number of micro-batches (their collectives pair up), so `cut` can be asked for a number of
parts. Masks come from lengths, never from token ids: the pad token may be the end token too.
"""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import torch

from bandpo.objective import aggregation_weights
from trainer.policy import MicroBatch
from trainer.ranks import Pair
from trainer.run import Run
from trainer.state import Sample


@dataclass(frozen=True)
class Tokens:
    """A micro-batch with what is known of its response tokens before an update; (T,) float32 where not said, flat
    over its n sequences."""

    batch: MicroBatch
    rows: list["TokenRow"]  # its sequences
    lengths: torch.Tensor  # (n,) int64, response tokens of each sequence
    numbers: torch.Tensor  # (n,) int64, of each sequence's sample among those of all ranks
    ages: torch.Tensor  # (T,) int64, steps since they were sampled
    advantages: torch.Tensor
    weights: torch.Tensor  # of each token's loss in the loss of the update: the aggregation
    sampler_logprobs: torch.Tensor
    kept: tuple[torch.Tensor, torch.Tensor] | None  # the trainer's log-probs and entropy when they were sampled (`lag`)
    has_signal: bool  # an advantage is not zero, here or in what another rank computes at the same time
    ref_logprobs: torch.Tensor | None = None  # of the reference policy; None: no KL term


@dataclass(frozen=True)
class TokenRow:
    """A sample on its way to the rank that trains on it; arrays, since lists of numbers are slow to send."""

    prompt: array  # token ids
    response: array  # token ids
    logprobs: array  # of the response, the sampler's
    advantage: float
    age: int
    number: int  # of the sample among those of all ranks
    kept: tuple[array, array] | None = None  # the trainer's log-probs and entropy when it was sampled


def collate(run: Run, samples: list[Sample]) -> list[list[Tokens]]:
    """Minibatches (one for each update of an epoch) of this rank's micro-batches (one for each forward pass).

    The samples of a minibatch are dealt out anew: every rank gets the same number of them, about the same number of
    tokens, and the same number of micro-batches. Collective.
    """
    size = len(samples) // run.plan.minibatches
    first = run.plan.rank * len(samples)
    rows = [
        TokenRow(
            prompt=array("q", s.prompt),
            response=array("q", s.completion.token_ids),
            logprobs=array("d", s.completion.logprobs),
            advantage=s.advantage,
            age=run.step - s.step,
            number=first + i,
            kept=(array("d", s.old_logprobs), array("d", s.old_entropy)) if s.old_logprobs and s.old_entropy else None,
        )
        for i, s in enumerate(samples)
    ]
    ranks = run.ranks.gather([rows])
    minibatches = [
        [row for rank in ranks for row in rank[m * size : (m + 1) * size]] for m in range(run.plan.minibatches)
    ]
    out: list[list[Tokens]] = []
    for minibatch in minibatches:
        tokens = sum(len(row.response) for row in minibatch)  # the denominator is global, known before any backward
        of_update = {"sequences_of_update": len(minibatch), "tokens_of_update": tokens}
        parts = cut_for_ranks(run, minibatch)
        out.append([tokens_of(run, [minibatch[i] for i in part], signal, **of_update) for part, signal in parts])
    return out


def cut_for_ranks(run: Run, minibatch: Sequence[TokenRow]) -> list[tuple[list[int], bool]]:
    """This rank's micro-batches, as indices of rows, each with its `Tokens.has_signal`.

    The last one counts as one with a signal: its backward pass leaves every weight with a gradient, perhaps of zero.
    """
    lengths = [len(row.prompt) + len(row.response) for row in minibatch]
    groups = group_numbers(minibatch) if run.layout == "by_sequence" else list(range(len(minibatch)))
    signal = [row.advantage != 0 for row in minibatch]
    shares = deal(lengths, groups, signal, run.plan.processes)

    def cuts(parts: int) -> list[list[list[int]]]:
        """[rank][micro-batch] indices."""
        found = [
            cut(
                [lengths[i] for i in chosen],
                groups=[groups[i] for i in chosen],
                signal=[signal[i] for i in chosen],
                budget=run.cfg.micro_batch_tokens,
                padded=run.layout != "packed",
                parts=parts,
            )
            for chosen in shares
        ]
        return [[[chosen[i] for i in part] for part in of_rank] for chosen, of_rank in zip(shares, found, strict=True)]

    ranks = cuts(max(map(len, cuts(1))))  # as many on every rank as the busiest one needs
    some = [any(signal[i] for part in beside for i in part) for beside in zip(*ranks, strict=True)]
    return list(zip(ranks[run.plan.rank], [*some[:-1], True], strict=True))


def group_numbers(rows: Sequence[TokenRow]) -> list[int]:
    """For each row the number of the run of equal prompts that it is in. Example: prompts A, A, B, A -> 0, 0, 1, 2."""
    numbers = [0]
    for before, row in pairwise(rows):
        numbers.append(numbers[-1] + (row.prompt != before.prompt))
    return numbers


def tokens_of(
    run: Run, rows: list[TokenRow], has_signal: bool, *, sequences_of_update: int, tokens_of_update: int
) -> Tokens:
    """The tensors of one micro-batch."""
    cfg, device = run.cfg, run.ranks.device
    lengths = torch.tensor([len(row.response) for row in rows], device=device)
    weights = aggregation_weights(
        lengths,
        aggregation=cfg.loss_aggregation,
        sequences=sequences_of_update,
        tokens=tokens_of_update,
        max_response_tokens=cfg.max_response_tokens,
    )
    kept = [row.kept for row in rows if row.kept]
    prompts, responses = [row.prompt.tolist() for row in rows], [row.response.tolist() for row in rows]
    return Tokens(
        batch=lay_out(prompts, responses, layout=run.layout, device=device),
        rows=rows,
        lengths=lengths,
        numbers=torch.tensor([row.number for row in rows], device=device),
        ages=torch.tensor([row.age for row in rows], device=device).repeat_interleave(lengths),
        advantages=torch.tensor([row.advantage for row in rows], device=device).repeat_interleave(lengths),
        weights=weights,
        sampler_logprobs=flat([row.logprobs for row in rows], device),
        kept=(flat([k[0] for k in kept], device), flat([k[1] for k in kept], device))
        if len(kept) == len(rows)
        else None,
        has_signal=has_signal,
    )


def flat(parts: Sequence[array], device: torch.device) -> torch.Tensor:
    """(T,) float32 of the numbers of sequences, one after another."""
    return torch.tensor([x for part in parts for x in part], dtype=torch.float32, device=device)


def cut(
    lengths: Sequence[int], *, groups: Sequence[int], signal: Sequence[bool], budget: int, padded: bool, parts: int
) -> list[list[int]]:
    """Indices of `lengths` in micro-batches: at least `parts` of them, each within `budget` tokens.

    Groups (of `groups`, a number for each sequence) without a sequence with a `signal` come first: a micro-batch of
    such alone may need no backward pass. Then by length, so that little is padded, but a group stays together; the
    longest first, so that running out of memory shows at once. A sequence longer than the budget gets a micro-batch of
    its own. Raises AssertionError for more parts than there are sequences.
    """
    assert parts <= len(lengths), f"{parts} micro-batches cannot be made of {len(lengths)} sequences"
    longest: dict[int, int] = {}
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(length, longest.get(group, 0))
    several = (max(lengths) * len(lengths) if padded else sum(lengths)) > budget  # else no backward pass can be spared
    heard = {group for group, has_signal in zip(groups, signal, strict=True) if has_signal and several}
    # Ties by number: the same cut on every run.
    order = sorted(
        range(len(lengths)), key=lambda i: (groups[i] in heard, -longest[groups[i]], groups[i], -lengths[i], i)
    )
    cuts: list[list[int]] = []
    width = tokens = 0
    for i in order:
        width = max(width, lengths[i])
        if not cuts or (width * (len(cuts[-1]) + 1) if padded else tokens + lengths[i]) > budget:
            cuts.append([])
            width, tokens = lengths[i], 0
        cuts[-1].append(i)
        tokens += lengths[i]
    while len(cuts) < parts:  # halve the largest until every rank has as many as the busiest one
        k = max(range(len(cuts)), key=lambda k: len(cuts[k]))
        middle = len(cuts[k]) // 2
        cuts[k : k + 1] = [cuts[k][:middle], cuts[k][middle:]]
    return cuts


def deal(lengths: Sequence[int], groups: Sequence[int], signal: Sequence[bool], ranks: int) -> list[list[int]]:
    """Indices of `lengths` for each rank: the same number of sequences for each, and about the same number of tokens,
    with and without a `signal`.

    Whole groups (of `groups`, a number for each sequence) where they are equally large and can be dealt out evenly,
    else single sequences. Those with a signal first, they cost most, and each from the most tokens to the fewest, to
    and fro (ranks 0, 1, 1, 0, 0, 1, ...): of one kind alone, no two ranks differ by more tokens than the largest has
    more than the smallest. `ranks` divides the number of sequences.
    """
    assert len(lengths) % ranks == 0, f"{len(lengths)} sequences cannot be dealt out evenly to {ranks} ranks"
    of_group: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        of_group.setdefault(group, []).append(i)
    units = list(of_group.values())
    if len(units) % ranks or len({len(unit) for unit in units}) > 1:
        units = [[i] for i in range(len(lengths))]
    tokens = [sum(lengths[i] for i in unit) for unit in units]
    silent = [not any(signal[i] for i in unit) for unit in units]
    order = sorted(range(len(units)), key=lambda u: (silent[u], -tokens[u]))  # stable: the same on every rank
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for k, u in enumerate(order):
        turn, place = divmod(k, ranks)
        shares[place if turn % 2 == 0 else ranks - 1 - place] += units[u]
    return shares


def lay_out(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], *, layout: str, device: torch.device
) -> MicroBatch:
    """Input tensors of sequences prompt + response; the response tokens of all of them, one after another, are the
    targets. The last token of a response predicts nothing and is no input.

    padded: (N, L), for any attention. packed: end to end, for an attention that finds the sequences by their positions.
    by_sequence: end to end, for attention_by_sequence (policy.py); a prompt that follows itself is laid out once.
    """
    inputs = [r[:-1] for r in responses]
    width = max(len(p) + len(r) for p, r in zip(prompts, inputs, strict=True))
    pieces: list[list[int]] = []  # tokens, in order
    starts: list[int] = []  # position of each piece in its sequence
    places: list[torch.Tensor] = []  # (length,) flat position of each token of a sequence
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
    input_ids = torch.tensor([token for piece in pieces for token in piece]).view(shape)
    position_ids = torch.cat([torch.arange(s, s + len(piece)) for s, piece in zip(starts, pieces, strict=True)])
    predictors = torch.cat([place[len(p) - 1 :] for p, place in zip(prompts, places, strict=True)])
    attention_mask = sequences = first = None
    if layout == "padded":
        lengths = torch.tensor([len(place) for place in places])
        attention_mask = (torch.arange(width) < lengths[:, None]).long()
    elif layout == "by_sequence":
        sequences = torch.nn.utils.rnn.pad_sequence(places, batch_first=True)  # (N, L)
        first = torch.empty(end, dtype=torch.long)
        for i in reversed(range(len(places))):
            first[places[i]] = torch.arange(i * width, i * width + len(places[i]))
    tensors = (attention_mask, sequences, first)
    mask, sequences, first = (None if t is None else t.to(device) for t in tensors)
    return MicroBatch(
        input_ids=input_ids.to(device),
        attention_mask=mask,
        position_ids=position_ids.view(shape).to(device),
        predictors=predictors.to(device),
        targets=torch.tensor([token for r in responses for token in r]).to(device),
        sequences=sequences,
        places=first,
    )


def real_token_share(batches: Sequence[MicroBatch]) -> Pair:
    """(sum, count): how many of the positions that go through the model are tokens, and not padding."""
    positions = [batch.input_ids.numel() for batch in batches]
    masks = [batch.attention_mask for batch in batches]
    return sum(n if mask is None else mask.sum() for n, mask in zip(positions, masks, strict=True)), sum(positions)


def raise_not_finite(run: Run, minibatch: list[Tokens], in_a_row: int) -> NoReturn:
    """Raise FloatingPointError for updates without a finite gradient; their sequences go to a file first."""
    path = run.folder / f"not_finite_step_{run.step + 1:06d}_rank_{run.ranks.rank}.jsonl"
    rows = [row for tokens in minibatch for row in tokens.rows]
    texts = [run.task.tokenizer.decode(list(row.prompt) + list(row.response)) for row in rows]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    raise FloatingPointError(
        f"step {run.step + 1}: {in_a_row} updates in a row had no finite gradient (max_skipped); their sequences are "
        f"in {path}; lower lr or delta, or go back to an earlier checkpoint"
    )
