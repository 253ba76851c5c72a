"""Published clipping rules, one function per rule; docs/rules.md has a table of them.

    rule = load_rule("sapo", {})                 # bandpo/rule.py; with the published values
    rule = load_rule("band", {"delta": 0.1})     # with a different radius

To add a rule, decorate a function with @register. Inputs are passed by name (bandpo/rule.py). Parameters are
keyword-only, with the published values as defaults. The table is generated from the docstring: one sentence; `w = ...`,
the weight of A grad log pi; `Source:` paper, equation and deviations; `Checked:` references for the formula. The tests
require a second, independent form of the gradient.

Per token: r importance ratio, p old probability, A advantage. "w = r in [a, b]" means clip bounds a and b: the weight
is r, or 0 above b for A > 0 and below a for A < 0. Statistics over tokens (bapo, acpo, m2po, clip_cov, kl_cov) are
over the micro-batch, as in the published code.
"""

import torch
from torch import Tensor

from bandpo.band import band_bounds, inside_band
from bandpo.rule import Result, register, sequence_sum

FIXED_POINT = 2**30


def by_sign(advantages: Tensor, positive: float | Tensor, negative: float | Tensor) -> Tensor:
    """Return (T,): `positive` where A > 0, else `negative`."""
    one = torch.ones_like(advantages)
    return torch.where(advantages > 0, positive * one, negative * one)


