"""The rules: each gradient against the paper's formula written a second time, limits, sums that can be cut, errors."""

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from launching import ROOT
from torch import Tensor

from bandpo.objective import policy_loss, sequence_logprobs
from bandpo.plot import PROBABILITIES, RATIOS, kept, with_table
from bandpo.radius import token_radius
from bandpo.rule import Rule, View, WithPenalty, check_rule, clipped_loss, made_up_view, totals
from bandpo.rules import RULES, covariance, load_rule
from train import group_advantages

INTERVALS = {"fixed", "none", "band", "band_relaxed", "band_asymmetric", "dcpo", "ripo", "atr", "gec", "bapo", "acpo"}
NO_DEFAULT = {"atr": {"delta": 0.03}}  # what has no published value
PPO = {"surrogate": "ppo", "dual_clip": None}


def rule_of(name: str, **parameters) -> Rule:
    return load_rule(name, NO_DEFAULT.get(name, {}) | parameters)


def with_totals(rule: Rule, view: View) -> View:
    return replace(view, totals=totals(rule, [view], lambda sums: sums, surrogate="ppo"))


def push(rule: Rule, view: View, **options) -> Tensor:
    """(T,) minus the gradient of the summed losses: what multiplies grad log pi, w A."""
    result = clipped_loss(rule, with_totals(rule, view), **PPO | options)
    return -torch.autograd.grad(result.losses.sum(), view.logprobs)[0]


