"""Clipping rules: every gradient against a second, independent form, limits, inputs, errors, and the page."""

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bandpo.rule import RULES, Rule, check_rule, load_rule, sequence_sum, synthetic_batch
from bandpo.rules import select_largest
from configs.names import RULES as RULES_WITHOUT_FILE
from configs.names import stems

BOUNDS = {"fixed", "none", "band", "band_relaxed", "band_asymmetric", "dcpo", "ripo", "bapo", "acpo", "m2po"}
NAMES = sorted(RULES)


def batch_of(ratio: list[float], advantages: list[float], p: float = 0.5, lengths: list[int] | None = None) -> dict:
    """float64 inputs of a rule: tokens with these ratios and this old probability, by default of one sequence."""
    old = torch.full((len(ratio),), math.log(p), dtype=torch.float64)
    values = torch.tensor(ratio, dtype=torch.float64)
    ids = torch.repeat_interleave(torch.tensor(lengths or [len(ratio)]))
    A = torch.tensor(advantages, dtype=torch.float64)
    return {
        "logprobs": old + values.log(), "old_logprobs": old, "advantages": A, "entropy": 0 * old, "sequence_ids": ids
    }  # fmt: skip


def weights(rule: Rule, batch: dict[str, Tensor]) -> Tensor:
    """(T,) w of w A grad log pi; for bounds by differentiation of PPO's min(r A, clip(r) A)."""
    result = rule(**batch)
    if isinstance(result, Tensor):
        return result
    A = torch.where(batch["advantages"] == 0, 1e-3, batch["advantages"])
    logprobs = batch["logprobs"].clone().requires_grad_()
    ratio = (logprobs - batch["old_logprobs"]).clamp(-20, 20).exp()
    objective = torch.minimum(ratio * A, ratio.clamp(*result) * A) / A
    return torch.autograd.grad(objective.sum(), logprobs)[0]


def gradient(name: str, batch: dict[str, Tensor], **parameters: Any) -> Tensor:
    """(T,) w A."""
    return weights(load_rule(name, parameters), batch) * batch["advantages"]


def is_zero(name: str, batch: dict[str, Tensor], **parameters: Any) -> list[bool]:
    return (weights(load_rule(name, parameters), batch) == 0).tolist()


# ---- every rule against its paper ----
# PAPER[name](tokens) is the list of w A, from the paper's objective, per token, with parameters as numbers.


@dataclass(frozen=True)
class Token:
    r: float
    p: float
    a: float
    logprob: float
    sequence: int

    @property
    def moves_away(self) -> bool:
        return (self.a > 0 and self.r > 1) or (self.a < 0 and self.r < 1)


Form = Callable[[list[Token]], list[float]]


