"""Training run of one process: its config, its components and its position (`state`).

    with start(cfg, plan, info, clock) as run:              # trainer/start.py
        with run.phase("rollout"): ...                      # timed as time/rollout_s
        with run.interruptible(): ...                       # all ranks leave together if one receives a signal
        run.sync_weights()

The algorithm itself is in train.py.
"""

import hashlib
import math
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from bandpo.rule import Rule
from configs.schema import Config, Plan
from data import epoch_length
from rewards import Verifier
from trainer.clock import Clock
from trainer.logging import Tracker
from trainer.lora import StartModel
from trainer.policy import Policy
from trainer.ranks import Ranks
from trainer.rollout import NOT_FINITE, Engine, EngineMismatch, Sampling, read_sums, weight_sum
from trainer.stopping import Interrupted, Signals
from trainer.task import Task
from trainer.types import State


@dataclass
class Run:
    """Components of a training run on one rank. Only `state` and `saved_step` are assigned during a run."""

    cfg: Config
    plan: Plan
    task: Task
    folder: Path
    ranks: Ranks
    clock: Clock
    signals: Signals
    tracker: Tracker
    policy: Policy
    reference: Policy | StartModel | None  # the start model, if kl_coef > 0
    teacher: Policy | None  # for on-policy distillation
    optimizer: torch.optim.Optimizer
    engine: Engine
    verifier: Verifier  # grades for rewards
    eval_verifier: Verifier  # grades for evaluations: always the tolerant verifier
    rule: Rule  # clipping rule of the loss
    state: State
    saved_step: int  # step of the newest checkpoint; 0: none yet

    # ---- position ----

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.state.step

    @property
    def epochs(self) -> float:
        """Passes over the training prompts so far, including prompts drawn by dynamic sampling."""
        return self.state.prompts_drawn / epoch_length(len(self.task.train), self.cfg.prompts_per_step)

    def is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    @property
    def sampling(self) -> Sampling:
        cfg, stops = self.cfg, self.task.stop_token_ids
        return Sampling(cfg.temperature, cfg.top_p, cfg.top_k, cfg.max_response_tokens, stops, tuple(cfg.stop))

    def seed(self, seed: int) -> None:
        """Seed the global RNGs of Python, NumPy and torch, on every device."""
        from accelerate.utils import set_seed

        set_seed(seed)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a phase as time/<name>_s, GPU work included."""
        return self.clock.phase(name, self.ranks.device)

    # ---- stopping ----

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context manager for work that may be abandoned. Collective.

        At the start and at the end of the block, raises Interrupted on all ranks if one of them received a signal.
        Inside the block, `raise_if_interrupted` ends the work of this rank early.
        """
        self._leave_together()
        with suppress(Interrupted):  # raised again below, on all ranks
            yield
        self._leave_together()

    def raise_if_interrupted(self) -> None:
        """Raise Interrupted if this process received a signal. For callbacks inside `interruptible`.

        Ranks that share an engine finish their call, because none of them can leave it on its own.
        """
        if self.cfg.tensor_parallel == 1:
            self.signals.raise_if_interrupted()

    def _leave_together(self) -> None:
        agreed = int(self.ranks.all_reduce_max({"signal": self.signals.number})["signal"])
        if agreed:  # a signal that arrives after the collective is handled by the next call
            self.signals.number = agreed
            raise Interrupted

    def exit_code(self) -> int:
        """Return 0 after SIGTERM or a completed run, 130 after Ctrl-C, 1 after the death of a launcher. Collective.

        With exit code 0, the launchers of other machines would wait for minutes for the dead one.
        """
        if self.ranks.all_reduce_max({"orphaned": self.signals.orphaned})["orphaned"]:
            self.tracker.info("stopped because a launcher died, on this machine or another one")
            return 1
        return 130 if self.signals.number == signal.SIGINT else 0

    # ---- weights to the engine ----

    def sync_weights(self) -> None:
        """Copy the policy's weights into the engine and compare checksums; collective.

        Raises FloatingPointError if weights are not finite, EngineMismatch if the engine's weights differ.
        """
        names = self.policy.compared_names(split=self.cfg.tensor_parallel > 1)
        sums: dict[str, torch.Tensor] = {}

        def summed() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in self.policy.named_weights(self.policy.options.precision):
                if name in names:
                    sums[name] = weight_sum(weight)
                yield name, weight

        self.engine.wake()  # also empties torch's cache, because the engine has its own allocator
        self.engine.sync_weights(summed())
        ours = read_sums(sums)
        if broken := [name for name, value in ours.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"the policy's weights are not finite, {broken[0]} among them: {NOT_FINITE}")
        theirs = self.engine.checksum(names)
        # float64 sums of equal weights differ by less than 1e-6. Every real update of a weight changes them by more.
        wrong = [n for n, value in theirs.items() if not abs(value - ours[n]) <= 1e-6]
        if wrong or not theirs:
            raise EngineMismatch(
                f"after the sync the engine's weights differ from the trainer's: {wrong[:3] or 'no name matches'}"
            )


# ---- pure functions of the step, not stored in checkpoints ----


def learning_rate(cfg: Config, step: int) -> float:
    """Return the learning rate of the next step after `step` completed steps."""
    if step < cfg.lr_warmup_steps:
        return cfg.lr * (step + 1) / cfg.lr_warmup_steps
    done = (step - cfg.lr_warmup_steps) / max(1, cfg.max_steps - cfg.lr_warmup_steps)
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return cfg.lr * factors[cfg.lr_schedule]


def seed_of(*key: object) -> int:
    """Return a 31-bit seed, a pure function of `key`."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1
