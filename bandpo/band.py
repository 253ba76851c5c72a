"""The Band operator: clip bounds of the importance ratio from an f-divergence trust region.

    lower, upper = band_bounds(old_logprobs, delta=0.05, divergence="kl", cap=10.0)

The trust region contains the distributions new with D_f = sum old * f(new / old) <= delta. `upper` and `lower` are the
largest and the smallest ratio new / old in it of a token with old probability p (BandPO, arXiv 2603.04918). By Jensen's
inequality, all other tokens then keep their proportions. The problem reduces to two masses: p of the token and
q = 1 - p of the others.

Both bounds solve the same equation. A mass a shrinks by the factor e^v, v < 0, and the other mass b = 1 - a grows by R:

    D(v) = a f(e^v) + b f(R),   R = 1 - (a / b)(e^v - 1),   v* < 0 with D(v*) = delta, or -inf when D(-inf) <= delta

For `lower` the token shrinks (a = p) and lower = e^v*. For `upper` the others shrink (a = q) and upper = R. This form
avoids cancellation near p = 0 and p = 1. `tv` and `chi2` have closed forms. `kl` (KL(old || new), TRPO's direction)
takes two Newton steps, three in float64. All other divergences use bisection. Iteration counts are fixed, so the bound
of a token does not depend on other tokens, and no value is read from the device.

To add a divergence, add f as a function of s = ln(new / old) to DIVERGENCES. Choose the free multiple of u - 1, which
does not change D_f, so that f(0) = f'(0) = 0. This avoids cancellation near u = 1. f must be finite or +inf at
s = -1e30, and must not overflow below s = 80 unless it grows faster than u. Set `shrink` if v* has a formula. The tests
cover every entry.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-3  # nats; log-probs up to this value count as 0, larger ones are an error
CHUNK_TOKENS = 1 << 13  # tokens per chunk and CPU thread: about twelve such buffers fit into a core's L2 cache


@dataclass(frozen=True)
class Divergence:
    """f-divergence D_f = sum old * f(new / old), with f as an elementwise function of s = ln(new / old).

    `shrink` replaces the bisection if v* has a formula: (a, b, a / b, delta) -> v*, elementwise.
    """

    f: Callable[[Tensor], Tensor]
    shrink: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


# ---- the operator ----


@torch.no_grad()
def band_bounds(
    old_logprobs: Tensor, *, delta: float | Tensor, divergence: str, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return (lower, upper): the smallest and the largest ratio new / old of each token in its trust region.

    old_logprobs: any shape and floating dtype, nats, at most 0. The values 0 (p = 1) and -inf (p = 0) give the limits,
    NaN gives NaN.
    delta: radius, above 0; a tensor that broadcasts with `old_logprobs` sets one per token. Radii of different
    divergences are not comparable. cap: largest `upper`, at least 1; None: no cap.

    Both results have no gradient and the broadcast shape. They are float32, or float64 for float64 input. They satisfy
    0 <= lower <= 1 <= upper <= 1/p. A p below e^-80 (float64: e^-700) counts as e^-80, so that every bound is finite.

    Raises ValueError for an unknown divergence, delta <= 0, cap < 1, log-probs above 0. Tensor values are checked only
    on a CPU, since a check on a GPU would synchronize. There, an invalid value gives a NaN bound.
    """
    if cap is not None and not cap >= 1:
        raise ValueError(f"cap: {cap} would forbid the ratio 1; use a number of at least 1, or None for no cap")
    chosen, logprobs, radius = _check_inputs(old_logprobs, delta, divergence)
    if logprobs.device.type != "cpu" or torch.compiler.is_compiling():
        return _bounds(chosen, logprobs, radius, cap)
    # In chunks, so that the operands of eager CPU operations stay in the cache.
    size = CHUNK_TOKENS * torch.get_num_threads()
    if logprobs.numel() <= size:
        return _bounds(chosen, logprobs, radius, cap)
    lower, upper = logprobs.new_empty(2, logprobs.numel())
    flat, radii = logprobs.flatten(), radius.flatten()
    for start in range(0, flat.numel(), size):
        part = slice(start, start + size)
        lower[part], upper[part] = _bounds(chosen, flat[part], radii[part] if radius.dim() else radius, cap)
    return lower.view_as(logprobs), upper.view_as(logprobs)