def tokens_of(batch: dict[str, Tensor]) -> list[Token]:
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp()
    columns = (ratio, batch["old_logprobs"].exp(), batch["advantages"], batch["logprobs"], batch["sequence_ids"])
    return [Token(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def objective(of_token: Callable[[Tensor, Tensor, float, float], Tensor]) -> Form:
    """w A of an objective (r, r without gradient, A, p) of single tokens: r dJ/dr."""

    def form(tokens: list[Token]) -> list[float]:
        out = []
        for t in tokens:
            r = torch.tensor(t.r, dtype=torch.float64, requires_grad=True)
            value = of_token(r, r.detach(), t.a, t.p)
            out.append(t.r * torch.autograd.grad(value, r)[0].item() if value.requires_grad else 0.0)
        return out

    return form


def clip(low: Callable[[float], float], high: Callable[[float], float]) -> Form:
    """PPO's min(r A, clip(r) A) with bounds that are functions of p."""

    def form(tokens: list[Token]) -> list[float]:
        return [0.0 if (t.a > 0 and t.r > high(t.p)) or (t.a < 0 and t.r < low(t.p)) else t.r * t.a for t in tokens]

    return form


def bisect(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """The end of the interval in which `holds` is true."""
    for _ in range(200):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def binary_kl(p: float, x: float) -> float:
    if x >= 1:
        return math.inf
    return -p * math.log(max(x, 1e-300) / p) - (1 - p) * math.log((1 - x) / (1 - p))


def band_low(p: float) -> float:
    return bisect(lambda r: binary_kl(p, r * p) <= 0.05, 1, 0)


def band_high(p: float) -> float:
    return min(bisect(lambda r: binary_kl(p, r * p) <= 0.05, 1, 1 / p), 10)


def mask(divergence: Callable[[float, float], float], delta: float) -> Form:
    def form(tokens: list[Token]) -> list[float]:
        return [0.0 if t.moves_away and divergence(t.p, t.r * t.p) > delta else t.r * t.a for t in tokens]

    return form


def cppo(tokens: list[Token]) -> list[float]:
    """Algorithm 1 of the paper, response by response."""
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
    return clip(lambda p: low, lambda p: high)(tokens)


def acpo(tokens: list[Token]) -> list[float]:
    """0.2 + 3 standard deviations of the ratios in each fifth of new probabilities, at most 3."""
    groups = [min(int(t.r * t.p * 5), 4) for t in tokens]
    ratios = [[t.r for t, group in zip(tokens, groups, strict=True) if group == k] for k in range(5)]
    width = [min(0.2 + 3 * math.sqrt(statistics.pvariance(of_group) + 1e-8), 3) for of_group in ratios]
    pairs = zip(tokens, (width[group] for group in groups), strict=True)
    return [0.0 if (t.a > 0 and t.r > 1 + c) or (t.a < 0 and t.r < 1 - c) else t.r * t.a for t, c in pairs]


def dgpo(r: Tensor, constant: Tensor, a: float, p: float) -> Tensor:
    """W A pi, with the constants that make W continuous at pi = 0.8 p and 1.2 p, n 1 and m 2."""
    pi = constant * p
    if constant < 0.8 and a < 0:
        return 0.8**-1 * p**-2 * pi * a * r * p
    if constant > 1.2 and a > 0:
        return 1.2**0.5 * p**-0.5 * pi**-0.5 * a * r * p
    return 1 / p * a * r * p


def m2po_tau(tokens: list[Token], budget: float = 0.04) -> float:
    """The largest tau at which the sum of min(v, tau^2) is at most budget * n, over the n harmful tokens."""
    v = [math.log(t.r) ** 2 for t in tokens if t.moves_away]
    if sum(v) <= budget * len(v):
        return math.inf
    return bisect(lambda tau: sum(min(x, tau * tau) for x in v) <= budget * len(v), 0, 30)


def m2po(tokens: list[Token]) -> list[float]:
    tau = m2po_tau(tokens)
    return clip(lambda p: min(math.exp(-tau), 0.7), lambda p: max(math.exp(min(tau, 700)), 1.5))(tokens)


def covariances(tokens: list[Token]) -> list[float]:
    """Equation 10 of arXiv 2505.22617."""
    mean = sum(t.logprob for t in tokens) / len(tokens)
    mean_a = sum(t.a for t in tokens) / len(tokens)
    return [(t.logprob - mean) * (t.a - mean_a) for t in tokens]


def kl_cov(tokens: list[Token]) -> list[float]:
    """The published listing: -A r + |ln r| for the largest covariances, max(1, int(n * 2e-4)) of them."""
    cov = covariances(tokens)
    largest = sorted(range(len(cov)), key=lambda i: -cov[i])[: max(1, int(len(cov) * 2e-4))]
    sign = [math.copysign(1, t.r - 1) if t.r != 1 else 0 for t in tokens]
    return [t.r * t.a - sign[i] * (i in largest) for i, t in enumerate(tokens)]


def gppo(beta_low: float, beta_high: float, high: float) -> Form:
    def of_token(r: Tensor, constant: Tensor, a: float, p: float) -> Tensor:
        if constant < 0.8 and a < 0:
            return beta_low * 0.8 / constant * r * a
        if constant > 1 + high and a > 0:
            return beta_high * (1 + high) / constant * r * a
        return r * a

    return objective(of_token)


def gspo(tokens: list[Token]) -> list[float]:
    """Equation 5 of the paper, the objective of whole sequences, differentiated by autograd."""
    out = []
    for sequence in sorted({t.sequence for t in tokens}):
        response = [t for t in tokens if t.sequence == sequence]
        log_ratios = torch.tensor([math.log(t.r) for t in response], dtype=torch.float64, requires_grad=True)
        s, a = log_ratios.mean().exp(), response[0].a
        value = torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a) if a else 0 * s
        # 1/|y| of the geometric mean is the weight that the aggregation over tokens gives.
        out += (len(response) * torch.autograd.grad(value, log_ratios)[0]).tolist()
    return out


PAPER: dict[str, Form] = {
    "fixed": objective(lambda r, _, a, p: torch.minimum(r * a, r.clamp(0.8, 1.2) * a) if a else r * 0),
    "none": objective(lambda r, _, a, p: r * a),
    "band": clip(band_low, band_high),
    "band_asymmetric": clip(band_low, band_high),
    "band_relaxed": clip(lambda p: min(band_low(p), 0.8), lambda p: max(band_high(p), 1.28)),
    "dcpo": clip(
        lambda p: 0.5 + 0.5 * math.sqrt(max(1 - 4 * 0.16 / p, 0)),
        lambda p: min(0.5 + 0.5 * math.sqrt(1 + 4 * 0.2 / p), 10),
    ),
    "ripo": clip(lambda p: max(1 - math.sqrt(0.05 / p), 0), lambda p: 1 + math.sqrt(0.05 / p)),
    "bapo": bapo,
    "acpo": acpo,
    "m2po": m2po,
    "cispo": objective(lambda r, constant, a, p: constant.clamp(max=3.0) * a * (r / constant)),
    "dppo_tv": mask(lambda p, x: abs(x - p), 0.2),
    "dppo_kl": mask(binary_kl, 0.05),
    "cppo": cppo,
    "abc": objective(lambda r, _, a, p: r.clamp(0.8, 1.2) * a),
    "up": objective(lambda r, _, a, p: r / r.detach() * a if a > 0 else torch.minimum(r * a, r.clamp(min=0.8) * a)),
    "sapo": objective(lambda r, _, a, p: 4 / (t := 1.0 if a > 0 else 1.05) * torch.sigmoid(t * (r - 1)) * a),
    "gppo": gppo(1.0, 1.0, 0.28),
    "ce_gppo": gppo(0.75, 1.0, 0.2),
    "dgpo": objective(dgpo),
    "drpo": objective(lambda r, _, a, p: r * a - abs(a) / (2 * 12.5) * p * (r - 1) ** 2),
    "gspo": gspo,
    "kl_cov": kl_cov,
}


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"clip_cov"}))
def test_gradient_of_every_rule_is_that_of_its_paper(name: str):
    batch = synthetic_batch(torch.float64)
    wanted = torch.tensor(PAPER[name](tokens_of(batch)), dtype=torch.float64)
    torch.testing.assert_close(gradient(name, batch), wanted, rtol=1e-6, atol=1e-9)


