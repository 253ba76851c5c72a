"""One process's part of a training run: its settings, its parts, and where it stands (`state`).

    with start(cfg, plan, say, clock) as run:               # trainer/start.py
        with run.phase("rollout"): ...                      # timed as time/rollout_s
        with run.may_stop(): ...                            # left by all ranks together when one is asked to stop
        run.sync(); run.log(metrics)

Nothing here knows how the policy is trained: that is train.py.
"""

import math
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bandpo.rule import Rule
from configs.schema import Config, Plan
from data import epoch_length
from rewards import Verifier
from trainer.checks import EngineMismatch
from trainer.clock import Clock
from trainer.policy import Policy
from trainer.ranks import Ranks
from trainer.rollout import NOT_FINITE, Engine, Sampling, weight_sum
from trainer.state import State
from trainer.stopping import Signals, Stopped
from trainer.task import Task
from trainer.tracking import Tracker


@dataclass
class Run:
    """See the head of this file. Only `state` (as a whole) and `saved_step` change."""

    cfg: Config
    plan: Plan
    task: Task
    folder: Path
    ranks: Ranks
    clock: Clock
    signals: Signals
    tracker: Tracker
    policy: Policy
    reference: Policy | None  # the model started from, when kl_coef > 0
    optimizer: torch.optim.Optimizer
    engine: Engine
    verifier: Verifier  # rewards
    eval_verifier: Verifier  # evaluations: the tolerant one, whatever the reward is
    rule: Rule  # of the objective
    layout: str  # how sequences are laid out for the attention kernel (batching.lay_out)
    state: State
    saved_step: int  # of the newest checkpoint; 0: none yet; -1: that one is to be written again

    # ---- where it stands ----

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.state.step

    @property
    def epochs(self) -> float:
        """Passes over the training prompts so far, those that refills used up included."""
        return self.state.prompts_drawn / epoch_length(len(self.task.train), self.cfg.prompts_per_step)

    def is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    @property
    def sampling(self) -> Sampling:
        cfg = self.cfg
        return Sampling(cfg.temperature, cfg.top_p, cfg.top_k, cfg.max_response_tokens, self.task.stop_token_ids)

    def seed(self, seed: int) -> None:
        """Sets the global generators of Python, NumPy and torch, on every device."""
        from accelerate.utils import set_seed

        set_seed(seed)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times a phase as time/<name>_s, GPU work included."""
        return self.clock.phase(name, self.ranks.device)

    def log(self, metrics: dict[str, float]) -> None:
        self.tracker.log(self.step, metrics)

    # ---- stopping ----

    @contextmanager
    def may_stop(self) -> Iterator[None]:
        """Work that may be abandoned. Collective; raises Stopped at its start or end, on all ranks, when one of
        them was asked to stop.

        Inside, `check_stop` leaves the work of this rank early; the others learn of it at their end.
        """
        self._leave_together()
        try:
            yield
        except Stopped:
            pass  # raised again below, by all
        self._leave_together()

    def check_stop(self) -> None:
        """Raise Stopped when this process was asked to stop; for callbacks inside `may_stop`.

        Processes that share an engine go on to the end of their call: alone, none of them can leave it.
        """
        if self.cfg.tensor_parallel == 1:
            self.signals.check()

    def _leave_together(self) -> None:
        agreed = int(self.ranks.largest({"signal": self.signals.number})["signal"])
        if agreed:  # else leave it alone: a signal may have arrived meanwhile, and is for the next time
            self.signals.number = agreed
            raise Stopped

    def exit_code(self) -> int:
        """130 after Ctrl-C, 0 after SIGTERM (pre-emption) or a completed run; collective.

        1 when the SIGTERM came from the death of a launcher: those of other machines then end as well, where after 0
        they would wait minutes for the one that is gone.
        """
        if self.ranks.largest({"orphaned": self.signals.orphaned})["orphaned"]:
            self.tracker.say("stopped since a launcher died, on this machine or another one")
            return 1
        return 130 if self.signals.number == signal.SIGINT else 0

    # ---- weights to the engine ----

    def sync(self) -> None:
        """New weights into the engine, and the check that they arrived.

        Raises FloatingPointError when they are not finite, EngineMismatch when they did not arrive.
        """
        names = self.policy.compared_names(matrices=self.cfg.tensor_parallel == 1)
        ours: dict[str, float] = {}

        def summed() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in self.policy.named_weights(self.policy.options.precision):
                if name in names:
                    ours[name] = weight_sum(weight)
                yield name, weight

        self.engine.wake()  # which also empties torch's cache: the engine takes its memory elsewhere
        self.engine.sync_weights(summed())
        if broken := [name for name, value in ours.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"the policy's weights are not finite, {broken[0]} among them: {NOT_FINITE}")
        theirs = self.engine.checksum(names)
        # The same numbers summed in double precision: any real update of a weight shows, the order of the sum does not.
        wrong = [n for n, value in theirs.items() if not abs(value - ours[n]) <= 1e-6]
        if wrong or not theirs:
            raise EngineMismatch(
                f"after the sync the engine's weights differ from the trainer's: {wrong[:3] or 'no name fits'}"
            )
