"""The clipped objective, given an interval for every token's ratio: how the interval is chosen is the rule.

    loss = (weights * policy_loss(logprobs, old_logprobs, advantages, lower, upper, ...)).sum()

All tensors of tokens are flat (T,): the response tokens of all sequences one after another, no padding; what is
elementwise takes any shape. r = exp(logprobs - old_logprobs) is the ratio, A the advantage.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # nats


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    dual_clip: float | None,
    surrogate: str,
) -> Tensor:
    """(T,) loss of every token; its gradient reaches `logprobs` alone.

    ppo    max(-r A, -clip(r, lower, upper) A): no gradient for A > 0 above `upper` and for A < 0 below `lower`. For
           A < 0 the loss is at most dual_clip * |A| (arXiv 1912.09729), so no gradient above that ratio either.
    gspo   the same, on log-probs from `sequence_logprobs` (arXiv 2507.18071).
    cispo  -A clip(r, lower, upper) logprobs, the clipped ratio a constant weight, at most `dual_clip` for A < 0: every
           token keeps a gradient (arXiv 2506.13585).

    dual_clip: above 1; None for none. The log-ratio is clamped to +-20, so that one broken token stays finite.
    Raises ValueError for an unknown surrogate.
    """
    ratio = _ratio(logprobs, old_logprobs)
    clipped = torch.clamp(ratio, lower, upper)
    if surrogate == "cispo":
        if dual_clip is not None:
            clipped = torch.where(advantages < 0, clipped.clamp(max=dual_clip), clipped)
        return -clipped.detach() * advantages * logprobs
    if surrogate not in ("ppo", "gspo"):
        raise ValueError(f"surrogate: {surrogate!r} is not known; use ppo, cispo or gspo")
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def sequence_logprobs(logprobs: Tensor, old_logprobs: Tensor, lengths: Tensor) -> Tensor:
    """(T,) log-probs whose ratio to `old_logprobs` is, at every token, the geometric mean ratio of its sequence.

    The gradient is that of the token's own log-prob (GSPO-token, arXiv 2507.18071 equation 14): summed over a sequence
    of one advantage and weight, it is the gradient of the sequence's ratio. lengths: (n,) tokens of each sequence.
    """
    sequence = torch.repeat_interleave(lengths, output_size=len(logprobs))  # (T,) which sequence a token is of
    sums = torch.zeros(len(lengths), dtype=logprobs.dtype, device=logprobs.device)
    sums = sums.index_add(0, sequence, (logprobs - old_logprobs).detach())
    return old_logprobs + (sums / lengths)[sequence] + (logprobs - logprobs.detach())


def aggregation_weights(
    lengths: Tensor, *, aggregation: str, sequences: int, tokens: int, max_response_tokens: int
) -> Tensor:
    """(T,) float32 weight of every token, so that the loss of an update is sum(weights * token losses).

    seq-mean-token-mean      1 / (sequences * length): every sequence counts the same (GRPO, arXiv 2402.03300)
    token-mean               1 / tokens: every token counts the same (DAPO, arXiv 2503.14476)
    seq-mean-token-sum-norm  1 / (sequences * max_response_tokens): nor does length matter (Dr. GRPO, arXiv 2503.20783)

    lengths: (n,) integer, tokens of each sequence of this micro-batch. sequences, tokens: of the whole update, over all
    micro-batches and ranks, whatever is in `lengths`: then it does not matter how the update is cut.

    The size of the result is the sum of `lengths`, so the device waits once when they are on it.
    Raises ValueError for an unknown aggregation.
    """
    counts = torch.as_tensor(lengths, dtype=torch.float32)
    if aggregation == "seq-mean-token-mean":
        weights = 1 / (counts * sequences)
    elif aggregation == "token-mean":
        weights = torch.full_like(counts, 1 / tokens)
    elif aggregation == "seq-mean-token-sum-norm":
        weights = torch.full_like(counts, 1 / (sequences * max_response_tokens))
    else:
        raise ValueError(
            f"aggregation: {aggregation!r} is not known; use seq-mean-token-mean, token-mean or seq-mean-token-sum-norm"
        )
    return weights.repeat_interleave(lengths)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """(T,) estimates of KL(policy || reference), nats, for tokens sampled from the policy; d = ref_logprobs - logprobs.

    k1 -d: unbiased, but its gradient averages to zero, so as a loss it does nothing
    k2 d^2 / 2: biased; as a loss, its gradient is that of the KL
    k3 e^d - 1 - d: unbiased, never negative; d is clamped to +-20 and the estimate to +-10 (as in the paper's runs)

    Names after J. Schulman, "Approximating KL Divergence" (2020). Raises ValueError for an unknown estimator.
    """
    gap = ref_logprobs - logprobs
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return gap.square() / 2
    if estimator == "k3":
        gap = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return (torch.expm1(gap) - gap).clamp(-10, 10)
    raise ValueError(f"estimator: {estimator!r} is not known; use k1, k2 or k3")


# ---- clip statistics ----

# Old-probability bins, as suffixes of metric names: all tokens, the rarest (also part of the next), fifths.
BINS = ("", "/p<0.01", "/p<0.2", "/p<0.4", "/p<0.6", "/p<0.8", "/p<=1")
BIN_SUMS = ("A>0", "A>0 and cut", "A<0", "A<0 and cut")
TOKEN_SUMS = ("tokens", "no gradient", "ratio", "lower", "upper", "weight")
SUMS = tuple(f"{name}{suffix}" for suffix in BINS for name in BIN_SUMS) + TOKEN_SUMS


@dataclass(frozen=True)
class ClipStatistics:
    """What the clip did to some tokens, as sums and counts: merge over micro-batches and ranks, divide at the end."""

    sums: Tensor  # (len(SUMS),) float64
    ratio_max: Tensor  # ()

    def merge(self, other: "ClipStatistics") -> "ClipStatistics":
        """The statistics of both sets of tokens."""
        return ClipStatistics(self.sums + other.sums, torch.maximum(self.ratio_max, other.ratio_max))

    def means(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum, count) of each metric, on the device: to be added over ranks, and divided. A mean that is not finite
        (no upper bound) has the count 0, as one without tokens has.

        clip/up[/bin]     share of tokens with A > 0 (and old probability in the bin) that the rule cuts off: the ratio
                          is above upper, or the rule's weight is exactly zero
        clip/down[/bin]   share of tokens with A < 0 that the rule cuts off: below lower, or of weight zero
        clip/fraction     share of all tokens left without policy gradient by the rule or dual clip (surrogate ppo)
        clip/weight_mean  mean gradient weight w over all tokens; that of a rule which cuts nothing is ratio/mean
        ratio/mean, band/lower_mean, band/upper_mean: over all tokens
        """
        sums = dict(zip(SUMS, self.sums.unbind(), strict=True))
        pairs = {}
        for suffix in BINS:
            pairs[f"clip/up{suffix}"] = (sums[f"A>0 and cut{suffix}"], sums[f"A>0{suffix}"])
            pairs[f"clip/down{suffix}"] = (sums[f"A<0 and cut{suffix}"], sums[f"A<0{suffix}"])
        means = {"clip/fraction": "no gradient", "ratio/mean": "ratio"}
        means |= {"band/lower_mean": "lower", "band/upper_mean": "upper", "clip/weight_mean": "weight"}
        pairs |= {metric: (sums[key], sums["tokens"]) for metric, key in means.items()}
        return {name: (total.nan_to_num(posinf=0), count * total.isfinite()) for name, (total, count) in pairs.items()}

    def summary(self) -> dict[str, float]:
        """The metrics of these tokens alone: `means` divided, and ratio/max. Reads the device."""
        pairs = {name: (total.item(), count.item()) for name, (total, count) in self.means().items()}
        return {name: total / count for name, (total, count) in pairs.items() if count} | {
            "ratio/max": self.ratio_max.item()
        }


@torch.no_grad()
def token_statistics(
    ratio: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cut: Tensor,
    no_gradient: Tensor,
    lower: Tensor | None,
    upper: Tensor | None,
    *,
    weights: Tensor | None,
) -> ClipStatistics:
    """Statistics of the tokens of one micro-batch, at least one, on their device; nothing is read back.

    All (T,). cut: bool, by the rule. no_gradient: bool, cut or above the dual clip. lower, upper, weights: None where
    the rule gives none; their means are left out then.
    """
    p, gains, losses = old_logprobs.exp(), advantages > 0, advantages < 0
    fifth = (p * 5).floor().clamp(max=4)
    bins = torch.stack([torch.ones_like(cut), p < 0.01, *(fifth == k for k in range(5))]).flatten(1)  # (bins, T)
    events = torch.stack([gains, gains & cut, losses, losses & cut]).flatten(1)  # (events, T)
    # float64 counts are exact, and no autocast or TF32 setting touches a float64 product.
    binned = bins.double() @ events.double().T
    absent = torch.full_like(ratio, torch.inf)  # an infinite sum has no mean
    columns = (torch.ones_like(ratio), no_gradient, ratio, lower, upper, weights)
    totals = torch.stack([(absent if column is None else column).sum(dtype=torch.float64) for column in columns])
    return ClipStatistics(torch.cat([binned.flatten(), totals]), ratio.amax())


def _ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