def test_every_rule_has_a_second_form_and_a_docstring_with_its_source():
    assert PAPER.keys() | {"clip_cov"} == RULES.keys() and len(RULES) >= 20
    for name, rule in RULES.items():
        text = rule.function.__doc__ or ""
        assert re.search(r"\n    w = .+(\n        .+)*\n    Source: .+\n    Checked: .+\n    $", text), name
        assert re.search(r"arXiv \d{4}\.\d{5}", text), name


def test_every_rule_is_a_name_of_a_configuration():
    assert set(RULES_WITHOUT_FILE) <= RULES.keys()
    methods = {*stems("methods"), *RULES_WITHOUT_FILE}
    assert RULES.keys() - methods == {"fixed", "none"}  # grpo and noclip


# ---- rules that look at more than one token ----


def clip_cov_listing(batch: dict[str, Tensor], share: float, low: float, high: float) -> tuple[Tensor, int, Tensor]:
    """The published listing up to its random choice: candidates, the number to drop, and r where PPO does not clip."""
    tokens = tokens_of(batch)
    clipped = [(t.a > 0 and t.r > 1 + high) or (t.a < 0 and t.r < 1 - low) for t in tokens]
    cov = [-math.inf if c else x for c, x in zip(clipped, covariances(tokens), strict=True)]
    candidates = torch.tensor([1 < c < 5 for c in cov])
    number = min(max(int(share * len(tokens)), 1), int(candidates.sum()))
    return candidates, number, torch.tensor([0 if c else t.r for t, c in zip(tokens, clipped, strict=True)]).double()


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (0.2, 0.2)])
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_clip_cov_drops_as_many_candidates_as_the_listing(share: float, bounds: tuple[float, float]):
    batch, (low, high) = synthetic_batch(torch.float64), bounds
    candidates, number, unclipped = clip_cov_listing(batch, share, low, high)
    assert 0 < number <= candidates.sum() < len(candidates)
    for seed in range(5):
        torch.manual_seed(seed)
        w = weights(load_rule("clip_cov", {"share": share, "low": low, "high": high}), batch)
        dropped = (w == 0) & (unclipped != 0)
        assert dropped.sum() == number and not (dropped & ~candidates).any()
        torch.testing.assert_close(w[~dropped], unclipped[~dropped])