def tokens_of(view: View) -> list["Token"]:
    columns = (view.ratio, view.p, view.advantages, view.logprobs.detach(), view.position, view.sequence)
    return [Token(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


@dataclass(frozen=True)
class Token:
    r: float
    p: float
    a: float
    logprob: float
    position: int
    sequence: int

    @property
    def leaving(self) -> bool:
        return (self.a > 0 and self.r > 1) or (self.a < 0 and self.r < 1)


# ---- every rule against its paper ----
# PAPER[name](tokens) is the list of w A, from the paper's objective, token by token, with parameters in numbers.


def slope(objective: Callable[[Tensor, Tensor, float, float], Tensor]) -> Callable[[list[Token]], list[float]]:
    """w A of an objective (r, r without gradient, A, p) of single tokens: r dJ/dr."""

    def of(tokens: list[Token]) -> list[float]:
        out = []
        for t in tokens:
            r = torch.tensor(t.r, dtype=torch.float64, requires_grad=True)
            value = objective(r, r.detach(), t.a, t.p)
            out.append(t.r * torch.autograd.grad(value, r)[0].item() if value.requires_grad else 0.0)
        return out

    return of


def clipped(low: Callable[[float], float], high: Callable[[float], float]) -> Callable[[list[Token]], list[float]]:
    """PPO's min(r A, clip(r) A) with bounds that are functions of p."""

    def of(tokens: list[Token]) -> list[float]:
        return [0.0 if (t.a > 0 and t.r > high(t.p)) or (t.a < 0 and t.r < low(t.p)) else t.r * t.a for t in tokens]

    return of


def bisected(inside: Callable[[float], bool], near: float, far: float) -> float:
    """Where `inside` ends, between a point within and a point beyond."""
    for _ in range(200):
        middle = (near + far) / 2
        near, far = (middle, far) if inside(middle) else (near, middle)
    return near


def binary_kl(p: float, x: float) -> float:
    if x >= 1:
        return math.inf
    return -p * math.log(max(x, 1e-300) / p) - (1 - p) * math.log((1 - x) / (1 - p))


def band_low(p: float) -> float:
    return bisected(lambda r: binary_kl(p, r * p) <= 0.05, 1, 0)


def band_high(p: float) -> float:
    return min(bisected(lambda r: binary_kl(p, r * p) <= 0.05, 1, 1 / p), 10)


def k3(r: float) -> float:
    return r - 1 - math.log(r)


def masked(
    divergence: Callable[[float, float], float], delta: float, cap: float
) -> Callable[[list[Token]], list[float]]:
    def of(tokens: list[Token]) -> list[float]:
        return [0.0 if t.leaving and divergence(t.p, t.r * t.p) > delta else min(t.r, cap) * t.a for t in tokens]

    return of


def cppo(tokens: list[Token]) -> list[float]:
    """Algorithm 1 of the paper, for one response after another."""
    out = []
    for sequence in sorted({t.sequence for t in tokens}):
        response = [t for t in tokens if t.sequence == sequence]
        spent = weight_sum = 0.0
        for i, t in enumerate(response, start=1):
            weight = 1 - (1 - 0.8) / max(len(response) - 1, 1) * (i - 1)
            moved = weight * abs(t.r * t.p - t.p)
            allowed = min(0.15, 0.15 + 0.015 * weight_sum - spent)
            out.append(t.r * t.a if t.a * (t.r - 1) <= 0 or moved <= allowed else 0.0)
            spent, weight_sum = spent + moved, weight_sum + weight
    return out


def bapo(tokens: list[Token]) -> list[float]:
    """Algorithm 1 of the paper with equation 8, recomputed at every step."""
    low, high = 0.6, 1.2

    def share() -> float:
        gains = sum(min(t.r, high) * t.a for t in tokens if t.a > 0)
        return gains / (gains + sum(max(t.r, low) * -t.a for t in tokens if t.a < 0))

    while share() < 0.4 and low + 0.02 <= 0.9 + 1e-9:
        if high + 0.05 <= 3.0 + 1e-9:
            high += 0.05
        else:
            low += 0.02
    return clipped(lambda p: low, lambda p: high)(tokens)


def gec(tokens: list[Token]) -> list[float]:
    """PPO's interval with an upper threshold of 0.5 - 0.25 times the new probability."""
    return clipped_by([(0.2, 0.5 - 0.25 * t.r * t.p) for t in tokens], tokens)


def clipped_by(thresholds: list[tuple[float, float]], tokens: list[Token]) -> list[float]:
    """PPO's min(r A, clip(r) A) with a pair of thresholds for each token."""
    return [
        0.0 if (t.a > 0 and t.r > 1 + high) or (t.a < 0 and t.r < 1 - low) else t.r * t.a
        for t, (low, high) in zip(tokens, thresholds, strict=True)
    ]


def acpo(tokens: list[Token]) -> list[float]:
    """0.2 + 3 standard deviations of the ratios in each fifth of new probabilities, at most 3."""
    groups = [min(int(t.r * t.p * 5), 4) for t in tokens]
    ratios = [[t.r for t, group in zip(tokens, groups, strict=True) if group == k] for k in range(5)]
    widths = [min(0.2 + 3 * math.sqrt(statistics.pvariance(of_group) + 1e-8), 3) for of_group in ratios]
    return clipped_by([(widths[group], widths[group]) for group in groups], tokens)


def mhpo(r: Tensor, constant: Tensor, a: float, p: float) -> Tensor:
    bent = 1.5 * torch.tanh(constant.log() / 1.5)
    hazard = torch.log(1 + bent.exp()) ** 1.5 + (torch.log(1 + (-bent).exp()) / 0.8) ** 2
    return torch.exp(1.5 * torch.tanh(r.log() / 1.5) - hazard) * a


def dgpo(r: Tensor, constant: Tensor, a: float, p: float) -> Tensor:
    """W A pi, with the constants that make W continuous at pi = 0.8 p and 1.2 p, n 1 and m 2."""
    pi = constant * p
    if constant < 0.8 and a < 0:
        return 0.8**-1 * p**-2 * pi * a * r * p
    if constant > 1.2 and a > 0:
        return 1.2**0.5 * p**-0.5 * pi**-0.5 * a * r * p
    return 1 / p * a * r * p


def m2po(tokens: list[Token]) -> list[float]:
    """Algorithm 1 of the paper: the largest goes until the mean is small."""
    region = sorted((math.log(t.r) ** 2, i) for i, t in enumerate(tokens) if t.leaving)
    while region and sum(m for m, _ in region) / len(region) > 0.04:
        region.pop()
    kept = {i for _, i in region}
    return [t.r * t.a if i in kept or not t.leaving else 0.0 for i, t in enumerate(tokens)]


def covariances(tokens: list[Token]) -> list[float]:
    """Equation 10 of arXiv 2505.22617."""
    mean = sum(t.logprob for t in tokens) / len(tokens)
    mean_a = sum(t.a for t in tokens) / len(tokens)
    return [(t.logprob - mean) * (t.a - mean_a) for t in tokens]


def kl_cov(tokens: list[Token]) -> list[float]:
    cov = covariances(tokens)
    largest = sorted(cov)[-math.ceil(2e-4 * len(tokens)) :]
    return [
        t.r * t.a - (c in largest) * (1 if t.r > 1 else -1 if t.r < 1 else 0) for t, c in zip(tokens, cov, strict=True)
    ]


def gppo(beta_low: float, beta_high: float) -> Callable[[list[Token]], list[float]]:
    def of(r: Tensor, constant: Tensor, a: float, p: float) -> Tensor:
        if constant < 0.8 and a < 0:
            return beta_low * 0.8 / constant * r * a
        if constant > 1.2 and a > 0:
            return beta_high * 1.2 / constant * r * a
        return r * a

    return slope(of)


PAPER: dict[str, Callable[[list[Token]], list[float]]] = {
    "fixed": slope(lambda r, _, a, p: torch.minimum(r * a, r.clamp(0.8, 1.2) * a) if a else r * 0),
    "none": slope(lambda r, _, a, p: r * a),
    "band": clipped(band_low, band_high),
    "band_asymmetric": clipped(band_low, band_high),
    "band_relaxed": clipped(lambda p: min(band_low(p), 0.8), lambda p: max(band_high(p), 1.28)),
    "dcpo": clipped(
        lambda p: 0.5 + 0.5 * math.sqrt(max(1 - 4 * 0.16 / p, 0)),
        lambda p: min(0.5 + 0.5 * math.sqrt(1 + 4 * 0.2 / p), 10),
    ),
    "ripo": clipped(lambda p: max(1 - math.sqrt(0.05 / p), 0.5), lambda p: min(1 + math.sqrt(0.05 / p), 10)),
    "atr": clipped(
        lambda p: bisected(lambda r: k3(r) <= 0.03, 1, 1e-9), lambda p: bisected(lambda r: k3(r) <= 0.03, 1, 9)
    ),
    "gec": gec,
    "bapo": bapo,
    "acpo": acpo,
    "dppo_tv": masked(lambda p, x: abs(x - p), 0.2, 20.0),
    "dppo_kl": masked(binary_kl, 0.05, 20.0),
    "cppo": cppo,
    "abc": slope(lambda r, _, a, p: r.clamp(0.8, 1.2) * a),
    "up": slope(lambda r, _, a, p: r / r.detach() * a if a > 0 else torch.minimum(r * a, r.clamp(min=0.8) * a)),
    "sapo": slope(lambda r, _, a, p: 4 / (t := 1.0 if a > 0 else 1.05) * torch.sigmoid(t * (r - 1)) * a),
    "gppo": gppo(1.0, 1.0),
    "mhpo": slope(mhpo),
    "ce_gppo": gppo(0.75, 1.0),
    "dgpo": slope(dgpo),
    "cfpo": slope(lambda r, _, a, p: r * a - abs(a) / (2 * 0.2) * (r - 1) ** 2),
    "drpo": slope(lambda r, _, a, p: r * a - abs(a) / (2 * 12.5) * p * (r - 1) ** 2),
    "pspo": slope(lambda r, _, a, p: ((1 - 0.1) * r + 0.1) * a),
    "m2po": m2po,
    "kl_cov": kl_cov,
}


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"clip_cov"}))
def test_the_gradient_of_every_rule_is_that_of_its_paper(name: str):
    view = made_up_view(torch.float64)
    wanted = torch.tensor(PAPER[name](tokens_of(view)), dtype=torch.float64)
    torch.testing.assert_close(push(rule_of(name), view), wanted, rtol=1e-6, atol=1e-9)


