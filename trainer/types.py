"""The data of a step: `Sample`, one response from rollout to the loss, and `MicroBatch`, the tensors of several.

Axes: n sequences of a micro-batch, T their response tokens, flat, one sequence after another.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from data import Problem
from rewards import Grade
from trainer.rollout import Completion


@dataclass(frozen=True)
class Sample:
    """One response to one prompt. `advantage` is one number, or one per response token."""

    problem: Problem
    prompt: list[int]  # token ids
    completion: Completion  # token ids, rollout log-probs, finish reason, text
    grade: Grade
    reward: float
    step: int  # completed steps of the policy that sampled it
    index: int  # position in its step's batch; group index // G, minibatch index // sequences_per_minibatch
    advantage: float | list[float] = math.nan

    @property
    def truncated(self) -> bool:
        return self.completion.finish_reason == "length"

    @property
    def token_advantages(self) -> list[float]:
        """One advantage per response token."""
        tokens = len(self.completion.token_ids)
        return self.advantage if isinstance(self.advantage, list) else [self.advantage] * tokens


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together; (T,) float32 unless stated, flat over their response tokens."""

    samples: list[Sample]  # (n,)
    input_ids: Tensor  # (n, L) int64 right-padded, or (1, P) packed
    attention_mask: Tensor | None  # (n, L) int64, 1 = token; None when packed
    position_ids: Tensor  # int64, of the shape of input_ids, from 0 in every sequence
    predictors: Tensor  # (T,) int64, flat positions in input_ids whose output predicts each response token
    targets: Tensor  # (T,) int64, the response tokens
    sequence_ids: Tensor  # (T,) int64, index in `samples`
    rollout_logprobs: Tensor
    advantages: Tensor
    loss_weights: Tensor  # of each token's loss in the loss of the update: the aggregation
    old_logprobs: Tensor | None = None  # under the old policy; None: those of the update's own forward pass
    ref_logprobs: Tensor | None = None  # under the reference policy; None: no KL term
    entropy: Tensor | None = None  # nats, of the pass that gave old_logprobs
    sequences: Tensor | None = None  # (n, L) int64 packed positions of each sequence, for attention_by_sequence
    places: Tensor | None = None  # (P,) int64 flat position in `sequences` of each packed position

    @property
    def lengths(self) -> list[int]:
        """(n,) response tokens of each sequence."""
        return [len(sample.completion.token_ids) for sample in self.samples]