def moves_away(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Return (T,) bool: the ratio is on the side of 1 that PPO clips, above for A > 0, below for A < 0."""
    return advantages * log_ratio > 0


def is_clipped(ratio: Tensor, advantages: Tensor, lower: float | Tensor, upper: float | Tensor) -> Tensor:
    """Return (T,) bool: the ratio is outside the bounds on the side that PPO clips."""
    return ((advantages > 0) & (ratio > upper)) | ((advantages < 0) & (ratio < lower))


def to_fixed_point(values: Tensor) -> Tensor:
    """Convert to int64 with 30 fractional bits. Sums are exact, so running sums on a GPU do not depend on the order."""
    return (values.double() * FIXED_POINT).round().long()


# ---- clip bounds ----


@register
def fixed(ratio: Tensor, *, low: float = 0.2, high: float = 0.2) -> Result:
    """The same bounds for every token; 0.2 and 0.28 are DAPO's Clip-Higher (arXiv 2503.14476).

    w = r in [1 - low, 1 + high]
    Source: PPO, arXiv 1707.06347, equation 7
    Checked: verl, TRL
    """
    return torch.full_like(ratio, 1 - low), torch.full_like(ratio, 1 + high)


@register
def none(ratio: Tensor) -> Result:
    """No clip.

    w = r
    Source: PPO, arXiv 1707.06347, equation 6
    Checked: by hand
    """
    return torch.zeros_like(ratio), torch.full_like(ratio, torch.inf)


@register
def band(
    old_logprobs: Tensor, *, delta: float = 0.05, divergence: str = "kl", ratio_cap: float | None = 10.0
) -> Result:
    """The ratios that a trust region D_f <= delta allows a token.

    w = r in the Band of p
    Source: BandPO, arXiv 2603.04918
    Checked: authors' code, 45-digit roots
    """
    return band_bounds(old_logprobs, delta=delta, divergence=divergence, cap=ratio_cap)


@register
def band_relaxed(
    old_logprobs: Tensor,
    *,
    delta: float = 0.05,
    divergence: str = "kl",
    ratio_cap: float | None = 10.0,
    low: float = 0.2,
    high: float = 0.28,
) -> Result:
    """The union of band and fixed.

    w = r in the Band of p or in [1 - low, 1 + high]
    Source: BandPO, arXiv 2603.04918, ablation
    Checked: authors' code
    """
    lower, upper = band_bounds(old_logprobs, delta=delta, divergence=divergence, cap=ratio_cap)
    return lower.clamp(max=1 - low), upper.clamp(min=1 + high)


@register
def band_asymmetric(
    old_logprobs: Tensor,
    *,
    delta_low: float = 0.05,
    delta_high: float = 0.05,
    divergence: str = "kl",
    ratio_cap: float | None = 10.0,
) -> Result:
    """The Band with one radius per bound: delta_low for A < 0, delta_high for A > 0.

    w = r in [lower bound at delta_low, upper bound at delta_high]
    Source: ours, after BandPO, arXiv 2603.04918; without a cap it clips the same tokens as DPPO
    Checked: band, dppo_kl, dppo_tv
    """
    lower, _ = band_bounds(old_logprobs, delta=delta_low, divergence=divergence, cap=ratio_cap)
    return lower, band_bounds(old_logprobs, delta=delta_high, divergence=divergence, cap=ratio_cap)[1]


@register
def dcpo(old_logprobs: Tensor, *, low: float = 0.16, high: float = 0.2, ratio_cap: float | None = 10.0) -> Result:
    """Bounds that widen for rare tokens.

    w = r in [1/2 + sqrt(max(1 - 4 low / p, 0)) / 2, 1/2 + sqrt(1 + 4 high / p) / 2]
    Source: DCPO (DAC), arXiv 2509.02333
    Checked: the code of BandPO's authors
    """
    inverse = (-old_logprobs.clamp(min=-80)).exp()  # 1/p, finite in float32
    lower = 0.5 + 0.5 * (1 - 4 * low * inverse).clamp(min=0).sqrt()
    upper = 0.5 + 0.5 * (1 + 4 * high * inverse).sqrt()
    return lower, upper if ratio_cap is None else upper.clamp(max=ratio_cap)


@register
def ripo(
    old_probs: Tensor,
    *,
    delta_low: float = 0.05,
    delta_high: float = 0.05,
    ratio_floor: float = 0.0,
    ratio_cap: float | None = None,
) -> Result:
    """Bounds that widen with 1 / sqrt(p): the same step for every token in the Fisher-Rao metric.

    w = r in [max(1 - sqrt(delta_low / p), ratio_floor), 1 + sqrt(delta_high / p)]
    Source: RIPO, arXiv 2607.10169, section 4.1; floor and cap are ours
    Checked: an article on the paper, a reimplementation
    """
    lower = (1 - torch.sqrt(delta_low / old_probs)).clamp(min=ratio_floor)
    upper = 1 + torch.sqrt(delta_high / old_probs)
    return lower, upper if ratio_cap is None else upper.clamp(max=ratio_cap)


@register
def bapo(
    ratio: Tensor,
    advantages: Tensor,
    *,
    target: float = 0.4,
    low_from: float = 0.6,
    low_to: float = 0.9,
    high_from: float = 1.2,
    high_to: float = 3.0,
    high_step: float = 0.05,
) -> Result:
    """One pair of bounds per micro-batch; the upper bound rises until positive advantages reach the share `target`.

    w = r in [low_from, c]; c: first of high_from, high_from + high_step, ..., high_to at which tokens with A > 0 have
        at least the share `target` of the sum of abs(min(r A, clip(r) A)). If there is none: r in [low_to, high_to]
    Source: BAPO, arXiv 2510.18927, equation 8 and algorithm 1, without the factor pi_rollout; the authors' code differs
    Checked: paper; authors' code, which raises the lower bound first, in other ranges
    """
    count = int((high_to - high_from) / high_step + 1e-9) + 1
    highs = [high_from + high_step * k for k in range(count)]
    gains = advantages.clamp(min=0)
    positive = torch.stack([(ratio.clamp(max=high) * gains).sum(dtype=torch.float64) for high in highs])
    negative = (ratio.clamp(min=low_from) * -advantages.clamp(max=0)).sum(dtype=torch.float64)
    # A higher lower bound only adds to A < 0. If no upper bound suffices, both bounds take their last value.
    k = (positive / (positive + negative) < target).sum(dim=0, keepdim=True)  # upper bounds that do not suffice
    lower = torch.full_like(ratio, low_from).masked_fill(k == count, low_to)
    upper = high_from + high_step * k.clamp(max=count - 1).double()
    return lower, upper.to(ratio.dtype).expand_as(ratio)


@register
def acpo(
    logprobs: Tensor,
    ratio: Tensor,
    *,
    base: float = 0.2,
    alpha: float = 3.0,
    clip_min: float = 0.0,
    clip_max: float = 3.0,
    groups: int = 5,
) -> Result:
    """Bounds per probability interval, from the spread of the ratios in it.

    w = r in [1 - c, 1 + c], c = base + alpha s within [clip_min, clip_max], s the standard deviation of r in the
        token's interval, one of `groups` equal parts of [0, 1]
    Source: ACPO, arXiv 2606.22570, section 4, with the new probability as in the authors' code
    Checked: authors' code
    """
    group = (logprobs.exp() * groups).long().clamp(0, groups - 1)  # (T,) interval of [0, 1] that holds the probability
    moved = (ratio - 1).double()
    members = group == torch.arange(groups, device=group.device)[:, None]  # (groups, T)
    sums = members.double() @ torch.stack([torch.ones_like(moved), moved, moved.square()], dim=1)
    count = sums[:, 0].clamp(min=1)
    variance = (sums[:, 2] / count - (sums[:, 1] / count).square()).clamp(min=0) + 1e-8
    width = (base + alpha * variance.sqrt()).clamp(clip_min, clip_max).to(ratio.dtype)[group]
    return (1 - width).clamp(min=0), 1 + width


@register
def m2po(
    log_ratio: Tensor, advantages: Tensor, *, budget: float = 0.04, low_min: float = 0.3, high_min: float = 0.5
) -> Result:
    """One pair of bounds per micro-batch; the mean square of ln r stays within a budget.

    w = r in [min(e^-tau, 1 - low_min), max(e^tau, 1 + high_min)], with the largest tau at which the mean of
        min((ln r)^2, tau^2) over tokens with A ln r > 0 is at most `budget`
    Source: M2PO, arXiv 2510.01161, equations 4-5, algorithm 1; low_min and high_min from the authors' code
    Checked: authors' code
    """
    harmful = moves_away(log_ratio, advantages)
    squares = to_fixed_point(torch.where(harmful, log_ratio, 0.0).double().square()).sort(descending=True).values
    squares = torch.cat([squares, squares.new_zeros(1)])
    total = budget * FIXED_POINT * harmful.sum(dtype=torch.float64)
    rest = squares.sum() - squares.cumsum(0)  # sum of the smaller squares
    capped_sum = rest + squares * torch.arange(1, len(squares) + 1, device=squares.device)  # if this square is tau^2
    k = (capped_sum > total).sum(dim=0, keepdim=True)  # number of squares above tau^2
    tau = ((total - rest[k] - squares[k]) / k.clamp(min=1) / FIXED_POINT).clamp(min=0).sqrt()
    tau = torch.where(k == 0, torch.inf, tau).to(log_ratio.dtype)
    lower, upper = (-tau).exp().clamp(max=1 - low_min), tau.exp().clamp(min=1 + high_min)
    return lower.expand_as(log_ratio), upper.expand_as(log_ratio)


# ---- gradient weights of single tokens ----


@register
def cispo(ratio: Tensor, *, low: float = 1.0, high: float = 2.0) -> Result:
    """The clipped ratio is a detached weight, so every token keeps a gradient.

    w = clip(r, 1 - low, 1 + high)
    Source: CISPO, arXiv 2506.13585, equations 4-5, without a lower bound; `high` is ours
    Checked: verl, TRL
    """
    return ratio.clamp(1 - low, 1 + high)


def mask_outside(
    divergence: str, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, deltas: tuple[float, float]
) -> Tensor:
    """Return (T,) bool: moves away and is outside the Band of radius deltas[0] for A < 0, deltas[1] for A > 0."""
    radius = by_sign(advantages, deltas[1], deltas[0])
    inside = inside_band(logprobs, old_logprobs, delta=radius, divergence=divergence)
    return moves_away(logprobs - old_logprobs, advantages) & ~inside


@register
def dppo_tv(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    *,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    ratio_cap: float | None = None,
) -> Result:
    """Mask on binary total variation: the token versus all others.

    w = r, but 0 if p abs(r - 1) is above delta_high (A > 0, r > 1) or delta_low (A < 0, r < 1); at most ratio_cap
    Source: DPPO, arXiv 2602.04879, equations 12-13 (appendix E: cap 5); delta from prime-rl
    Checked: paper, verl
    """
    masked = mask_outside("tv", logprobs, old_logprobs, advantages, (delta_low, delta_high))
    return torch.where(masked, 0.0, ratio if ratio_cap is None else ratio.clamp(max=ratio_cap))


@register
def dppo_kl(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    *,
    delta_low: float = 0.05,
    delta_high: float = 0.05,
    ratio_cap: float | None = None,
) -> Result:
    """Mask on binary KL(old, current): the token versus all others.

    w = as dppo_tv, with KL(p, r p) in place of p abs(r - 1)
    Source: DPPO, arXiv 2602.04879, equations 12, 14 (appendix E: cap 5); delta from a reimplementation
    Checked: paper, verl
    """
    masked = mask_outside("kl", logprobs, old_logprobs, advantages, (delta_low, delta_high))
    return torch.where(masked, 0.0, ratio if ratio_cap is None else ratio.clamp(max=ratio_cap))


@register
def cppo(
    old_probs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    positions: Tensor,
    lengths: Tensor,
    *,
    delta: float = 0.15,
    prefix_delta: float = 0.015,
    weight_floor: float = 0.8,
    ratio_cap: float | None = None,
) -> Result:
    """Mask on total variation, tighter early in a response and after an off-policy prefix.

    w = r, but 0 if A ln r > 0 and v_t D_t > min(delta, delta + sum over j < t of v_j (prefix_delta - D_j)); at most
        ratio_cap. D = p abs(r - 1), v falls from 1 to weight_floor along the response
    Source: CPPO, arXiv 2606.10968, equations 8-10; binary D as in dppo_tv (paper: 20 tokens), fixed delta
    Checked: paper, two reimplementations
    """
    r = log_ratio.exp()
    weight = 1 - (1 - weight_floor) * positions.double() / (lengths - 1).clamp(min=1)
    weighted = weight * (old_probs * (r - 1)).abs().double()
    unused = to_fixed_point(prefix_delta * weight - weighted)  # added to the budget of later tokens
    before = unused.cumsum(0) - unused
    starts = torch.arange(len(positions), device=positions.device) - positions
    budget = delta + (before - before[starts]).double() / FIXED_POINT
    cut = moves_away(log_ratio, advantages) & ((weighted > budget) | (weighted > delta))
    return torch.where(cut, 0.0, r if ratio_cap is None else r.clamp(max=ratio_cap))


@register
def abc(
    ratio: Tensor,
    advantages: Tensor,
    *,
    high_gain: float = 0.2,
    low_gain: float = 0.2,
    low_loss: float = 0.2,
    high_loss: float = 0.2,
) -> Result:
    """Two bounds per sign of A; tokens outside either bound are clipped.

    w = r within 1 - low_gain to 1 + high_gain for A > 0, 1 - low_loss to 1 + high_loss for A < 0; else 0
    Source: ABC-GRPO, arXiv 2601.03895, section 5
    Checked: authors' readme
    """
    low, high = by_sign(advantages, low_gain, low_loss), by_sign(advantages, high_gain, high_loss)
    return torch.where((ratio >= 1 - low) & (ratio <= 1 + high), ratio, 0.0)


@register
def up(ratio: Tensor, advantages: Tensor, *, low: float = 0.2) -> Result:
    """Ratio 1 and no clip for A > 0; PPO's lower bound for A < 0.

    w = 1 for A > 0; else r, but 0 below the bound 1 - low
    Source: UP-GRPO, arXiv 2607.06987, equation 15
    Checked: pull requests to verl and TRL
    """
    return torch.where(advantages > 0, 1.0, torch.where(ratio < 1 - low, 0.0, ratio))


@register
def sapo(ratio: Tensor, advantages: Tensor, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Result:
    """A sigmoid gate instead of a clip.

    w = 4 s (1 - s) r, s = sigmoid(tau (r - 1)), tau by the sign of A
    Source: SAPO, arXiv 2511.20347, equations 5-8
    Checked: verl (sapo), TRL
    """
    x = by_sign(advantages, tau_positive, tau_negative) * (ratio - 1)
    return 4 * torch.sigmoid(x) * torch.sigmoid(-x) * ratio  # 1 - sigmoid(x) rounds to 0 for large x


@register
def gppo(
    ratio: Tensor,
    advantages: Tensor,
    *,
    beta_low: float = 1.0,
    beta_high: float = 1.0,
    low: float = 0.2,
    high: float = 0.28,
) -> Result:
    """Clipped tokens keep the gradient that they have at the bound.

    w = beta_high (1 + high) above 1 + high (A > 0), beta_low (1 - low) below 1 - low (A < 0), else r
    Source: GPPO, arXiv 2508.07629, with the bounds of the authors' scripts
    Checked: paper, authors' code
    """
    w = torch.where((advantages > 0) & (ratio > 1 + high), beta_high * (1 + high), ratio)
    return torch.where((advantages < 0) & (ratio < 1 - low), beta_low * (1 - low), w)


@register
def ce_gppo(
    ratio: Tensor,
    advantages: Tensor,
    *,
    beta_low: float = 0.75,
    beta_high: float = 1.0,
    low: float = 0.2,
    high: float = 0.2,
) -> Result:
    """GPPO with a smaller gradient below the lower bound, which keeps entropy higher.

    w = as gppo
    Source: CE-GPPO, arXiv 2509.20712, equations 8-10
    Checked: paper, authors' code
    """
    return gppo(ratio, advantages, beta_low=beta_low, beta_high=beta_high, low=low, high=high)


@register
def dgpo(
    ratio: Tensor, advantages: Tensor, *, n: float = 1.0, m: float = 2.0, low: float = 0.2, high: float = 0.2
) -> Result:
    """w falls faster than r below the bounds and rises more slowly above them.

    w = r^(n+1) / (1 - low)^n below 1 - low (A < 0), (1 + high)^(1/m) r^(1 - 1/m) above 1 + high (A > 0), else r
    Source: DGPO, arXiv 2603.14389; its W weights the gradient of the probability: w = W p r
    Checked: authors' code
    """
    lower, upper = 1 - low, 1 + high
    w = torch.where((advantages > 0) & (ratio > upper), upper * (ratio / upper) ** (1 - 1 / m), ratio)
    return torch.where((advantages < 0) & (ratio < lower), lower * (ratio / lower) ** (n + 1), w)


@register
def drpo(ratio: Tensor, old_probs: Tensor, advantages: Tensor, *, delta: float = 12.5) -> Result:
    """Quadratic penalty on the change of probability: a smooth DPPO.

    w = r (1 - sign(A) p (r - 1) / delta)
    Source: DRPO, arXiv 2606.09821, equations 8-9
    Checked: authors' documentation and code
    """
    return ratio * (1 - advantages.sign() * old_probs * (ratio - 1) / delta)


# ---- gradient weights that need other tokens ----


@register
def gspo(
    log_ratio: Tensor, advantages: Tensor, sequence_ids: Tensor, *, low: float = 3e-4, high: float = 4e-4
) -> Result:
    """The geometric mean ratio of the whole sequence, clipped to fixed bounds.

    w = s in [1 - low, 1 + high], s = exp(mean of ln r over the sequence)
    Source: GSPO, arXiv 2507.18071, equations 13-14 (GSPO-token), section 5.1
    Checked: verl, TRL
    """
    mean = sequence_sum(log_ratio, sequence_ids) / sequence_sum(torch.ones_like(log_ratio), sequence_ids)
    ratio = mean.exp()
    return torch.where(is_clipped(ratio, advantages, 1 - low, 1 + high), 0.0, ratio)


def covariance(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Return (T,) (ln pi - mean) (A - mean), with means over the micro-batch (arXiv 2505.22617, equation 10)."""
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def select_largest(values: Tensor, share: float) -> Tensor:
    """Return (T,) bool: the `share` of all tokens with the largest values, at least one token."""
    count = min(len(values), max(1, int(share * len(values))))
    return torch.zeros_like(values, dtype=torch.bool).scatter(0, values.topk(count).indices, True)


@register
def clip_cov(
    logprobs: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    *,
    share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    low: float = 1.0,
    high: float = 1.0,
) -> Result:
    """Drops random tokens among those whose log-prob and advantage are strongly correlated.

    w = 0 for `share` of all tokens (at least one), drawn from those with
        cov_low < (ln pi - mean)(A - mean) < cov_high; else as fixed
    Source: Clip-Cov, arXiv 2505.22617, equations 10-12; low and high from verl's recipes
    Checked: paper, verl
    """
    cut = is_clipped(ratio, advantages, 1 - low, 1 + high)
    cov = covariance(logprobs, advantages)
    candidates = (cov > cov_low) & (cov < cov_high) & ~cut
    drawn = select_largest(torch.where(candidates, torch.rand_like(ratio), -1.0), share) & candidates
    return torch.where(drawn | cut, 0.0, ratio)


@register
def kl_cov(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, *, share: float = 2e-4, coefficient: float = 1.0
) -> Result:
    """Penalty abs(ln r) on the tokens whose log-prob and advantage are most correlated.

    w = r, minus coefficient sign(ln r) / A for the `share` of all tokens (at least one) with the largest
        (ln pi - mean)(A - mean)
    Source: KL-Cov, arXiv 2505.22617, equations 10, 13-14; no penalty where A = 0 (ours); `share` for 32B; 7B: 2e-3
    Checked: paper, verl (coefficient 0.1)
    """
    chosen = select_largest(covariance(logprobs, advantages), share) & (advantages != 0)
    penalty = coefficient * log_ratio.sign() / torch.where(chosen, advantages, 1.0)
    return log_ratio.exp() - torch.where(chosen, penalty, 0.0)