@torch.no_grad()
def inside_band(logprobs: Tensor, old_logprobs: Tensor, *, delta: float | Tensor, divergence: str) -> Tensor:
    """Return a bool mask of tokens whose ratio is inside the trust region; broadcast shape, False for NaN.

    Equal to lower <= ratio <= upper up to rounding, but computed from the divergence without solving for the bounds.
    Raises ValueError like `band_bounds`.
    """
    chosen, old, radius = _check_inputs(old_logprobs, delta, divergence)
    _, new, _ = _check_inputs(logprobs.to(old.dtype), delta, divergence)
    old, new = _finite(old), _finite(new)
    others = torch.log(_rest(new) / _rest(old))
    return old.exp() * chosen.f(new - old) + _rest(old) * chosen.f(others) <= radius


def _bounds(chosen: Divergence, logprobs: Tensor, delta: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    logprobs = _finite(logprobs)
    p, q = logprobs.exp(), _rest(logprobs)
    shrinking, other = torch.stack([p, q]), torch.stack([q, p])  # (2, ...): both bounds at once
    odds = shrinking / other
    change = _change((chosen.shrink or _bisection(chosen.f))(shrinking, other, odds, delta))
    upper = torch.minimum(1 - odds[1] * change[1], 1 / p)  # rounding must not exceed 1/p
    return 1 + change[0], upper if cap is None else upper.clamp(max=cap)


def _change(v: Tensor) -> Tensor:
    """Return e^v - 1. Below v = -60 it is -1 in any dtype. The clamp avoids slow denormals on a CPU."""
    return torch.expm1(v.clamp(min=-60))


# ---- solvers: v* of a shrinking mass a, the other mass b = 1 - a, odds = a / b ----


def _kl_shrink(a: Tensor, b: Tensor, odds: Tensor, delta: Tensor) -> Tensor:
    """Newton's method for D(v) - delta, with D(v) = -a v - b ln R and derivative odds (e^v - 1) / R.

    The initial value solves D = delta to second order in sqrt(delta). The error of the ratio is at most 6e-4 after one
    step, 2e-8 after two and 2e-15 after three, for a from 1e-12 to 1 - 1e-12 and delta from 1e-3 to 10.
    """
    v = -(torch.sqrt(2 * delta / odds) + delta / 3 / a + delta / 3)
    freed = -odds
    for _ in range(3 if v.dtype == torch.float64 else 2):
        gain = freed * _change(v)  # R - 1
        missing = torch.addcmul(torch.addcmul(delta, a, v), b, torch.log1p(gain))  # delta - D = delta + a v + b ln R
        v = v - missing - missing / gain  # the slope of D is -gain / (1 + gain)
    return v


def _tv_shrink(a: Tensor, b: Tensor, odds: Tensor, delta: Tensor) -> Tensor:
    return torch.log1p(-(delta / a).clamp(max=1))  # D = a |e^v - 1|


def _chi2_shrink(a: Tensor, b: Tensor, odds: Tensor, delta: Tensor) -> Tensor:
    return torch.log1p(-torch.sqrt(delta / odds).clamp(max=1))  # D = odds (e^v - 1)^2


def _bisection(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return a bisection over ln(-v) for any f. The logarithm resolves both small changes and vanishing masses."""

    def shrink(a: Tensor, b: Tensor, odds: Tensor, delta: Tensor) -> Tensor:
        near, far = 0 * a - 69, 0 * a + 69  # ln(-v): no change up to rounding, mass vanishes; NaN if a is NaN
        for _ in range(60 if a.dtype == torch.float64 else 31):  # 138 / 2^31 = 6e-8 relative
            middle = (near + far) / 2
            v = -middle.exp()
            inside = a * f(v) + b * f(torch.log1p(-odds * _change(v))) <= delta
            near, far = torch.where(inside, middle, near), torch.where(inside, far, middle)
        return -far.exp()

    return shrink


# ---- the divergences: f(u) in terms of s = ln u ----


def _jensen_shannon(s: Tensor) -> Tensor:
    log_mean = torch.log1p(torch.expm1(s) / 2)  # ln((u + 1) / 2)
    return (s.exp() * (s - log_mean) - log_mean) / 2


def alpha_divergence(alpha: float) -> Divergence:
    """Amari's alpha-divergence: f(u) = (u^alpha - 1 - alpha (u - 1)) / (alpha (alpha - 1)).

    alpha -> 0 is `kl`, 1/2 is 4 `hellinger`, -> 1 is `reverse_kl`, 2 is `chi2` / 2. For alpha >= 1, the allowed
    increase of a rare token's probability goes to 0 with its probability. Raises ValueError for 0 and 1: use `kl` and
    `reverse_kl`.
    """
    if alpha in (0, 1):
        raise ValueError(f"alpha: {alpha} is a limit of the family; use divergence kl for 0, reverse_kl for 1")
    return Divergence(lambda s: (torch.expm1(alpha * s) - alpha * torch.expm1(s)) / (alpha * (alpha - 1)))


DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(lambda s: torch.expm1(s) - s, _kl_shrink),  # -ln u + u - 1
    "tv": Divergence(lambda s: torch.expm1(s).abs() / 2, _tv_shrink),  # |u - 1| / 2
    "chi2": Divergence(lambda s: torch.expm1(s).square(), _chi2_shrink),  # (u - 1)^2
    "reverse_kl": Divergence(lambda s: s * s.exp() - torch.expm1(s)),  # u ln u - u + 1
    "hellinger": Divergence(lambda s: torch.expm1(s / 2).square() / 2),  # (sqrt(u) - 1)^2 / 2
    "jensen_shannon": Divergence(_jensen_shannon),  # (u ln u - (u + 1) ln((u + 1) / 2)) / 2
    "alpha": alpha_divergence(1.5),  # between reverse_kl and chi2
}


# ---- shared by band_bounds and inside_band ----


def _check_inputs(logprobs: Tensor, delta: float | Tensor, divergence: str) -> tuple[Divergence, Tensor, Tensor]:
    """Check the inputs; return the divergence, log-probs as at least float32, and radii of the same dtype.

    A tensor of radii is broadcast; a single radius is a scalar tensor.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: {divergence!r} is not known; use one of {', '.join(DIVERGENCES)}")
    if not logprobs.is_floating_point():
        raise ValueError(f"old_logprobs: dtype {logprobs.dtype} holds no log-probs; use a floating dtype")
    logprobs = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    readable = logprobs.device.type == "cpu" and not torch.compiler.is_compiling()
    if isinstance(delta, Tensor):
        logprobs, radius = torch.broadcast_tensors(logprobs, delta.to(logprobs))
        allowed = (radius > 0) & (radius < math.inf)
        wrong = readable and not allowed.all()
        delta = radius[~allowed][0].item() if wrong else delta
    else:
        radius = torch.full((), delta, dtype=logprobs.dtype, device=logprobs.device)
        allowed = None
        wrong = not 0 < delta < math.inf
    if wrong:
        raise ValueError(f"delta: {delta} is no radius; use finite numbers above 0")
    # One fast reduction is enough, unless a NaN hides the other values.
    if readable and logprobs.numel() and not logprobs.amax() <= ROUNDING and (logprobs > ROUNDING).any():
        raise ValueError(f"old_logprobs: {logprobs.nan_to_num().max():.4g} is above 0; a log-prob is at most 0")
    if not readable:
        valid = logprobs <= ROUNDING
        logprobs = torch.where(valid if allowed is None else valid & allowed, logprobs, math.nan)
    return DIVERGENCES[divergence], logprobs, radius


def _finite(logprobs: Tensor) -> Tensor:
    """Clamp log-probs to a distance of e^-80 (float64: e^-700) from p = 0 and p = 1. The bounds do not change."""
    floor = -700.0 if logprobs.dtype == torch.float64 else -80.0
    return logprobs.clamp(min=floor, max=-math.exp(floor))


def _rest(logprobs: Tensor) -> Tensor:
    """Return 1 - p, accurate to rounding also near p = 1."""
    return -torch.expm1(logprobs)