def test_clip_cov_drops_its_share_of_those_with_a_large_covariance_by_chance():
    """Equations 10-12: the candidates exactly, the chosen ones in number and without a pattern."""
    view = made_up_view(torch.float64)
    cov = covariances(tokens_of(view))
    unclipped = [0 <= t.r <= 2 or not t.leaving for t in tokens_of(view)]
    candidates = torch.tensor([1 < c < 5 and u for c, u in zip(cov, unclipped, strict=True)])
    base = [t.r * t.a if u else 0.0 for t, u in zip(tokens_of(view), unclipped, strict=True)]
    torch.testing.assert_close(covariance(with_totals(rule_of("clip_cov"), view)).tolist(), cov)
    everything = push(rule_of("clip_cov", share=1.0), view)
    assert torch.equal(everything == 0, candidates | (torch.tensor(base) == 0))
    torch.testing.assert_close(push(rule_of("clip_cov", share=0.0), view).tolist(), base)

    narrow = with_totals(rule_of("clip_cov", clip_low=0.2, clip_high=0.2), view).totals["candidates"].item()
    inside = [0.8 <= t.r <= 1.2 or not t.leaving for t in tokens_of(view)]
    assert narrow == sum(1 < c < 5 and i for c, i in zip(cov, inside, strict=True)) < candidates.sum()
    half = candidates.sum().item() / len(cov) / 2
    dropped = []
    for update in range(200):
        got = push(rule_of("clip_cov", share=half), replace(view, update=update))
        chosen = (got == 0) & candidates & (view.advantages != 0)
        assert torch.equal(got[~chosen], torch.tensor(base, dtype=torch.float64)[~chosen])
        dropped.append(chosen[candidates & (view.advantages != 0)])
    shares = torch.stack(dropped).double()  # (updates, candidates)
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (shares.mean(0) - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(200)  # every one of them, in half of the updates
    assert (shares.mean(1) - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(shares.shape[1])


def test_kl_cov_takes_its_share_where_many_covariances_are_about_equal():
    """Nearly sure tokens of one response are in one bin: 30 of 100 are wanted, and 10 are alone above them."""
    spread = torch.linspace(-0.001, -0.0009, 90, dtype=torch.float64)
    old = torch.cat([spread, torch.linspace(-3, -2, 10, dtype=torch.float64)])
    advantages = torch.where(old > -1, 1.0, -1.0).double()
    lengths = torch.tensor([90, 10])
    view = View((old + 0.1).requires_grad_(), old, advantages, old, lengths, torch.arange(2))
    rule = rule_of("kl_cov", share=0.3)
    cov = covariance(with_totals(rule, view))
    assert cov[:90].max() / cov[:90].min() < 1.001 and cov[90:].min() > 2 * cov[:90].max()

    def penalised(update: int) -> Tensor:
        return push(rule, replace(view, update=update)) - view.ratio * advantages < -0.5

    chosen = torch.stack([penalised(update) for update in range(400)])
    assert chosen[:, 90:].all()
    shares = chosen[:, :90].double().mean(0)
    assert shares.mean().item() == pytest.approx(20 / 90, abs=0.01)
    assert (shares - 20 / 90).abs().max() < 4.5 * math.sqrt(0.22 * 0.78 / 400)  # each in its turn


def test_gec_in_its_second_phase():
    view = made_up_view(torch.float64)
    rule = rule_of("gec", high_at_0=0.2, high_slope=0.0, low_at_0=0.3, low_slope=-0.13)
    tokens = tokens_of(view)
    wanted = clipped_by([(0.3 - 0.13 * t.r * t.p, 0.2) for t in tokens], tokens)
    torch.testing.assert_close(push(rule, view).tolist(), wanted)
    assert check_rule(rule) == "interval"


def test_acpo_by_hand():
    """Two rare tokens at r = 1 +- 0.1 and two sure ones at 1: widths 0.2 + 3 x 0.1 and, but for the 1e-8, 0.2."""
    p = torch.tensor([0.1, 0.1, 0.9, 0.9], dtype=torch.float64)
    r = torch.tensor([0.9, 1.1, 1.0, 1.0], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.int64)
    view = View((p * r).log().requires_grad_(), p.log(), torch.ones_like(p), p, lengths=4 * one, numbers=one)
    rule = rule_of("acpo")
    lower, upper = rule(with_totals(rule, view))
    assert upper.tolist() == pytest.approx([1.5, 1.5, 1.2003, 1.2003]), upper
    assert lower.tolist() == pytest.approx([0.5, 0.5, 0.7997, 0.7997]), lower


def test_cppo_by_hand():
    """A response of three tokens, p = 1/2, weights 1, 0.9, 0.8: how far may each move?"""
    half = torch.full((3,), 0.5, dtype=torch.float64)

    def cut(*moved: float) -> list[bool]:
        new = (half + torch.tensor(moved, dtype=torch.float64)).log().requires_grad_()
        one = torch.ones(1, dtype=torch.int64)
        view = View(new, half.log(), torch.ones_like(half), half, lengths=3 * one, numbers=one)
        return clipped_loss(rule_of("cppo"), view, **PPO).cut.tolist()

    assert cut(0.149, 0.0, 0.0) == [False] * 3 and cut(0.151, 0.0, 0.0) == [True, False, False]
    assert cut(0.0, 0.166, 0.0) == [False] * 3 and cut(0.0, 0.167, 0.0) == [False, True, False]  # 0.15 / 0.9
    assert cut(0.0, 0.0, 0.187) == [False] * 3 and cut(0.0, 0.0, 0.188) == [False, False, True]  # 0.15 / 0.8
    # After 0.1 the budget of the second is 0.15 + 0.015 - 0.1 = 0.065, over 0.9: 0.0722.
    assert cut(0.1, 0.072, 0.0) == [False] * 3 and cut(0.1, 0.073, 0.0) == [False, True, False]


def test_atr_solves_for_both_bounds():
    view = made_up_view(torch.float64)
    for delta in (1e-4, 0.03, 2.0):
        lower, upper = rule_of("atr", delta=delta)(view)
        assert lower[0].item() == pytest.approx(bisected(lambda r, d=delta: k3(r) <= d, 1, 1e-9), rel=1e-9)
        assert upper[0].item() == pytest.approx(bisected(lambda r, d=delta: k3(r) <= d, 1, 99), rel=1e-9)


def test_bapo_stops_at_the_first_bound_that_balances():
    view = made_up_view(torch.float64)
    tokens = tokens_of(view)
    losses = sum(max(t.r, 0.6) * -t.a for t in tokens if t.a < 0)

    def share(high: float) -> float:
        gains = sum(min(t.r, high) * t.a for t in tokens if t.a > 0)
        return gains / (gains + losses)

    def bounds(target: float) -> list[float]:
        rule = rule_of("bapo", target=target)
        return [bound[0].item() for bound in rule(with_totals(rule, view))]

    for steps in (0, 1, 17, 36):
        high = 1.2 + 0.05 * steps
        assert bounds(share(high) - 1e-9) == pytest.approx([0.6, high])
    assert bounds(share(3.0) + 1e-9) == pytest.approx([0.9, 3.0])


def test_every_rule_has_a_second_formula_and_a_docstring_with_its_source():
    assert PAPER.keys() | {"clip_cov"} == RULES.keys() and len(RULES) >= 20
    for name, rule in RULES.items():
        text = rule.function.__doc__ or ""
        assert re.search(r"\n    w = .+(\n        .+)*\n    Source: .+\n    Checked: .+\n    $", text), name
        assert re.search(r"arXiv \d{4}\.\d{5}", text), name
        assert all(value is not ... for value in rule.defaults.values()) or name in NO_DEFAULT, name


# ---- limits ----


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_ratio_of_one_is_never_cut(name: str):
    view = made_up_view(torch.float64)
    view = replace(view, logprobs=view.old_logprobs.clone().requires_grad_())
    factor = {"pspo": 0.9, "mhpo": math.exp(-(math.log(2) ** 1.5) - (math.log(2) / 0.8) ** 2)}.get(name, 1.0)
    torch.testing.assert_close(
        push(rule_of(name, **({"share": 0.0} if name == "clip_cov" else {})), view), factor * view.advantages
    )


SAME = [
    ("dppo_kl", {"ratio_cap": None}, "band", {"ratio_cap": None}),
    ("dppo_tv", {"ratio_cap": None}, "band", {"ratio_cap": None, "divergence": "tv", "delta": 0.2}),
    ("band_asymmetric", {"delta_low": 0.1, "delta_high": 0.1}, "band", {"delta": 0.1}),
    ("dppo_kl", {"delta_low": 0.2, "ratio_cap": None}, "band_asymmetric", {"delta_low": 0.2, "ratio_cap": None}),
    ("cppo", {"weight_floor": 1.0, "prefix_delta": 1.0}, "dppo_tv", {"delta_low": 0.15, "delta_high": 0.15}),
    ("gppo", {"beta_low": 0.0, "beta_high": 0.0}, "fixed", {}),
    ("ce_gppo", {"beta_low": 1.0}, "gppo", {}),
    ("abc", {"low_gain": 1.0, "high_loss": 1e9}, "fixed", {}),
    ("band_relaxed", {"delta": 1e-9}, "fixed", {"clip_high": 0.28}),
    ("band_relaxed", {"clip_low": 0.0, "clip_high": 0.0}, "band", {}),
    ("gec", {"high_at_0": 0.28, "high_slope": 0.0}, "fixed", {"clip_high": 0.28}),
    ("acpo", {"alpha": 0.0}, "fixed", {}),
    ("acpo", {"clip_min": 9.0, "clip_max": 1e9}, "none", {}),
    ("dgpo", {"n": -1.0, "m": 1.0}, "gppo", {}),
    ("dgpo", {"n": 0.0, "m": 1e12}, "none", {}),
    ("mhpo", {"c": 1e9, "lambda_positive": 1e30, "lambda_negative": 1e30}, "none", {}),
    ("bapo", {"low_to": 0.6, "high_to": 1.2}, "fixed", {"clip_low": 0.4}),
    ("bapo", {"target": 0.0}, "fixed", {"clip_low": 0.4}),
    ("bapo", {"target": 1.0}, "fixed", {"clip_low": 0.1, "clip_high": 2.0}),
    ("m2po", {"threshold": 1e9}, "none", {}),
    ("cfpo", {"epsilon": 1e12}, "none", {}),
    ("drpo", {"delta": 1e12}, "none", {}),
    ("pspo", {"alpha": 0.0}, "none", {}),
    ("kl_cov", {"coefficient": 0.0}, "none", {}),
    ("clip_cov", {"share": 0.0, "clip_low": 0.2, "clip_high": 0.2}, "fixed", {}),
]


@pytest.mark.parametrize(("one", "given", "other", "given_other"), SAME)
def test_rules_that_are_one_in_a_limit(one: str, given: dict, other: str, given_other: dict):
    view = made_up_view(torch.float64)
    got = push(rule_of(one, **given), view)
    torch.testing.assert_close(got, push(rule_of(other, **given_other), view), rtol=1e-9, atol=1e-9)
    assert not torch.equal(got, push(rule_of("up"), view))  # the comparison can fail


def test_small_radii_meet():
    """k3(1 + x) = x^2 / 2 + ..., and chi2 on a rare token is p x^2: where rules of different form touch."""
    view = made_up_view(torch.float64)
    lower, upper = rule_of("atr", delta=1e-6)(view)
    torch.testing.assert_close(upper - 1, torch.full_like(upper, math.sqrt(2e-6)), rtol=1e-3, atol=0)
    torch.testing.assert_close(1 - lower, torch.full_like(upper, math.sqrt(2e-6)), rtol=1e-3, atol=0)
    rare = replace(view, old_logprobs=torch.full_like(view.old_logprobs, -12.0))
    ripo, chi2 = rule_of("ripo", ratio_cap=None)(rare), rule_of("band", divergence="chi2", ratio_cap=None)(rare)
    torch.testing.assert_close(ripo[1], chi2[1], rtol=1e-4, atol=0)


def test_a_radius_of_every_token_is_that_of_each_alone():
    view = made_up_view(torch.float64)
    radii = torch.as_tensor(token_radius(view.entropy, delta=0.05, radius="entropy", mean_entropy=0.5))
    for name in ("band", "band_relaxed", "atr", "drpo", "cppo"):
        rule = rule_of(name)
        at_once = clipped_loss(rule, view, delta=radii, **PPO).weights
        for value in (radii.min(), radii.max()):
            alone = clipped_loss(rule, view, delta=value.item(), **PPO).weights
            torch.testing.assert_close(at_once[radii == value], alone[radii == value])
    assert torch.equal(rule_of("band", delta=0.2)(view)[1], rule_of("band")(view, delta=0.2)[1])


# ---- sums over the update ----


def part_of(view: View, sequences: list[int]) -> View:
    """Some sequences of a view, in any order."""
    pieces = {k: list(torch.arange(len(view.p)).split(view.lengths.tolist()))[k] for k in sequences}
    index = torch.cat([pieces[k] for k in sequences])
    tensors = {name: getattr(view, name)[index] for name in ("logprobs", "old_logprobs", "advantages", "entropy")}
    return replace(view, **tensors, lengths=view.lengths[sequences], numbers=view.numbers[sequences])


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_gradient_does_not_depend_on_how_an_update_is_cut(name: str):
    rule = rule_of(name, **({"share": 0.05} if name.endswith("_cov") else {}))
    view = made_up_view(torch.float64)
    wanted = push(rule, view)
    parts = [part_of(view, chosen) for chosen in ([3, 0], [4], [2, 1])]

    calls = []
    found = totals(rule, parts, lambda sums: (calls.append(sums), sums)[1], surrogate="ppo")
    assert len(calls) == len(rule.sums)
    losses = torch.stack([clipped_loss(rule, replace(part, totals=found), **PPO).losses.sum() for part in parts])
    got = -torch.autograd.grad(losses.sum(), view.logprobs)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(got == 0, wanted == 0)


def test_sums_are_added_over_ranks_round_by_round():
    view, rule = made_up_view(torch.float64), rule_of("kl_cov")
    alone = totals(rule, [view], lambda sums: sums, surrogate="ppo")
    twins = totals(rule, [view], lambda sums: {key: 2 * value for key, value in sums.items()}, surrogate="ppo")
    # Two ranks with the same tokens: twice the sums, and the second round saw the means of both.
    assert twins.keys() == alone.keys() and all(torch.equal(twins[key], 2 * alone[key]) for key in alone)


# ---- today's rules through the interface ----

TODAY = {
    "fixed": {"clip_low": 0.2, "clip_high": 0.28},
    "band": {"delta": 0.05, "divergence": "kl", "ratio_cap": 10.0},
    "band_relaxed": {"delta": 0.05, "divergence": "tv", "ratio_cap": 10.0, "clip_low": 0.2, "clip_high": 0.28},
    "dcpo": {"clip_low": 0.16, "clip_high": 0.2, "ratio_cap": 10.0},
    "none": {},
}


@pytest.mark.parametrize("surrogate", ["ppo", "cispo", "gspo"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("name", TODAY)
def test_intervals_give_the_numbers_of_the_clipped_objective_bit_for_bit(name: str, surrogate: str, dual_clip: float):
    view = made_up_view()
    lower, upper = rule_of(name, **TODAY[name])(view)  # type: ignore[misc]
    judged = view.logprobs
    if surrogate == "gspo":
        judged = sequence_logprobs(view.logprobs, view.old_logprobs, view.lengths)
    loss = policy_loss(
        judged, view.old_logprobs, view.advantages, lower, upper, dual_clip=dual_clip, surrogate=surrogate
    )

    result = clipped_loss(rule_of(name, **TODAY[name]), view, surrogate=surrogate, dual_clip=dual_clip)
    assert torch.equal(result.losses, loss)
    grads = [torch.autograd.grad(x.sum(), view.logprobs)[0] for x in (result.losses, loss)]
    assert torch.equal(*grads)
    torch.testing.assert_close(-grads[0], result.weights * view.advantages)
    assert result.statistics(view).summary()["clip/weight_mean"] == pytest.approx(result.weights.mean().item())


def test_tokens_of_weight_zero_count_as_cut():
    view = made_up_view(torch.float64)
    for name in ("abc", "dppo_kl", "m2po"):
        result = clipped_loss(rule_of(name), with_totals(rule_of(name), view), **PPO)
        got, summary = push(rule_of(name), view), result.statistics(view).summary()
        for metric, side in (("clip/up", view.advantages > 0), ("clip/down", view.advantages < 0)):
            assert (
                summary[metric] == pytest.approx(((got == 0) & side).sum().item() / side.sum().item())
                and summary[metric]
            )
        without = ((got == 0) & (view.advantages != 0)).sum().item()
        assert summary["clip/fraction"] == pytest.approx(without / len(got)) and "band/lower_mean" not in summary
    assert clipped_loss(rule_of("sapo"), view, **PPO).statistics(view).summary()["clip/fraction"] == 0


def test_dual_clip_bounds_every_rule_and_gspo_shows_it_the_ratio_of_the_sequence():
    view = made_up_view(torch.float64)
    got, free = push(rule_of("gppo"), view, dual_clip=2.0), push(rule_of("gppo"), view)
    above = (view.advantages < 0) & (view.ratio > 2)
    assert above.any() and torch.equal(got, torch.where(above, 0.0, free))
    sequence = push(rule_of("gppo"), view, surrogate="gspo")
    gaps = (view.logprobs - view.old_logprobs).detach().split(view.lengths.tolist())
    mean = torch.cat([gap.mean().exp().expand(len(gap)) for gap in gaps])
    a = view.advantages
    wanted = torch.where((a > 0) & (mean > 1.2), 1.2, torch.where((a < 0) & (mean < 0.8), 0.8, mean)) * a
    torch.testing.assert_close(sequence, wanted)
    rule = rule_of("m2po", threshold=0.01)
    sums = totals(rule, [view], lambda sums: sums, surrogate="gspo")
    judged = replace(view, logprobs=view.old_logprobs + mean.log())  # as tokens that have the ratio of their sequence
    alone = clipped_loss(rule, with_totals(rule, judged), **PPO)
    together = clipped_loss(rule, replace(view, totals=sums), surrogate="gspo", dual_clip=None)
    assert torch.equal(together.cut, alone.cut) and 0 < together.cut.sum() < alone.ratio.ne(1).sum()
    with pytest.raises(ValueError, match="cispo.*rule gppo gives weights; use ppo or gspo"):
        clipped_loss(rule_of("gppo"), view, surrogate="cispo", dual_clip=None)


def test_a_far_token_stays_finite():
    view = made_up_view()
    far = replace(view, old_logprobs=torch.where(view.position == 0, -300.0, view.old_logprobs))
    for name in RULES:
        rule = rule_of(name)
        assert clipped_loss(rule, with_totals(rule, far), **PPO).losses.isfinite().all(), name


def test_a_broken_token_does_not_hide():
    view = made_up_view()
    broken = replace(view, logprobs=torch.where(view.position == 0, math.nan, view.logprobs))
    for name in RULES.keys() - {
        "kl_cov",
        "clip_cov",
        "bapo",
        "acpo",
    }:  # one broken token breaks their sums, so all losses
        rule = rule_of(name)
        losses = clipped_loss(rule, with_totals(rule, broken), **PPO).losses
        assert losses[view.position == 0].isnan().all() and losses[view.position > 1].isfinite().any(), name


# ---- one's own, and mistakes ----


def test_views_know_positions_and_sequences():
    view = made_up_view()
    assert view.position.tolist() == [0, 0, 1, *range(40), *range(100), *range(150)]
    assert view.sequence.tolist() == [0, 1, 1, *[2] * 40, *[3] * 100, *[4] * 150]


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_published_rule_passes_the_check(name: str):
    assert check_rule(rule_of(name)) == ("interval" if name in INTERVALS else "weight")


MINE = """
import torch
from bandpo.rule import Rule

WIDTH = 0.5

def soft(view, *, width=0.3, kind="plain"):
    return view.ratio * torch.exp(-width * view.log_ratio.square())

def by_entropy(view, *, width=0.3):
    return 1 - width * view.entropy.clamp(max=1), 1 + width * view.entropy

def mean_ratio(view, *, power=1.0):
    return {"r": view.ratio.sum(), "n": torch.ones_like(view.p).sum()}

def against_mean(view, *, power=1.0):
    return (view.ratio * view.totals["n"] / view.totals["r"]) ** power

against_mean = Rule("against_mean", against_mean, (mean_ratio,))

def anything(view, **options): return view.ratio
def two(view, other): return view.ratio
def needy(view, *, level): return view.ratio * level
"""


@pytest.fixture
def my_file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def test_a_rule_of_ones_own(my_file: str):
    view = made_up_view(torch.float64)
    soft = load_rule(f"{my_file}:soft", {"width": 2})
    assert check_rule(soft) == "weight" and soft.defaults == {"width": 0.3, "kind": "plain"}
    wanted = view.ratio * torch.exp(-2 * view.ratio.log() ** 2) * view.advantages
    torch.testing.assert_close(push(soft, view), wanted)
    assert check_rule(load_rule(f"{my_file}:by_entropy", {})) == "interval"
    mean = load_rule(f"{my_file}:against_mean", {"power": 2.0})
    assert check_rule(mean) == "weight"
    torch.testing.assert_close(push(mean, view), (view.ratio / view.ratio.mean()) ** 2 * view.advantages)


MISTAKES = [
    ("bend", {}, r"rule 'bend' is not known; use FILE.py:FUNCTION, or one of abc, acpo, atr, band, .*, up$"),
    ("nowhere/mine.py:soft", {}, "nowhere/mine.py cannot be read: No such file"),
    ("MINE:sofd", {}, "has no function sofd; it has soft, by_entropy, mean_ratio, "),
    ("MINE:WIDTH", {}, "has no function WIDTH"),
    ("MINE:anything", {}, r"a rule is `def anything\(view, \*, parameter=value, ...\)`"),
    ("MINE:two", {}, r"a rule is `def two\(view"),
    ("MINE:needy", {}, "level has no published value; give one"),
    ("MINE:soft", {"widht": 1.0}, r"'widht' is no parameter of it; its parameters: width \(0.3\), kind \(plain\)"),
    ("MINE:soft", {"kind": 1.0}, r"kind is 1.0; use a word \(published: plain\)"),
    ("sapo", {"tau": 1.0}, r"'tau' is no parameter of it; its parameters: tau_positive \(1.0\), tau_negative \(1.05\)"),
    ("sapo", {"tau_positive": "1"}, "tau_positive is '1'; use a number"),
    ("sapo", {"tau_positive": True}, "tau_positive is True; use a number"),
    ("none", {"delta": 1.0}, "its parameters: none"),
    ("atr", {}, "atr: delta has no published value; give one"),
]


@pytest.mark.parametrize(("name", "parameters", "message"), MISTAKES)
def test_mistakes_in_names_and_parameters_say_what_there_is(my_file: str, name: str, parameters: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load_rule(name.replace("MINE", my_file), parameters)


WRONG: dict[str, tuple[Callable[[View], object], str]] = {
    "a number": (lambda view: 1.0, "w is a float; return a tensor"),
    "one value": (lambda view: view.ratio.mean(), r"shape \(\) for 293 tokens"),
    "double": (lambda view: view.ratio.double(), "w is torch.float64 .* of the same dtype"),
    "three": (lambda view: (view.ratio, view.ratio, view.ratio), "3 values; return"),
    "not finite": (lambda view: 1 / (view.ratio - 1), r"w is inf at r 1, p .*, A .*; it must be finite"),
    "nan": (lambda view: (view.ratio - 1).sqrt(), "w is nan at r 0"),
    "without one": (lambda view: (view.ratio * 0 + 1.1, view.ratio * 0 + 2), r"interval \[1.1, 2\] does not hold"),
    "swapped": (lambda view: (view.ratio * 0 + 1.2, view.ratio * 0 + 0.8), "does not hold 0 <= lower <= 1 <= upper"),
    "negative": (lambda view: (view.ratio * 0 - 0.1, view.ratio * 0 + 2), "does not hold 0 <= lower"),
    "infinite lower": (lambda view: (view.ratio * 0 - math.inf, view.ratio), "lower is nan|lower is -inf"),
    "gradient": (lambda view: (view.logprobs - view.old_logprobs).exp(), "w has a gradient; .* view.ratio, or .detach"),
    "idle penalty": (lambda view: WithPenalty(view.ratio, view.ratio), "penalty has no gradient and does nothing"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_what_is_no_rule_is_told_before_training(mistake: str):
    function, message = WRONG[mistake]
    with pytest.raises(ValueError, match=f"rule mine: .*{message}"):
        check_rule(Rule("mine", function))  # type: ignore[arg-type]


def test_sums_ask_for_parameters_of_their_rule():
    def sums(view: View, *, widht: float) -> dict[str, Tensor]:
        return {"sum": widht * view.ratio.sum()}

    with pytest.raises(ValueError, match="rule mine: its sums ask for widht, no parameter of the rule"):
        Rule("mine", lambda view, *, width=1.0: view.ratio, (sums,))


@pytest.mark.parametrize("name", sorted(RULES))
def test_nothing_is_read_back(name: str):
    """On the meta device there are no values: whatever reads one raises."""
    made_up = made_up_view()
    tensors = {key: value.to("meta") for key, value in vars(made_up).items() if isinstance(value, Tensor)}
    view = replace(made_up, **tensors)
    rule = rule_of(name)
    view = with_totals(rule, view)
    for surrogate in ("ppo", "gspo"):
        clipped_loss(rule, view, surrogate=surrogate, dual_clip=10.0).statistics(view)


# ---- advantages ----


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert group_advantages(rewards, "maxrl").tolist() == [[3.0, -1.0, -1.0, -1.0], [0.0] * 4, [0.0] * 4]
    assert group_advantages(rewards, "group_mean")[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(rewards, "rloo")[0].tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert group_advantages(rewards, "group_std")[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    with pytest.raises(ValueError, match="maxrl .* a reward is -1; use reward_wrong: 0"):
        group_advantages(2 * rewards - 1, "maxrl")
    with pytest.raises(ValueError, match="advantage: 'max'.*group_std, group_mean, rloo or maxrl"):
        group_advantages(rewards, "max")


# ---- the page and the picture ----


def test_the_table_of_rules_is_up_to_date():
    page = (ROOT / "docs" / "rules.md").read_text()
    assert with_table(page) == page, "run: python -m bandpo.plot --table docs/rules.md"
    assert re.findall(r"^\| `(\w+)` \| .+ \| .+ \| .+ \| .+ \| .+ \|$", page, re.MULTILINE)[: len(RULES)] == list(RULES)


def test_the_examples_of_the_page_are_rules(tmp_path: Path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rules.md").read_text(), re.DOTALL)
    (tmp_path / "my_rule.py").write_text("from bandpo.rule import Rule\n" + "\n".join(b for b in blocks if "def " in b))
    names = re.findall(r"def (\w+)\(view, \*", "".join(blocks))
    kinds = [check_rule(load_rule(f"{tmp_path / 'my_rule.py'}:{name}", {})) for name in names]
    assert (names, kinds) == (["soft_band", "by_spread"], ["weight", "interval"])


def test_the_picture_shows_what_is_left_of_the_gradient():
    ratios = RATIOS[:, None].expand(len(RATIOS), len(PROBABILITIES))
    possible = ratios * PROBABILITIES < 0.99
    up, down = kept(rule_of("fixed"), 1.0), kept(rule_of("fixed"), -1.0)
    assert torch.equal((up > 0.5)[possible], (ratios <= 1.2)[possible])
    assert torch.equal((down > 0.5)[possible], (ratios >= 0.8)[possible])
    torch.testing.assert_close(kept(rule_of("cfpo"), 1.0)[possible], (1 - (ratios - 1) / 0.2)[possible])