def test_clip_cov_draws_every_candidate_equally_often():
    batch, draws = synthetic_batch(torch.float64), 300
    candidates, _, unclipped = clip_cov_listing(batch, 0.0, 1.0, 1.0)
    share = (candidates.sum().item() // 2 + 0.5) / len(candidates)
    torch.manual_seed(0)
    rule = load_rule("clip_cov", {"share": share})
    dropped = torch.stack([(weights(rule, batch) == 0) & (unclipped != 0) for _ in range(draws)])[:, candidates]
    rate = int(share * len(candidates)) / candidates.sum().item()
    assert (dropped.double().mean(0) - rate).abs().max() < 4.5 * math.sqrt(rate * (1 - rate) / draws)


def test_kl_cov_penalizes_the_largest_covariances():
    batch = synthetic_batch(torch.float64)
    cov = torch.tensor(covariances(tokens_of(batch)), dtype=torch.float64)
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp()
    for share, number in ((0.0, 1), (0.1, 29), (1.0, 293)):
        largest = cov >= cov.sort(descending=True).values[number - 1]
        penalized = largest & (batch["advantages"] != 0)
        w = weights(load_rule("kl_cov", {"share": share, "coefficient": 0.5}), batch)
        wanted = ratio - torch.where(penalized, 0.5 * (ratio - 1).sign() / batch["advantages"], 0.0).nan_to_num()
        torch.testing.assert_close(w, wanted)
    # The gradient of 0.5 |ln r| is 0.5 sign(ln r), also for A < 0.
    w = weights(load_rule("kl_cov", {"share": 1.0, "coefficient": 0.5}), batch_of([2.0, 0.5, 2.0], [-4.0, -4.0, 2.0]))
    assert w.tolist() == pytest.approx([2 + 0.125, 0.5 - 0.125, 2 - 0.25])


@pytest.mark.parametrize("seed", range(20))
def test_m2po_finds_the_tau_of_brute_force(seed: int):
    generator = torch.Generator().manual_seed(seed)
    count = [1, 2, 5, 50, 400][seed % 5]
    spread = [0.05, 0.3, 1.0, 3.0][seed // 5]
    ratio = (spread * torch.randn(count, generator=generator, dtype=torch.float64)).exp().tolist()
    batch = batch_of(ratio, torch.randn(count, generator=generator).tolist())
    # The smallest bounds of the authors' code are off: the bounds are e^-tau and e^tau themselves.
    lower, upper = load_rule("m2po", {"low_min": 0.0, "high_min": 0.0})(**batch)
    tau = m2po_tau(tokens_of(batch))
    assert upper.tolist() == pytest.approx([math.exp(min(tau, 710)) if tau < 710 else math.inf] * count, rel=1e-7)
    assert lower.tolist() == pytest.approx([math.exp(-tau)] * count, rel=1e-7)


def test_m2po_by_hand():
    e = math.e

    def bounds(ratio: list[float], advantages: list[float], **parameters: float) -> tuple[float, float]:
        lower, upper = load_rule("m2po", parameters)(**batch_of(ratio, advantages))
        return math.log(lower[0]) if lower[0] else -math.inf, math.log(upper[0])

    free = {"low_min": 0.0, "high_min": 0.0}
    # All harmful, ln r = 2, 1, -1: tau^2 = 1 + (4 - 1) / 3 would be 2; min(v, tau^2) sums to 1.5 at tau^2 = 0.5.
    assert bounds([e**2, e, 1 / e], [1, 1, -1], budget=0.5, **free) == pytest.approx((-(0.5**0.5), 0.5**0.5))
    # Only the largest is capped: tau^2 + 1 + 1 = 3 * 1.2.
    assert bounds([e**2, e, 1 / e], [1, 1, -1], budget=1.2, **free) == pytest.approx((-(1.6**0.5), 1.6**0.5))
    # The mean of the harmful squares is below the budget, or no token is harmful: no bounds.
    assert bounds([e**0.1, e**3], [1, -1], **free) == (-math.inf, math.inf)
    assert bounds([e**3, e**-3, e**3], [-1, 1, 0], **free) == (-math.inf, math.inf)
    # Published smallest bounds 0.7 and 1.5.
    assert bounds([e**2, e, 1 / e], [1, 1, -1]) == pytest.approx((math.log(0.7), math.log(1.5)))


def test_m2po_in_float32_with_many_tokens():
    """100,000 small moves and one large one: its tau is a small difference of large sums."""
    ratio = [math.exp(0.2)] * 100_000 + [math.exp(15.0)]
    batch = batch_of(ratio, [1.0] * len(ratio))
    # tau^2 = budget * n - 0.04 * 100,000 = 2.
    budget = (0.2**2 * 100_000 + 2) / len(ratio)
    single = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    for given, tolerance in ((batch, 1e-6), (single, 0.01)):
        lower, upper = load_rule("m2po", {"budget": budget})(**given)
        assert math.log(upper[0]) == pytest.approx(2**0.5, rel=tolerance)
        assert math.log(lower[0]) == pytest.approx(-(2**0.5), rel=tolerance)


def test_bapo_stops_at_the_first_bound_that_balances():
    batch = synthetic_batch(torch.float64)
    tokens = tokens_of(batch)
    losses = sum(max(t.r, 0.6) * -t.a for t in tokens if t.a < 0)

    def share(high: float) -> float:
        gains = sum(min(t.r, high) * t.a for t in tokens if t.a > 0)
        return gains / (gains + losses)

    def bounds(target: float) -> list[float]:
        return [bound[0].item() for bound in load_rule("bapo", {"target": target})(**batch)]

    for steps in (0, 1, 17, 36):
        high = 1.2 + 0.05 * steps
        assert bounds(share(high) - 1e-9) == pytest.approx([0.6, high])
    assert bounds(share(3.0) + 1e-9) == pytest.approx([0.9, 3.0])
    assert bounds(0.0) == pytest.approx([0.6, 1.2]) and bounds(1.0) == pytest.approx([0.9, 3.0])


def test_acpo_by_hand():
    """Two rare tokens at r = 1 +- 0.1, two certain ones at 1: widths 0.2 + 3 * 0.1 and, except for the 1e-8, 0.2."""
    old = torch.tensor([0.1, 0.1, 0.9, 0.9], dtype=torch.float64).log()
    batch = batch_of([0.9, 1.1, 1.0, 1.0], [1.0] * 4)
    batch |= {"old_logprobs": old, "logprobs": old + (batch["logprobs"] - batch["old_logprobs"])}
    lower, upper = load_rule("acpo", {})(**batch)
    assert upper.tolist() == pytest.approx([1.5, 1.5, 1.2003, 1.2003])
    assert lower.tolist() == pytest.approx([0.5, 0.5, 0.7997, 0.7997])
    # One group: standard deviation sqrt(0.02 / 4), so 0.2 + 0.2121.
    assert load_rule("acpo", {"groups": 1})(**batch)[1].tolist() == pytest.approx([1.41213] * 4, rel=1e-5)


def test_cppo_by_hand():
    """A response of three tokens, p = 1/2, weights 1, 0.9, 0.8: how far may each move?"""

    def cut(*moved: float) -> list[bool]:
        return is_zero("cppo", batch_of([1 + 2 * x for x in moved], [1.0] * 3))

    assert cut(0.149, 0.0, 0.0) == [False] * 3 and cut(0.151, 0.0, 0.0) == [True, False, False]
    assert cut(0.0, 0.166, 0.0) == [False] * 3 and cut(0.0, 0.167, 0.0) == [False, True, False]  # 0.15 / 0.9
    assert cut(0.0, 0.0, 0.187) == [False] * 3 and cut(0.0, 0.0, 0.188) == [False, False, True]  # 0.15 / 0.8
    # After 0.1 the budget of the second is 0.15 + 0.015 - 0.1 = 0.065, over 0.9: 0.0722.
    assert cut(0.1, 0.072, 0.0) == [False] * 3 and cut(0.1, 0.073, 0.0) == [False, True, False]


def test_cppo_starts_every_response_with_a_full_budget():
    moved = [1.28, 1.28, 1.28, 1.28]  # 0.14 of probability each
    assert is_zero("cppo", batch_of(moved, [1.0] * 4)) == [False, True, True, True]
    assert is_zero("cppo", batch_of(moved, [1.0] * 4, lengths=[2, 2])) == [False, True, False, True]
    assert is_zero("cppo", batch_of(moved, [1.0] * 4, lengths=[1, 1, 1, 1])) == [False] * 4


def test_gspo_by_hand():
    """Sequences of 2 and 1 tokens: the geometric mean of 1.21 and 1 is 1.1."""
    batch = batch_of([1.21, 1.0, 0.5], [1.0, 1.0, -1.0], lengths=[2, 1])
    wide = {"low": 0.2, "high": 0.2}
    assert weights(load_rule("gspo", wide), batch).tolist() == pytest.approx([1.1, 1.1, 0.0])
    assert weights(load_rule("gspo", wide | {"low": 0.6}), batch).tolist() == pytest.approx([1.1, 1.1, 0.5])
    assert weights(load_rule("gspo", {}), batch).tolist() == [0.0, 0.0, 0.0]


def test_sapo_is_accurate_in_float32_at_large_ratios():
    """1 - sigmoid(x) would be off by 7e-4 at r = 12 and exactly 0 at r = 20."""
    for r in (12.0, 20.0, 60.0):
        batch = batch_of([r, r], [1.0, -1.0])
        single = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
        exact = []
        for tau in (1.0, 1.05):
            tail = math.exp(-tau * (r - 1))
            exact.append(4 * r * tail / (1 + tail) ** 2)
        assert weights(load_rule("sapo", {}), single).tolist() == pytest.approx(exact, rel=2e-4)
        assert weights(load_rule("sapo", {}), batch).tolist() == pytest.approx(exact, rel=1e-12)


# ---- limits ----


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"clip_cov"}))
def test_ratio_one_is_never_clipped(name: str):
    batch = synthetic_batch(torch.float64)
    batch["logprobs"] = batch["old_logprobs"]
    torch.testing.assert_close(gradient(name, batch), batch["advantages"])


