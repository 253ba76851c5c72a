"""What a run remembers from step to step, beside the weights and the optimizer: `State`, saved with each checkpoint.

A tweak that has to remember something adds a field with a default, and sets it where it is known:

    run.state = replace(run.state, best=best)       # it is there again after a resume

A field holds numbers, strings, None, lists, dicts, and samples.
"""

import json
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from data import Problem
from rewards import Grade
from trainer.rollout import Completion
from trainer.types import Sample


@dataclass(frozen=True)
class State:
    """Where a run stands."""

    step: int = 0  # completed steps
    prompts_drawn: int = 0  # position in the order of training prompts
    tokens_seen: int = 0  # trained on, of all ranks
    skipped_in_a_row: int = 0  # updates without a finite gradient
    score: float | None = None  # mean@k of the latest evaluation, over the evaluation sets
    score_step: int = -1  # its step
    queue: list[list[Sample]] = field(default_factory=list)  # this rank's samples for the next `off_policy_steps` steps
    pending_metrics: dict[str, float] = field(default_factory=dict)  # of the last step, until it is evaluated


KINDS = {kind.__name__: kind for kind in (State, Sample, Problem, Completion, Grade)}


def to_text(state: State) -> str:
    """JSON from which `from_text` makes the same state again. Raises TypeError for a field that cannot be kept."""

    def plain(value: Any) -> Any:
        if is_dataclass(value) and type(value).__name__ in KINDS:
            return {"kind": type(value).__name__, **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
        if isinstance(value, dict):  # as pairs: JSON would turn every key into a string
            return {"kind": "dict", "pairs": [[plain(k), plain(v)] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if value is None or isinstance(value, (str, bool, int, float)):
            return value
        raise TypeError(f"State keeps numbers, strings, lists, dicts and samples, not {type(value).__name__}")

    return json.dumps(plain(state))


def from_text(text: str) -> State:
    """The state that `to_text` was given; a field that it does not name has its default."""

    def restored(value: Any) -> Any:
        if isinstance(value, list):
            return [restored(v) for v in value]
        if not isinstance(value, dict):
            return value
        kind = value.pop("kind")
        if kind == "dict":
            return {restored(k): restored(v) for k, v in value["pairs"]}
        return KINDS[kind](**{name: restored(v) for name, v in value.items()})

    return restored(json.loads(text))
