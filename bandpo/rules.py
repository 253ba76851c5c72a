"""The published rules, a function each; docs/rules.md is the table of them.

    rule = load_rule("sapo", {})                              # with the published values
    rule = load_rule("band", {"delta": 0.1})                  # with another radius
    rule = load_rule("my_rule.py:my_rule", {"width": 0.2})    # yours: see bandpo/rule.py

To add one: a function of a `View` below @published, its parameters keyword-only with the published values, and the
docstring that the table is made of: what it does; `w = ...`, the weight of A grad log pi (an interval may be given
instead); `Source:` paper and equation; `Checked:` what the formula was compared with. The tests then ask for its
gradient written a second time.

r is the ratio now / old, p the old probability, A the advantage, H the entropy of the old policy, all of one token.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bandpo.band import band_bounds, inside_band
from bandpo.rule import Result, Rule, Sums, View, WithPenalty, told

RULES: dict[str, Rule] = {}


def published(*sums: Sums) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Enter a rule in RULES under its function's name."""

    def enter(function: Callable[..., Result]) -> Callable[..., Result]:
        assert function.__name__ not in RULES, f"two rules are called {function.__name__}"
        RULES[function.__name__] = Rule(function.__name__, function, sums)
        return function

    return enter


def load_rule(name: str, parameters: Mapping[str, object]) -> Rule:
    """The rule of RULES with this name, or of the user's "FILE.py:FUNCTION", with these parameters.

    Raises ValueError for an unknown name or parameter, listing what there is, for a file or function that is not there
    or has not the form of a rule, and for a file that is no Python or raises, with the line of it.
    """
    if name in RULES:
        return RULES[name].with_parameters(parameters)
    path, colon, function_name = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(f"rule {name!r} is not known; use FILE.py:FUNCTION, or one of {', '.join(sorted(RULES))}")
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise ValueError(f"rule {name!r}: {path} cannot be read: {error.strerror}") from error
    names: dict[str, object] = {"__name__": path.removesuffix(".py"), "__file__": path}
    try:
        exec(compile(source, path, "exec"), names)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise ValueError(f"rule {name!r}: {told(error, path)}") from error
    found = names.get(function_name)
    if isinstance(found, Rule):
        return found.with_parameters(parameters)
    functions = [key for key, value in names.items() if getattr(value, "__module__", None) == names["__name__"]]
    if found is None or not hasattr(found, "__code__"):
        raise ValueError(
            f"rule {name!r}: {path} has no function {function_name}; it has {', '.join(functions) or 'none'}"
        )
    code = found.__code__  # type: ignore[attr-defined]
    if code.co_argcount != 1 or code.co_flags & 0x0C:  # *args, **kwargs: a misspelt parameter would do nothing
        raise ValueError(
            f"rule {name!r}: a rule is `def {function_name}(view, *, parameter=value, ...)`: one argument, and "
            "parameters by keyword"
        )
    return Rule(name, found).with_parameters(parameters)  # type: ignore[arg-type]


def table() -> str:
    """The table of all rules, in Markdown, made of their docstrings and published values."""
    lines = [
        "| rule | what it does | w of w A grad log pi | parameters | source | checked against |",
        "|---|---|---|---|---|---|",
    ]
    for name, rule in RULES.items():
        text = " ".join((rule.function.__doc__ or "").split())
        what, _, rest = text.partition(" w = ")
        weight, _, rest = rest.partition(" Source: ")
        source, _, checked = rest.partition(" Checked: ")
        values = {k: "no published value" if v is ... else v for k, v in rule.defaults.items()}
        parameters = ", ".join(
            f"`{k}` {v:g}" if isinstance(v, float) else f"`{k}` {v or 'none'}" for k, v in values.items()
        )
        cells = (f"`{name}`", what, weight, parameters or "none", source, checked)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def by_sign(view: View, positive: float | Tensor, negative: float | Tensor) -> Tensor:
    """(T,) `positive` where A > 0, else `negative`."""
    one = torch.ones_like(view.advantages)
    return torch.where(view.advantages > 0, positive * one, negative * one)


def leaving(view: View) -> Tensor:
    """(T,) bool, where a token moves away and PPO could clip: A > 0 and r > 1, or A < 0 and r < 1."""
    return view.advantages * view.log_ratio > 0


WHOLE = 2**30