SAME: list[tuple[str, dict, str, dict]] = [
    ("dppo_kl", {}, "band", {"ratio_cap": None}),
    ("dppo_tv", {}, "band", {"ratio_cap": None, "divergence": "tv", "delta": 0.2}),
    ("band_asymmetric", {"delta_low": 0.1, "delta_high": 0.1}, "band", {"delta": 0.1}),
    ("dppo_kl", {"delta_low": 0.2}, "band_asymmetric", {"delta_low": 0.2, "ratio_cap": None}),
    ("dppo_kl", {"delta_high": 0.2}, "band_asymmetric", {"delta_high": 0.2, "ratio_cap": None}),
    ("cppo", {"weight_floor": 1, "prefix_delta": 1}, "dppo_tv", {"delta_low": 0.15, "delta_high": 0.15}),
    ("cppo", {"delta": 1e9, "ratio_cap": 2.0}, "cispo", {"high": 1.0}),
    ("dppo_tv", {"delta_low": 9.0, "delta_high": 9.0, "ratio_cap": 2.0}, "cispo", {"high": 1.0}),
    ("dppo_kl", {"delta_low": 1e9, "delta_high": 1e9, "ratio_cap": 2.0}, "cispo", {"high": 1.0}),
    ("gppo", {"beta_low": 0.0, "beta_high": 0.0}, "fixed", {"high": 0.28}),
    ("ce_gppo", {"beta_low": 1.0, "high": 0.28}, "gppo", {}),
    ("abc", {"low_gain": 1.0, "high_loss": 1e9}, "fixed", {}),
    ("band_relaxed", {"delta": 1e-9}, "fixed", {"high": 0.28}),
    ("band_relaxed", {"low": 0.0, "high": 0.0}, "band", {}),
    ("acpo", {"alpha": 0.0}, "fixed", {}),
    ("acpo", {"clip_min": 9.0, "clip_max": 1e9}, "none", {}),
    ("dgpo", {"n": -1.0, "m": 1.0}, "gppo", {"high": 0.2}),
    ("dgpo", {"n": 0.0, "m": 1e12}, "none", {}),
    ("bapo", {"low_to": 0.6, "high_to": 1.2}, "fixed", {"low": 0.4}),
    ("m2po", {"budget": 1e9}, "none", {}),
    ("m2po", {"budget": 0.0}, "fixed", {"low": 0.3, "high": 0.5}),
    ("ripo", {"delta_low": 1e9, "delta_high": 1e9}, "none", {}),
    ("ripo", {"delta_low": 1e9, "delta_high": 1e9, "ratio_floor": 0.8, "ratio_cap": 1.2}, "fixed", {}),
    ("dcpo", {"low": 1e9, "high": 1e9, "ratio_cap": 1.2}, "fixed", {"low": 0.5}),
    ("cispo", {"low": 1.0, "high": 1e9}, "none", {}),
    ("gspo", {"low": 1.0, "high": 1e9}, "gspo", {"low": 2.0, "high": 1e9}),
    ("drpo", {"delta": 1e12}, "none", {}),
    ("kl_cov", {"coefficient": 0.0}, "none", {}),
    ("clip_cov", {"cov_low": 1e9, "cov_high": 2e9, "low": 0.2, "high": 0.2}, "fixed", {}),
]


