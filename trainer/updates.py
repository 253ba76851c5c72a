"""The record of a step's updates, which the step's metrics and samples are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from bandpo.objective import ClipStatistics
from bandpo.rule import ClippedLoss, View
from trainer.batching import Tokens
from trainer.passes import Anchors


@dataclass
class Updates:
    """What the updates of a step did; numbers stay on the device until the step's metrics are read."""

    anchors: Anchors  # complete once every minibatch had its first update
    skipped_in_a_row: int  # updates without a finite gradient, earlier steps included
    skipped: int = 0
    grad_norms: list[float] = field(default_factory=list)
    loss: float | Tensor = 0.0  # of this rank's share, summed over updates
    clip: ClipStatistics | None = None
    means: dict[str, tuple[float | Tensor, int]] = field(default_factory=dict)  # sum and count of token_loss's values
    # (minibatch, micro-batch) -> its tokens and (T,) values by name, of its latest update
    measured: dict[tuple[int, int], tuple[Tokens, dict[str, Tensor]]] = field(default_factory=dict)

    def add(
        self,
        place: tuple[int, int],
        tokens: Tokens,
        loss: Tensor,
        view: View,
        clipped: ClippedLoss,
        means: Mapping[str, Tensor],
    ) -> None:
        """A micro-batch's share of an update. place: (minibatch, micro-batch); loss: detached; means: (T,) by name."""
        self.loss += loss
        for name, values in means.items():
            total, count = self.means.get(name, (0.0, 0))
            self.means[name] = (total + values.detach().double().sum(), count + len(values))
        statistics = clipped.statistics(view)
        self.clip = self.clip.merge(statistics) if self.clip else statistics
        seen = {"old_logprobs": view.old_logprobs, "logprobs": view.logprobs.detach(), "entropy": view.entropy}
        self.measured[place] = (tokens, seen | clipped.bounds())
