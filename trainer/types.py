"""Data of a run: `Sample` (one response), `MicroBatch` (tensors of n sequences), `State` (stored in each checkpoint).

Axes: n sequences of a micro-batch; T response tokens of these sequences, concatenated.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

from data import Problem
from rewards import Grade
from trainer.rollout import Completion


@dataclass(frozen=True)
class Sample:
    """One response to one prompt. `advantage` is a scalar, or a list with one value per response token."""

    problem: Problem
    prompt: list[int]  # token ids
    completion: Completion  # token ids, rollout log-probs, finish reason, text
    grade: Grade
    reward: float
    step: int  # completed training steps of the policy that sampled it
    index: int  # position in its step's batch; group index // G, minibatch index // sequences_per_minibatch
    advantage: float | list[float] = math.nan

    @property
    def truncated(self) -> bool:
        return self.completion.finish_reason == "length"

    @property
    def token_advantages(self) -> list[float]:
        """(T,) one advantage per response token."""
        tokens = len(self.completion.token_ids)
        return self.advantage if isinstance(self.advantage, list) else [self.advantage] * tokens


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass. Tensors are (T,) float32 over the response tokens unless noted."""

    samples: list[Sample]  # (n,)
    input_ids: Tensor  # (n, L) int64 right-padded, or (1, P) packed
    attention_mask: Tensor | None  # (n, L) int64, 1 = token; None when packed
    position_ids: Tensor  # int64, same shape as input_ids; 0 at the start of each sequence
    predictors: Tensor  # (T,) int64, flat positions in input_ids whose output predicts each response token
    targets: Tensor  # (T,) int64, the response tokens
    sequence_ids: Tensor  # (T,) int64, index in `samples`
    rollout_logprobs: Tensor
    advantages: Tensor
    loss_weights: Tensor  # weight of each token in the loss of the update (loss aggregation)
    old_logprobs: Tensor | None = None  # under the old policy; None: on-policy, the update's own log-probs are reused
    ref_logprobs: Tensor | None = None  # under the reference policy; None: no KL term
    teacher_logprobs: Tensor | None = None  # under the teacher; None: no distillation
    entropy: Tensor | None = None  # nats, from the forward pass that recomputed old_logprobs
    sequences: Tensor | None = None  # (n, L) int64 packed positions of each sequence, for attention_by_sequence
    places: Tensor | None = None  # (P,) int64 flat position in `sequences` of each packed position

    @property
    def lengths(self) -> list[int]:
        """(n,) response tokens of each sequence."""
        return [len(sample.completion.token_ids) for sample in self.samples]


@dataclass(frozen=True)
class State:
    """Position of a run, saved in each checkpoint next to the weights and the optimizer state.

    To store custom state, add a field with a default and assign it: run.state = replace(run.state, x=1). Supported
    values: numbers, strings, None, tensors, samples, and lists and dicts of them.
    """

    step: int = 0  # completed steps
    prompts_drawn: int = 0  # position in the order of training prompts
    tokens_seen: int = 0  # response tokens trained on, over all ranks
    skipped_in_a_row: int = 0  # consecutive updates without a finite gradient
    score: float | None = None  # mean@k of this step's evaluation, averaged over the evaluation sets
    queue: list[list[Sample]] = field(default_factory=list)  # this rank's samples for the next `off_policy_steps` steps
    pending_metrics: dict[str, float] = field(default_factory=dict)  # metrics of the last step until its evaluation


KINDS = [State, Sample, Problem, Completion, Grade]  # the classes that the file of a State may contain