@pytest.mark.parametrize(("one", "given", "other", "given_other"), SAME)
def test_rules_that_coincide_in_a_limit(one: str, given: dict, other: str, given_other: dict):
    batch = synthetic_batch(torch.float64)
    got = gradient(one, batch, **given)
    torch.testing.assert_close(got, gradient(other, batch, **given_other), rtol=1e-9, atol=1e-9)
    assert not torch.equal(got, gradient("up", batch))  # the comparison can fail


def test_ripo_and_the_chi_squared_band_of_a_rare_token():
    """chi2 on a rare token is p (r - 1)^2 = delta, RIPO's bound."""
    batch = batch_of([1.0, 1.0], [1.0, -1.0], p=math.exp(-12))
    ripo = load_rule("ripo", {})(**batch)
    chi2 = load_rule("band", {"divergence": "chi2", "ratio_cap": None})(**batch)
    torch.testing.assert_close(ripo[1], chi2[1], rtol=1e-4, atol=0)


# ---- dtypes, shapes, devices ----


@pytest.mark.parametrize("name", NAMES)
def test_float32_gives_the_numbers_of_float64(name: str):
    exact, single = synthetic_batch(torch.float64), synthetic_batch(torch.float32)
    rule = load_rule(name, {"share": 1.0} if name == "clip_cov" else {})
    result = {dtype: rule(**batch) for dtype, batch in ((torch.float64, exact), (torch.float32, single))}
    for dtype, value in result.items():
        assert all(x.dtype == dtype for x in (value if isinstance(value, tuple) else [value]))
    wide, narrow = weights(rule, exact), weights(rule, single).double()
    assert ((wide == 0) != (narrow == 0)).sum() == 0
    torch.testing.assert_close(narrow, wide, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [1]])
def test_micro_batches_of_one_token_sequences(name: str, lengths: list[int]):
    count = len(lengths)
    batch = batch_of([1.5, 0.5, 3.0, 0.9][:count], [1.0, -1.0, 2.0, -2.0][:count], p=0.3, lengths=lengths)
    tokens = tokens_of(batch)
    if name == "clip_cov":  # no candidates
        wanted = [t.r * t.a if 0 <= t.r <= 2 or not t.moves_away else 0.0 for t in tokens]
    elif name == "acpo":  # new probabilities 0.45, 0.15, 0.9, 0.27: 2, 0, 4, 1 of five groups, each of width 0.2 + 3e-4
        wanted = [0.0 if t.moves_away and abs(t.r - 1) > 0.2003 else t.r * t.a for t in tokens]
    else:
        wanted = PAPER[name](tokens)
    assert gradient(name, batch).tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_empty_micro_batch(name: str):
    empty = {key: value[:0] for key, value in synthetic_batch().items()}
    assert weights(load_rule(name, {}), empty).shape == (0,)


def test_positions_lengths_and_sequence_sums_by_counting():
    for lengths in ([1], [1, 1, 1], [3], [2, 1, 4, 1], [5, 1]):
        ids = [k for k, length in enumerate(lengths) for _ in range(length)]
        values = [0.5 * i - 1 for i in range(len(ids))]
        batch = batch_of([1.0] * len(ids), values, lengths=lengths)

        def as_weight(name: str, batch: dict = batch) -> list[int]:
            scope: dict[str, Any] = {}
            exec(f"def f({name}): return {name}", scope)
            result = Rule("f", scope["f"])(**batch)
            assert isinstance(result, Tensor)
            return result.tolist()

        assert as_weight("positions") == [i for length in lengths for i in range(length)]
        assert as_weight("lengths") == [length for length in lengths for _ in range(length)]
        sums = [sum(v for v, k in zip(values, ids, strict=True) if k == mine) for mine in ids]
        assert sequence_sum(batch["advantages"], batch["sequence_ids"]).tolist() == pytest.approx(sums)


def test_derived_inputs_by_hand():
    def collect(ratio: Tensor, log_ratio: Tensor, old_probs: Tensor) -> Tensor:
        return torch.stack([ratio, log_ratio, old_probs])

    batch = batch_of([2.0, 1.0], [1.0, 1.0], p=0.25)
    batch["logprobs"][1] += 300
    result = Rule("collect", collect)(**batch)
    assert isinstance(result, Tensor)
    wanted = [[2, math.exp(20)], [math.log(2), 20], [0.25, 0.25]]
    assert [row.tolist() for row in result] == [pytest.approx(row) for row in wanted]


def test_select_largest():
    values = torch.tensor([3.0, -1.0, 7.0, 5.0])
    for share, chosen in ((0.0, [2]), (0.5, [2, 3]), (0.74, [2, 3]), (1.0, [0, 1, 2, 3]), (9.0, [0, 1, 2, 3])):
        assert select_largest(values, share).nonzero().flatten().tolist() == chosen