def whole(values: Tensor) -> Tensor:
    """int64 fixed point, for running sums: exact, the same in any order, and a GPU has no other deterministic ones."""
    return (values.double() * WHOLE).round().long()


# ---- intervals of the ratio ----


@published()
def fixed(view: View, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Result:
    """The same interval for every token; Clip-Higher with 0.2, 0.28 (DAPO, arXiv 2503.14476).

    w = r in [1 - clip_low, 1 + clip_high], else 0 (on the clipped side)
    Source: PPO, arXiv 1707.06347, equation 7
    Checked: verl, TRL (also by `make beside`)
    """
    return torch.full_like(view.p, 1 - clip_low), torch.full_like(view.p, 1 + clip_high)


@published()
def none(view: View) -> Result:
    """No clip: the control, dual clip alone.

    w = r
    Source: PPO, arXiv 1707.06347, equation 6
    Checked: by hand
    """
    return torch.zeros_like(view.p), torch.full_like(view.p, torch.inf)


@published()
def band(view: View, *, delta: float | Tensor = 0.05, divergence: str = "kl", ratio_cap: float | None = 10.0) -> Result:
    """All ratios that a trust region D_f(new, old) <= delta leaves to a token of probability p.

    w = r in the Band of p, else 0 (on the clipped side)
    Source: BandPO, arXiv 2603.04918; docs/band.md
    Checked: the authors' code; 45-digit roots
    """
    return band_bounds(view.old_logprobs, delta=delta, divergence=divergence, cap=ratio_cap)


@published()
def band_relaxed(
    view: View,
    *,
    delta: float | Tensor = 0.05,
    divergence: str = "kl",
    ratio_cap: float | None = 10.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Result:
    """The union of band and fixed: the ablation of the Band's paper.

    w = r in the Band of p or in [1 - clip_low, 1 + clip_high], else 0 (on the clipped side)
    Source: BandPO, arXiv 2603.04918, ablation
    Checked: the authors' code
    """
    lower, upper = band_bounds(view.old_logprobs, delta=delta, divergence=divergence, cap=ratio_cap)
    return lower.clamp(max=1 - clip_low), upper.clamp(min=1 + clip_high)


@published()
def band_asymmetric(
    view: View,
    *,
    delta_low: float | Tensor = 0.05,
    delta_high: float | Tensor = 0.05,
    divergence: str = "kl",
    ratio_cap: float | None = 10.0,
) -> Result:
    """The Band with a radius for each bound: delta_low limits A < 0, delta_high A > 0.

    w = r in [lower bound of delta_low, upper bound of delta_high], else 0 (on the clipped side)
    Source: ours, after BandPO, arXiv 2603.04918; its divergence masks are those of DPPO
    Checked: band, dppo_kl, dppo_tv
    """
    lower, _ = band_bounds(view.old_logprobs, delta=delta_low, divergence=divergence, cap=ratio_cap)
    return lower, band_bounds(view.old_logprobs, delta=delta_high, divergence=divergence, cap=ratio_cap)[1]


@published()
def dcpo(view: View, *, clip_low: float = 0.16, clip_high: float = 0.2, ratio_cap: float | None = 10.0) -> Result:
    """An interval that widens for rare tokens (dynamic adaptive clipping).

    w = r in [1/2 + sqrt(max(1 - 4 clip_low / p, 0)) / 2, 1/2 + sqrt(1 + 4 clip_high / p) / 2], else 0 (on the
        clipped side)
    Source: DCPO (DAC), arXiv 2509.02333
    Checked: the code of BandPO's authors
    """
    inverse = (-view.old_logprobs).exp()  # 1/p
    lower = 0.5 + 0.5 * (1 - 4 * clip_low * inverse).clamp(min=0).sqrt()
    upper = 0.5 + 0.5 * (1 + 4 * clip_high * inverse).sqrt()
    return lower, upper if ratio_cap is None else upper.clamp(max=ratio_cap)


@published()
def ripo(
    view: View,
    *,
    delta_low: float | Tensor = 0.05,
    delta_high: float | Tensor = 0.05,
    ratio_floor: float = 0.5,
    ratio_cap: float | None = 10.0,
) -> Result:
    """An interval that widens with 1 / sqrt(p): the same step for every token in the metric of Fisher and Rao.

    w = r in [max(1 - sqrt(delta_low / p), ratio_floor), 1 + sqrt(delta_high / p)], else 0 (on the clipped side)
    Source: RIPO, arXiv 2607.10169, section 4.1
    Checked: an article on the paper and a reimplementation, which alone has floor and cap
    """
    lower = (1 - torch.sqrt(delta_low / view.p)).clamp(min=ratio_floor)
    upper = 1 + torch.sqrt(delta_high / view.p)
    return lower, upper if ratio_cap is None else upper.clamp(max=ratio_cap)


@published()
def atr(view: View, *, delta: float | Tensor) -> Result:
    """A trust region on the k3 estimate of the KL: an asymmetric interval, the same for every p.

    w = r where r - 1 - ln r <= delta, else 0 (on the clipped side)
    Source: ATR-GRPO, arXiv 2602.05494, the range of KL3
    Checked: two summaries of the paper, which leave delta out
    """
    radius = torch.as_tensor(delta, dtype=view.p.dtype, device=view.p.device)
    root = torch.sqrt(2 * radius)
    up, down = root, -root - radius  # both beyond the root of e^s - 1 - s = delta: Newton comes back without passing it
    for _ in range(6):
        up = up - (torch.expm1(up) - up - radius) / torch.expm1(up)
        down = down - (torch.expm1(down) - down - radius) / torch.expm1(down)
    return down.exp().expand_as(view.p), up.exp().expand_as(view.p)


@published()
def gec(
    view: View,
    *,
    high_at_0: float = 0.5,
    high_slope: float = -0.25,
    low_at_0: float = 0.2,
    low_slope: float = 0.0,
) -> Result:
    """Thresholds that are lines in the new probability; the published ones raise entropy, as rare tokens may gain more.

    w = r in [1 - low(p r), 1 + high(p r)], high(x) = high_at_0 + high_slope x and low likewise, else 0 (on the
        clipped side)
    Source: GEC (flexible entropy control), arXiv 2602.09782, the dynamic thresholds; without their schedules
    Checked: an article of the authors; a description and another project's configuration for the numbers
    """
    # Solved for r, as the paper does: r <= 1 + high_at_0 + high_slope p r.
    lower = (1 - low_at_0) / (1 + low_slope * view.p)
    return lower, (1 + high_at_0) / (1 - high_slope * view.p)


def _balance(view: View, *, low_from: float, high_from: float, high_to: float, high_step: float) -> dict[str, Tensor]:
    """What tokens of A < 0 contribute, and those of A > 0 under every upper bound."""
    r, a = view.ratio, view.advantages
    highs = _steps(high_from, high_to, high_step)
    return {
        "negative": (r.clamp(min=low_from) * -a.clamp(max=0)).sum(dtype=torch.float64),
        "positive": torch.stack([(r.clamp(max=c) * a.clamp(min=0)).sum(dtype=torch.float64) for c in highs]),
    }


def _steps(start: float, end: float, step: float) -> list[float]:
    return [start + k * step for k in range(int((end - start) / step + 1e-9) + 1)]


@published(_balance)
def bapo(
    view: View,
    *,
    target: float = 0.4,
    low_from: float = 0.6,
    low_to: float = 0.9,
    high_from: float = 1.2,
    high_to: float = 3.0,
    high_step: float = 0.05,
) -> Result:
    """One interval for the update: the upper bound rises until A > 0 carries its share of the loss.

    w = r in [low_from, c], else 0 (on the clipped side), with the first c from high_from to high_to at which A > 0
        carries `target` of the sum of |min(r A, clip(r) A)|; [low_to, high_to] where none does
    Source: BAPO, arXiv 2510.18927, equation 8 and algorithm 1
    Checked: the paper's text; the authors' code, which differs (lower bound first, other ranges)
    """
    positive, negative = view.totals["positive"], view.totals["negative"]
    # Then the algorithm raises the lower bound step by step; that only adds to A < 0, so it goes on to the end.
    reached = positive / (positive + negative) >= target
    reached = torch.cat([reached, torch.ones_like(reached[:1])])
    step = reached.to(torch.int8).argmax(dim=0, keepdim=True)
    highs = _steps(high_from, high_to, high_step)
    path = (view.p.new_tensor([low_from] * len(highs) + [low_to]), view.p.new_tensor(highs + highs[-1:]))
    lower, upper = (bounds.index_select(0, step).expand_as(view.p) for bounds in path)
    return lower, upper


def _spread(view: View, *, groups: int) -> dict[str, Tensor]:
    moved = (view.ratio - 1).double()
    columns = torch.stack([torch.ones_like(moved), moved, moved.square()], dim=1)
    members = _group(view, groups) == torch.arange(groups, device=moved.device)[:, None]  # (groups, T)
    return {"spread": members.double() @ columns}  # tokens, sums of r - 1 and of its square


def _group(view: View, groups: int) -> Tensor:
    """(T,) int64, which of so many equal parts of [0, 1] the new probability is in."""
    return (view.logprobs.detach().exp() * groups).long().clamp(0, groups - 1)


@published(_spread)
def acpo(
    view: View,
    *,
    base: float = 0.2,
    alpha: float = 3.0,
    clip_min: float = 0.0,
    clip_max: float = 3.0,
    groups: int = 5,
) -> Result:
    """An interval for each group of probabilities, as wide as the ratios of the update's tokens in it are spread.

    w = r in [1 - c, 1 + c], c = base + alpha s between clip_min and clip_max, s the standard deviation of r in the
        group, else 0 (on the clipped side)
    Source: ACPO, arXiv 2606.22570, section 4
    Checked: the authors' code and its settings, which group by the new probability
    """
    tokens, moved, squares = view.totals["spread"].unbind(dim=1)
    tokens = tokens.clamp(min=1)
    spread = (squares / tokens - (moved / tokens).square()).clamp(min=0) + 1e-8
    width = (base + alpha * spread.sqrt()).clamp(clip_min, clip_max).to(view.p.dtype)[_group(view, groups)]
    return (1 - width).clamp(min=0), 1 + width


# ---- masks and gates on single tokens ----


def _dppo(view: View, low: float | Tensor, high: float | Tensor, divergence: str, cap: float | None) -> Tensor:
    r, radius = view.ratio, by_sign(view, high, low)
    inside = inside_band(view.logprobs.detach(), view.old_logprobs, delta=radius, divergence=divergence)
    return torch.where(leaving(view) & ~inside, 0.0, r if cap is None else r.clamp(max=cap))


@published()
def dppo_tv(
    view: View, *, delta_low: float | Tensor = 0.2, delta_high: float | Tensor = 0.2, ratio_cap: float | None = 20.0
) -> Result:
    """A mask on the total variation between now and the sampler, in two events: the token, the others.

    w = min(r, ratio_cap), 0 when moving away with p |r - 1| > delta_high (A > 0) or delta_low (A < 0)
    Source: DPPO, arXiv 2602.04879, equations 12-13; meant for old_policy: sampler
    Checked: the paper's text, verl (dppo_tv), which has ratio_cap; prime-rl's thresholds
    """
    return _dppo(view, delta_low, delta_high, "tv", ratio_cap)


@published()
def dppo_kl(
    view: View, *, delta_low: float | Tensor = 0.05, delta_high: float | Tensor = 0.05, ratio_cap: float | None = 20.0
) -> Result:
    """A mask on KL(sampler, now), in two events: the token, the others.

    w = min(r, ratio_cap), 0 when moving away with KL(p, r p) > delta_high (A > 0) or delta_low (A < 0)
    Source: DPPO, arXiv 2602.04879, equations 12, 14; meant for old_policy: sampler
    Checked: the paper's text, verl (dppo_kl), which has ratio_cap; a reimplementation's thresholds
    """
    return _dppo(view, delta_low, delta_high, "kl", ratio_cap)


@published()
def cppo(
    view: View,
    *,
    delta: float | Tensor = 0.15,
    prefix_delta: float = 0.015,
    weight_floor: float = 0.8,
    ratio_cap: float | None = None,
) -> Result:
    """A mask on total variation that is tighter early in a response, and after a prefix that has drifted.

    w = r, 0 when moving away with v_t D_t > min(delta, delta + sum over j < t of v_j (prefix_delta - D_j)), where
        D = p |r - 1| and v falls from 1 to weight_floor along the response; r at most ratio_cap
    Source: CPPO, arXiv 2606.10968, equations 8-10; meant for old_policy: sampler
    Checked: the paper's text, two reimplementations
    """
    r, sequence = view.ratio, view.sequence
    last = (view.lengths - 1).clamp(min=1)[sequence]
    weight = (1 - (1 - weight_floor) * view.position / last).double()
    weighted = weight * (view.p * (r - 1)).abs().double()
    left = whole(prefix_delta * weight - weighted)  # what a token leaves of the budget to those after it
    before = left.cumsum(0) - left
    starts = view.lengths.cumsum(0) - view.lengths
    budget = delta + (before - before[starts.clamp(max=len(before) - 1)][sequence]).double() / WHOLE
    cut = leaving(view) & ((weighted > budget) | (weighted > delta))
    return torch.where(cut, 0.0, r if ratio_cap is None else r.clamp(max=ratio_cap))


@published()
def abc(
    view: View, *, high_gain: float = 0.2, low_gain: float = 0.2, low_loss: float = 0.2, high_loss: float = 0.2
) -> Result:
    """Four bounds, two for each sign of A, that hold on both sides.

    w = r in [1 - low_gain, 1 + high_gain] for A > 0, in [1 - low_loss, 1 + high_loss] for A < 0, else 0
    Source: ABC-GRPO, arXiv 2601.03895
    Checked: the authors' readme (four bounds without condition); their recipe names 0.2 and 0.2 only
    """
    r = view.ratio
    inside = (r >= 1 - by_sign(view, low_gain, low_loss)) & (r <= 1 + by_sign(view, high_gain, high_loss))
    return torch.where(inside, r, 0.0)


@published()
def up(view: View, *, clip_low: float = 0.2) -> Result:
    """A > 0 without ratio and clip, A < 0 as in PPO.

    w = 1 for A > 0; for A <= 0 r, 0 below 1 - clip_low
    Source: UP-GRPO, arXiv 2607.06987, equation 15
    Checked: pull requests to verl and TRL, in neither's release yet
    """
    r = view.ratio
    return torch.where(view.advantages > 0, 1.0, torch.where(r < 1 - clip_low, 0.0, r))


@published()
def sapo(view: View, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Result:
    """A sigmoid gate in place of the clip, a temperature for each sign of A.

    w = 4 s (1 - s) r, s = sigmoid(tau (r - 1)), tau by the sign of A
    Source: SAPO, arXiv 2511.20347, equations 5-8
    Checked: verl (sapo), TRL (also by `make beside`)
    """
    r = view.ratio
    gate = torch.sigmoid(by_sign(view, tau_positive, tau_negative) * (r - 1))
    return 4 * gate * (1 - gate) * r


@published()
def mhpo(
    view: View,
    *,
    c: float = 1.5,
    k_positive: float = 1.5,
    lambda_positive: float = 1.0,
    k_negative: float = 2.0,
    lambda_negative: float = 0.8,
) -> Result:
    """ln r bent to stay within +-c, and a hazard that damps the gradient, for r < 1 sooner than for r > 1.

    w = exp(f - h) / cosh(ln r / c)^2, f = c tanh(ln r / c), h = (ln(1 + e^f) / lambda_positive)^k_positive +
        (ln(1 + e^-f) / lambda_negative)^k_negative
    Source: MHPO, arXiv 2603.16929, the modulator, the penalty (a constant for the gradient) and section 4.1
    Checked: two descriptions of the paper, one with a reimplementation; not the paper's own text
    """
    bent = c * torch.tanh(view.log_ratio / c)
    hazard = (softplus(bent) / lambda_positive) ** k_positive + (softplus(-bent) / lambda_negative) ** k_negative
    return torch.exp(bent - hazard) / torch.cosh(view.log_ratio / c).square()


@published()
def gppo(
    view: View, *, beta_low: float = 1.0, beta_high: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.2
) -> Result:
    """Clipped tokens keep the gradient that they have at the bound.

    w = beta_high (1 + clip_high) above for A > 0, beta_low (1 - clip_low) below for A < 0, else r
    Source: GPPO, arXiv 2508.07629; CE-GPPO, arXiv 2509.20712, equations 8-10, with both beta 1
    Checked: the paper's text, the authors' code
    """
    r, a = view.ratio, view.advantages
    w = torch.where((a > 0) & (r > 1 + clip_high), beta_high * (1 + clip_high), r)
    return torch.where((a < 0) & (r < 1 - clip_low), beta_low * (1 - clip_low), w)


@published()
def ce_gppo(
    view: View, *, beta_low: float = 0.75, beta_high: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.2
) -> Result:
    """GPPO with less of the gradient below the interval, so that entropy is kept.

    w = beta_high (1 + clip_high) above for A > 0, beta_low (1 - clip_low) below for A < 0, else r
    Source: CE-GPPO, arXiv 2509.20712, equations 8-10
    Checked: the paper's text, the authors' code
    """
    return gppo(view, beta_low=beta_low, beta_high=beta_high, clip_low=clip_low, clip_high=clip_high)


@published()
def dgpo(view: View, *, n: float = 1.0, m: float = 2.0, clip_low: float = 0.2, clip_high: float = 0.2) -> Result:
    """Clipped tokens keep a gradient that fades as r falls, and grows slower than r as it rises.

    w = r^(n + 1) / (1 - clip_low)^n below for A < 0, (1 + clip_high)^(1 / m) r^(1 - 1 / m) above for A > 0, else r
    Source: DGPO, arXiv 2603.14389, the weight W of the probability's gradient, W p r here
    Checked: the authors' readme, whose constants follow from continuity; a description that writes them out
    """
    r, a, low, high = view.ratio, view.advantages, 1 - clip_low, 1 + clip_high
    w = torch.where((a > 0) & (r > high), high * (r / high) ** (1 - 1 / m), r)
    return torch.where((a < 0) & (r < low), low * (r / low) ** (n + 1), w)


@published()
def cfpo(view: View, *, epsilon: float = 0.2) -> Result:
    """A quadratic penalty on the ratio: beyond 1 +- epsilon the gradient turns back.

    w = r (1 - sign(A) (r - 1) / epsilon)
    Source: CFPO, arXiv 2601.22801, equation 7, the loss r A - |A| (r - 1)^2 / (2 epsilon); SPO, arXiv 2401.16025
    Checked: three reimplementations, not the paper's own text
    """
    r = view.ratio
    return r * (1 - view.advantages.sign() * (r - 1) / epsilon)


@published()
def drpo(view: View, *, delta: float | Tensor = 12.5) -> Result:
    """A quadratic penalty on the probability: a smooth DPPO.

    w = r (1 - sign(A) p (r - 1) / delta)
    Source: DRPO, arXiv 2606.09821, equations 8-9; meant for old_policy: sampler
    Checked: the authors' documentation and code
    """
    r = view.ratio
    return r * (1 - view.advantages.sign() * view.p * (r - 1) / delta)


@published()
def pspo(view: View, *, alpha: float = 0.1) -> Result:
    """The new probability smoothed towards the old one, (1 - alpha) r + alpha in place of r, no clip.

    w = (1 - alpha) r
    Source: PSPO, arXiv 2509.21282, the smoothed ratio
    Checked: TRL's documentation and reviews, not the paper's own text
    """
    return (1 - alpha) * view.ratio


# ---- rules that look at the whole update ----

BINS = 4096  # of a positive quantity, from 1e-12 to 400 in equal steps of the logarithm: 0.8% each


def _bin(values: Tensor) -> Tensor:
    """(T,) int64 bin of each value; whatever is below 1e-12, zero and negatives too, is in bin 0."""
    low, high = -27.631, 5.9915  # ln 1e-12, ln 400
    place = (values.double().clamp(min=1e-12).log() - low) / (high - low) * BINS
    return place.long().clamp(0, BINS - 1)


def _upper_edges(like: Tensor) -> Tensor:
    low, high = -27.631, 5.9915
    return (low + (high - low) * torch.arange(1, BINS + 1, device=like.device, dtype=torch.float64) / BINS).exp()


def _histogram(values: Tensor, counted: Tensor) -> Tensor:
    """(BINS,) float64 numbers of the counted values in each bin: whole numbers, exact in any order of adding."""
    return torch.zeros(BINS, dtype=torch.float64, device=values.device).index_add(0, _bin(values), counted.double())


def _second_moments(view: View) -> dict[str, Tensor]:
    return {"second moments": _histogram(view.log_ratio.square(), leaving(view))}


@published(_second_moments)
def m2po(view: View, *, threshold: float = 0.04) -> Result:
    """Drops the tokens that moved away the furthest, until the mean of (ln r)^2 of those that are left is small.

    w = r; 0 where A ln r > 0 and (ln r)^2 is above the level that leaves a mean of `threshold` over such tokens
    Source: M2PO, arXiv 2510.01161, equations 4-5 and algorithm 1; meant for stale data, old_policy: sampler
    Checked: the paper's text, a reimplementation
    """
    count = view.totals["second moments"].long()
    moments = (count * whole(_upper_edges(count))).cumsum(0).double() / WHOLE  # of all up to each bin
    kept = (moments <= threshold * count.cumsum(0).double()).sum()  # bins; the mean rises from bin to bin
    return torch.where(leaving(view) & (_bin(view.log_ratio.square()) >= kept), 0.0, view.ratio)


def _first_moments(view: View) -> dict[str, Tensor]:
    columns = (torch.ones_like(view.p), view.logprobs.detach(), view.advantages)
    return {"first moments": torch.stack([column.sum(dtype=torch.float64) for column in columns])}


def covariance(view: View) -> Tensor:
    """(T,) (ln pi - mean) (A - mean), means over the update: equation 10 of arXiv 2505.22617."""
    tokens, logprobs, advantages = view.totals["first moments"].unbind()
    return (view.logprobs.detach() - logprobs / tokens) * (view.advantages - advantages / tokens)


def _uniform(view: View) -> Tensor:
    """(T,) float64 numbers in [0, 1) by hash of update, sequence and position: the same however the update is cut."""
    mask = 0xFFFFFFFF
    x = (view.numbers[view.sequence] * 0x9E3779B1 + view.position * 0x5BD1E995 + view.update * 0x27D4EB2F) & mask
    for shift, factor in ((16, 0x45D9F3B), (15, 0x45D9F3B)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return (x ^ (x >> 16)).double() / 2.0**32


def _candidates(view: View, *, cov_low: float, cov_high: float, clip_low: float, clip_high: float) -> dict[str, Tensor]:
    chosen, _ = _candidates_and_clipped(view, cov_low, cov_high, clip_low, clip_high)
    return {"candidates": chosen.sum(dtype=torch.float64)}


def _candidates_and_clipped(
    view: View, cov_low: float, cov_high: float, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    cov, r = covariance(view), view.ratio
    clipped = leaving(view) & ((r < 1 - clip_low) | (r > 1 + clip_high))
    return (cov > cov_low) & (cov < cov_high) & ~clipped, clipped


@published(_first_moments, _candidates)
def clip_cov(
    view: View,
    *,
    share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
) -> Result:
    """Drops tokens by chance among those whose log-prob and advantage go together.

    w = 0 for `share` of all tokens, by chance among those with cov_low < (ln pi - mean)(A - mean) < cov_high; else as
        fixed
    Source: Clip-Cov, arXiv 2505.22617, equations 10-12
    Checked: the paper's text and listing, verl (clip_cov) and its recipes for clip_low and clip_high
    """
    candidates, clipped = _candidates_and_clipped(view, cov_low, cov_high, clip_low, clip_high)
    wanted = share * view.totals["first moments"][0]
    chosen = candidates & (_uniform(view) * view.totals["candidates"] < wanted)
    return torch.where(chosen | clipped, 0.0, view.ratio)


def _covariances(view: View) -> dict[str, Tensor]:
    cov = covariance(view)
    return {"covariances": _histogram(cov, torch.ones_like(cov))}


@published(_first_moments, _covariances)
def kl_cov(view: View, *, share: float = 2e-4, coefficient: float = 1.0) -> Result:
    """Holds back the tokens whose log-prob and advantage go together the most, by a penalty.

    w = r, and coefficient |ln r| in the loss for the `share` of all tokens with the largest (ln pi - mean)(A - mean)
    Source: KL-Cov, arXiv 2505.22617, equations 10, 13-14
    Checked: the paper's text and listing, verl (kl_cov); share 2e-4 is for 32B, 2e-3 for 7B
    """
    count = view.totals["covariances"].long()
    wanted = (share * count.sum()).floor().clamp(min=1)
    left = wanted - (count.flip(0).cumsum(0).flip(0) - count)  # what the higher bins leave to each
    place = _bin(covariance(view))
    chosen = _uniform(view) * count[place] < left[place]  # all, none, or in the last bin the right number on average
    return WithPenalty(view.ratio, coefficient * chosen * (view.logprobs - view.old_logprobs).abs())