@pytest.mark.parametrize("name", NAMES)
def test_a_token_far_off_stays_finite(name: str):
    batch = synthetic_batch()
    first = torch.arange(293) == 0
    far = batch | {"old_logprobs": torch.where(first, -300.0, batch["old_logprobs"])}
    assert weights(load_rule(name, {}), far).isfinite().all()


class NoReadNoCopy(TorchDispatchMode):
    """Raises for a tensor that is created from Python numbers and for running sums of floats.

    The first is a copy to the device, which waits for it; the second depends on the order of threads on a GPU.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten.lift_fresh.default, "a tensor from Python numbers: use full, arange"
        if function is torch.ops.aten.cumsum.default:
            assert not args[0].is_floating_point(), "a running sum of floats: use to_fixed_point"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_copied_from_or_to_the_device(name: str):
    """On the meta device there are no values: reading one raises."""
    batch = {key: value.to("meta") for key, value in synthetic_batch().items()}
    with NoReadNoCopy():
        load_rule(name, {})(**batch)


# ---- parameters ----

MINE = """
import torch

WIDTH = 0.5

def soft(ratio, *, width=0.3, kind="plain"):
    return ratio * torch.exp(-width * ratio.log().square())

def by_entropy(entropy, *, width: float = 1, cap: float | None = None, free=None, count=2):
    return 1 - width * entropy.clamp(max=1), 1 + width * entropy

def by_position(ratio, positions, lengths): return ratio * (1 - positions / lengths)
def anything(ratio, **options): return ratio
def several(*tensors): return tensors[0]
def other(ratio, width=0.3): return ratio
def needs_level(ratio, *, level): return ratio * level
"""


@pytest.fixture
def my_file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def test_a_rule_in_a_file(my_file: str):
    batch = synthetic_batch(torch.float64)
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp()
    soft = load_rule(f"{my_file}:soft", {"width": 2})
    assert check_rule(soft) == "weight"
    assert soft.defaults == {"width": 0.3, "kind": "plain"} and soft.arguments == {"width": 2, "kind": "plain"}
    torch.testing.assert_close(weights(soft, batch), ratio * torch.exp(-2 * ratio.log() ** 2))
    assert check_rule(load_rule(f"{my_file}:by_entropy", {"width": 0.5})) == "bounds"
    place = weights(load_rule(f"{my_file}:by_position", {}), batch)
    torch.testing.assert_close(place[:3], ratio[:3] * torch.tensor([1, 1, 0.5]).double())


def test_parameters_keep_their_types():
    assert load_rule("acpo", {"groups": 4}).arguments["groups"] == 4
    assert load_rule("band", {"divergence": "tv", "ratio_cap": None}).arguments == {
        "delta": 0.05, "divergence": "tv", "ratio_cap": None
    }  # fmt: skip
    one = load_rule("band", {"delta": 1})
    assert one.arguments["delta"] == 1 and one.with_parameters({"ratio_cap": 5}).arguments["delta"] == 1
    four, five = (load_rule("acpo", {"groups": k})(**synthetic_batch())[1] for k in (4, 5))
    assert not torch.equal(four, five)


def test_types_of_parameters_in_a_file(my_file: str):
    for given in (
        {"width": 0.5},
        {"cap": None},
        {"cap": 2},
        {"free": None},
        {"free": "x"},
        {"free": 1.5},
        {"count": 3},
    ):
        assert load_rule(f"{my_file}:by_entropy", given).parameters == given
    needs_level = load_rule(f"{my_file}:needs_level", {"level": 0.5})
    assert needs_level.with_parameters({}).arguments == {"level": 0.5}


INPUTS = "with inputs from logprobs, old_logprobs, advantages, entropy, sequence_ids, log_ratio, ratio, old_probs, pos"
INVALID = [
    ("bend", {}, r"rule: 'bend' is not known; use FILE.py:FUNCTION, or one of abc, acpo, band, .*, up$"),
    ("nowhere/mine.py:soft", {}, "rule: nowhere/mine.py cannot be read: No such file"),
    ("MINE:sofd", {}, "rule: .*mine.py has no function sofd; it has soft, by_entropy, by_position, "),
    ("MINE:WIDTH", {}, "has no function WIDTH"),
    ("MINE:anything", {}, rf"anything: \*args and \*\*kwargs are not allowed; write `def anything\(ratio.* {INPUTS}"),
    ("MINE:several", {}, r"several: \*args and \*\*kwargs are not allowed"),
    ("MINE:other", {}, r"other: 'width' is not an input; write `def other\(ratio, advantages, \*, parameter=value\)`"),
    ("MINE:needs_level", {}, "rule_args: rule .*:needs_level has no default for level; set a value"),
    ("MINE:needs_level", {"x": 1}, "'x' is not a parameter of rule .*; its parameters: level$"),
    ("MINE:soft", {"widht": 1.0}, r"rule_args: 'widht' is not .*; its parameters: width \(0.3\), kind \(plain\)"),
    ("MINE:soft", {"kind": 1.0}, r"kind of rule .*:soft is not a string \(got 1.0\); its parameters: width"),
    ("MINE:by_entropy", {"count": 2.5}, r"count of rule .* is not an integer \(got 2.5\)"),
    ("MINE:by_entropy", {"cap": "2"}, r"cap of rule .* is not a number or null \(got '2'\)"),
    ("MINE:by_entropy", {"width": None}, r"width of rule .* is not an integer or a number \(got None\)"),
    ("acpo", {"groups": 4.5}, r"rule_args: groups of rule acpo is not an integer \(got 4.5\)"),
    ("acpo", {"groups": True}, r"groups of rule acpo is not an integer \(got True\)"),
    ("sapo", {"tau_positive": "1"}, r"tau_positive of rule sapo is not a number \(got '1'\); its parameters: tau_pos"),
    ("sapo", {"tau_positive": True}, r"tau_positive of rule sapo is not a number \(got True\)"),
    ("sapo", {"tau_positive": [1]}, r"tau_positive of rule sapo is not a number \(got \[1\]\)"),
    ("none", {"delta": 1.0}, "'delta' is not a parameter of rule none; its parameters: none"),
]


@pytest.mark.parametrize(("name", "parameters", "message"), INVALID)
def test_errors_of_load_rule(my_file: str, name: str, parameters: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load_rule(name.replace("MINE", my_file), parameters)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(ratio)\n    return ratio\n", r"rule: .*mine.py: SyntaxError: expected ':' \(.*mine.py, line 1\)"),
        ("import math\n\nx = 1 / 0\n", r"rule: .*mine.py:3: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)\n", r"rule: .*mine.py:2: SystemExit: 3"),
    ],
)
def test_errors_of_a_file(tmp_path: Path, source: str, message: str):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        load_rule(f"{tmp_path / 'mine.py'}:f", {})


# ---- check_rule ----


@pytest.mark.parametrize("name", NAMES)
def test_every_published_rule_passes_the_check(name: str):
    assert check_rule(load_rule(name, {})) == ("bounds" if name in BOUNDS else "weight")


def writes_to_input(ratio: Tensor, advantages: Tensor) -> Tensor:
    return ratio * advantages.clamp_(min=0)


@torch.no_grad()
def decorated(ratio: Tensor) -> Tensor:
    return ratio @ torch.ones(3)


WRONG: dict[str, tuple[Callable[..., object], str]] = {
    "a number": (lambda ratio: 1.0, r"w is a float; return a weight \(T,\), or a tuple"),
    "a list": (lambda ratio: [ratio, ratio], "w is a list; return a weight"),
    "one value": (lambda ratio: ratio.mean(), r"w is torch.float32 of shape \(\) for 293 tokens"),
    "float64": (lambda ratio: ratio.double(), "w is torch.float64 .*; return one number per token, of the same dtype"),
    "three": (lambda ratio: (ratio, ratio, ratio), r"returned 3 values; return a weight \(T,\), or \(lower, upper\)"),
    "infinite": (lambda ratio: 1 / (ratio - 1), r"w is inf at r 1, p .*, A .*; it must be finite"),
    "nan": (lambda ratio: (ratio - 1).sqrt(), "w is nan at r 0"),
    "without 1": (lambda ratio: (ratio * 0 + 1.1, ratio * 0 + 2), r"bounds \[1.1, 2\] do not satisfy 0 <= lower <= 1"),
    "swapped": (lambda ratio: (ratio * 0 + 1.2, ratio * 0 + 0.8), "do not satisfy 0 <= lower <= 1 <= upper"),
    "upper below 1": (lambda ratio: (ratio * 0, ratio * 0 + 0.8), r"bounds \[0, 0.8\] do not satisfy"),
    "negative": (lambda ratio: (ratio * 0 - 0.1, ratio * 0 + 2), r"\[-0.1, 2\] do not satisfy 0 <= lower"),
    "infinite lower": (lambda ratio: (ratio * 0 + math.inf, ratio), "lower is inf at"),
    "nan upper": (lambda ratio: (ratio * 0, ratio * math.nan), "upper is nan at"),
    "gradient": (lambda ratio: ratio.clone().requires_grad_(), r"w has a gradient; call .detach\(\)"),
    "exception": (lambda ratio: ratio @ torch.ones(3), r"failed on a synthetic batch: .*test_rules.py:\d+: RuntimeE"),
    "exception below a decorator": (decorated, r"failed on a synthetic batch: .*test_rules.py:\d+: RuntimeError"),
    "write": (writes_to_input, "writes to its input advantages; compute a new tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_of_check_rule(case: str):
    function, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^rule: mine:? .*{message}"):
        check_rule(Rule("mine", function))  # type: ignore[arg-type]


def test_upper_bound_may_be_infinite():
    assert check_rule(Rule("mine", lambda ratio: (ratio * 0, ratio * 0 + math.inf))) == "bounds"


def test_the_synthetic_batch_covers_what_rules_depend_on():
    batch = synthetic_batch()
    ratio, p = (batch["logprobs"] - batch["old_logprobs"]).exp(), batch["old_logprobs"].exp()
    assert batch["sequence_ids"].bincount().tolist() == [1, 2, 40, 100, 150] and len(ratio) == 293
    assert (ratio == 1).sum() > 50 and ratio.min() < 0.1 and ratio.max() > 10 and (batch["logprobs"] < 0).all()
    assert p.min() < 1e-6 and p.max() > 0.999 and batch["entropy"].min() == 0
    assert all((batch["advantages"].sign() == sign).any() for sign in (-1, 0, 1))
