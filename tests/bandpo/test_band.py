"""The Band operator against 60-digit roots, brute force over small simplexes, its limits, and its own definition."""

import functools
import math
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo import band
from bandpo.band import DIVERGENCES, Divergence, alpha_divergence, band_bounds, inside_band

NAMES = list(DIVERGENCES)
CLOSED = ["kl", "tv", "chi2"]
mp = mpmath.mp.clone()
mp.dps = 60

# f(u) of each divergence, written down once more, from the textbook, in u instead of ln u.
TEXTBOOK = {
    "kl": lambda u: -mp.log(u) + u - 1 if u > 0 else mp.inf,
    "tv": lambda u: abs(u - 1) / 2,
    "chi2": lambda u: (u - 1) ** 2,
    "reverse_kl": lambda u: (u * mp.log(u) if u > 0 else mp.mpf(0)) - u + 1,
    "hellinger": lambda u: (mp.sqrt(u) - 1) ** 2 / 2,
    "jensen_shannon": lambda u: ((u * mp.log(u) if u > 0 else mp.mpf(0)) - (u + 1) * mp.log((u + 1) / 2)) / 2,
    "alpha": lambda u: (u ** mp.mpf("1.5") - 1 - mp.mpf("1.5") * (u - 1)) / mp.mpf("0.75"),
}


@functools.cache
def exact(name: str, logprob: float, delta: float) -> tuple[Any, Any]:
    """(lower, upper) by halving [0, 1] and [1, 1/p] in ratio, to 45 digits; it shares nothing with the operator."""
    f, p = TEXTBOOK[name], mp.exp(mp.mpf(logprob))
    q, radius = -mp.expm1(mp.mpf(logprob)), mp.mpf(delta)

    def allowed(r):
        rest = (1 - p * r) / q
        return p * f(r) + q * f(max(rest, mp.mpf(0))) <= radius

    def last_allowed(inside, outside):
        if allowed(outside):
            return outside
        for _ in range(150):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if allowed(middle) else (inside, middle)
        return inside

    return last_allowed(mp.mpf(1), mp.mpf(0)), last_allowed(mp.mpf(1), 1 / p)


def grid(points: int) -> list[float]:
    """Log-probs of p from 1e-10 to 1 - 1e-6, dense at both ends."""
    rare = torch.logspace(-10, math.log10(0.5), points, dtype=torch.float64).log()
    likely = torch.log1p(-torch.logspace(-6, math.log10(0.45), points, dtype=torch.float64))
    return torch.cat([rare, likely]).tolist()


def relative_and_absolute_error(name: str, delta: float, dtype: torch.dtype, points: int) -> tuple[float, float]:
    """Worst relative error of upper and absolute error of lower over the grid, against the exact bounds of exp of the
    log-prob as stored in `dtype`."""
    logprobs = torch.tensor(grid(points), dtype=dtype)
    lower, upper = band_bounds(logprobs, delta=delta, divergence=name)
    stored = torch.tensor(delta, dtype=dtype).item()
    wanted = [exact(name, logprob, stored) for logprob in logprobs.tolist()]
    upper_errors = [abs(u - w[1]) / w[1] for u, w in zip(upper.tolist(), wanted, strict=True)]
    lower_errors = [abs(x - w[0]) for x, w in zip(lower.tolist(), wanted, strict=True)]
    return float(max(upper_errors)), float(max(lower_errors))


# ---- accuracy ----


@pytest.mark.parametrize("delta", [0.005, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("name", CLOSED)
def test_float32_bounds_are_exact_to_float32(name: str, delta: float):
    upper, lower = relative_and_absolute_error(name, delta, torch.float32, points=25)
    assert upper < 1e-6 and lower < 5e-7  # asked for: 1e-5 and 2e-6


@pytest.mark.parametrize("delta", [0.005, 0.05, 1.0])
@pytest.mark.parametrize("name", CLOSED)
def test_float64_bounds_are_exact_to_float64(name: str, delta: float):
    upper, lower = relative_and_absolute_error(name, delta, torch.float64, points=20)
    assert upper < 1e-12 and lower < 1e-12


@pytest.mark.parametrize("name", [n for n in NAMES if n not in CLOSED])
def test_bisected_bounds_are_exact(name: str):
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-11)):
        upper, lower = relative_and_absolute_error(name, 0.05, dtype, points=12)
        assert upper < tolerance and lower < tolerance, dtype


def test_a_new_divergence_is_one_line(monkeypatch: pytest.MonkeyPatch):
    """The example of docs/tweaks.md: triangular discrimination."""
    monkeypatch.setitem(DIVERGENCES, "triangular", Divergence(lambda s: torch.expm1(s) * torch.tanh(s / 2)))
    monkeypatch.setitem(TEXTBOOK, "triangular", lambda u: (u - 1) ** 2 / (u + 1))
    upper, lower = relative_and_absolute_error("triangular", 0.05, torch.float32, points=12)
    assert upper < 5e-6 and lower < 5e-6


def test_upper_minus_one_has_relative_accuracy_next_to_probability_one():
    logprobs = torch.log1p(-torch.logspace(-6, -2, 9, dtype=torch.float64)).float()
    _, upper = band_bounds(logprobs.double(), delta=0.05, divergence="kl")
    for logprob, value in zip(logprobs.tolist(), upper.tolist(), strict=True):
        wanted = exact("kl", logprob, 0.05)[1] - 1
        assert abs(value - 1 - wanted) / wanted < 1e-8


@pytest.mark.parametrize("name", CLOSED)
def test_bisection_of_f_finds_the_same_bounds_as_the_formula(name: str):
    logprobs = torch.tensor(grid(40), dtype=torch.float64)
    q, p = -torch.expm1(logprobs), logprobs.exp()
    shrink = DIVERGENCES[name].shrink
    assert shrink is not None
    for a, b in ((p, q), (q, p)):
        formula = shrink(a, b, a / b, torch.tensor(0.05, dtype=torch.float64))
        halved = band._bisection(DIVERGENCES[name].f)(a, b, a / b, torch.tensor(0.05, dtype=torch.float64))
        torch.testing.assert_close(torch.expm1(halved), torch.expm1(formula), rtol=1e-9, atol=1e-12)


def test_published_values():
    p = torch.tensor([0.0001, 0.01, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    lower, upper = band_bounds(p.log(), delta=0.05, divergence="kl")
    assert [float(f"{x:.3g}") for x in upper.tolist()] == [495, 7.81, 2.2, 1.31, 1.08, 1.01]
    assert [round(x, 3) for x in lower.tolist()] == [0, 0.002, 0.313, 0.692, 0.867, 0.931]


def test_closed_forms_by_hand():
    # p = 1/4, tv: 1 -+ 0.05 * 4. chi2: 1 -+ sqrt(0.12 * 3) = 1 -+ 0.6.
    quarter = torch.tensor(0.25, dtype=torch.float64).log()
    assert torch.stack(band_bounds(quarter, delta=0.05, divergence="tv")).tolist() == pytest.approx([0.8, 1.2])
    assert torch.stack(band_bounds(quarter, delta=0.12, divergence="chi2")).tolist() == pytest.approx([0.4, 1.6])


# ---- limits and saturation ----


def test_kl_limits():
    lower, upper = band_bounds(torch.tensor([-60.0, -1e-9], dtype=torch.float64), delta=0.05, divergence="kl")
    assert upper[0].item() * math.exp(-60) == pytest.approx(1 - math.exp(-0.05), rel=1e-12)
    assert lower[0] == 0
    assert lower[1].item() == pytest.approx(math.exp(-0.05), rel=1e-6)
    assert (upper[1].item() - 1) / 1e-9 == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "empties_below", "fills_above"), [("tv", 0.05, 0.95), ("chi2", 0.05 / 1.05, 1 / 1.05)]
)
def test_saturation_where_the_simplex_ends(name: str, empties_below: float, fills_above: float):
    p = torch.tensor([empties_below * 0.999, empties_below * 1.001, fills_above * 0.999, fills_above * 1.001])
    p = p.double()
    lower, upper = band_bounds(p.log(), delta=0.05, divergence=name)
    assert lower[0] == 0 and lower[1] > 0
    assert upper[2] < 1 / p[2] * (1 - 1e-6)
    assert upper[3].item() == pytest.approx(1 / p[3].item(), rel=1e-12)


@pytest.mark.parametrize("name", ["reverse_kl", "hellinger", "jensen_shannon", "alpha"])
def test_bisected_divergences_saturate_exactly(name: str):
    lower, upper = band_bounds(torch.tensor([0.001, 0.9999], dtype=torch.float64).log(), delta=0.2, divergence=name)
    assert lower[0] == 0
    assert upper[1].item() == pytest.approx(1 / 0.9999, rel=1e-12)


def test_kl_never_saturates():
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    lower, upper = band_bounds(p.log(), delta=0.2, divergence="kl")  # at 0.99, e^-20 of the others is left
    assert (lower > 0).all() and (upper < 1 / p).all()


# ---- properties ----

logprob = st.floats(-23.0, -1e-6)
radius = st.floats(0.005, 1.0)


@given(logprob, radius, st.sampled_from(NAMES))
@settings(max_examples=200)
def test_order_of_the_bounds(x: float, delta: float, name: str):
    for dtype in (torch.float32, torch.float64):
        old = torch.tensor(x, dtype=dtype)
        lower, upper = band_bounds(old, delta=delta, divergence=name)
        assert 0 <= lower <= 1 <= upper <= 1 / old.exp()


@given(logprob, radius, st.sampled_from(NAMES))
@settings(max_examples=200)
def test_divergence_is_delta_on_the_bound_unless_saturated(x: float, delta: float, name: str):
    lower, upper = (b.item() for b in band_bounds(torch.tensor(x, dtype=torch.float64), delta=delta, divergence=name))
    p, q, f = mp.exp(mp.mpf(x)), -mp.expm1(mp.mpf(x)), TEXTBOOK[name]

    def divergence(r):
        return p * f(mp.mpf(r)) + q * f(max((1 - p * r) / q, mp.mpf(0)))

    if lower > 1e-9:  # absolute accuracy is promised, so nearer to 0 only the other side tells
        assert float(divergence(lower)) == pytest.approx(delta, rel=1e-6)
    else:
        assert divergence(mp.mpf(1e-8)) <= delta * 1.0001 + 1e-9
    if p * upper < 1 - mp.mpf(1e-9):
        assert float(divergence(upper)) == pytest.approx(delta, rel=1e-6)
    else:  # either the whole simplex is allowed, or delta is reached within 1e-9 of its end
        assert divergence((1 - mp.mpf(1e-6)) / p) <= delta


@given(logprob, radius, st.sampled_from(NAMES), st.floats(0, 1), st.booleans())
@settings(max_examples=300)
def test_inside_band_agrees_with_the_bounds(x: float, delta: float, name: str, share: float, rising: bool):
    old = torch.tensor(x, dtype=torch.float64)
    lower, upper = band_bounds(old, delta=delta, divergence=name)
    ratio = (1 + share * ((-old).exp() - 1)) if rising else torch.tensor(share, dtype=torch.float64)
    if min((ratio / upper - 1).abs(), (ratio - lower).abs()) < 1e-9 or ratio == 0:
        return  # within rounding of a bound
    new = (old + ratio.log()).clamp(max=0)
    assert inside_band(new, old, delta=delta, divergence=name) == (lower <= ratio <= upper)


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=5), radius, st.sampled_from(NAMES), st.integers(0, 2**31))
@settings(max_examples=100)
def test_no_distribution_of_a_small_simplex_beats_the_bound(masses: list[float], delta: float, name: str, seed: int):
    old = torch.tensor(masses, dtype=torch.float64)
    old = old / old.sum()
    generator = torch.Generator().manual_seed(seed)
    # From everywhere in the simplex, and from near the old distribution.
    free = torch.distributions.Dirichlet(torch.ones_like(old)).sample((200,))
    tilted = old * (torch.randn(200, len(old), generator=generator, dtype=torch.float64) * delta**0.5).exp()
    new = torch.cat([free, tilted / tilted.sum(1, keepdim=True)])
    divergences = (old * DIVERGENCES[name].f((new / old).log())).sum(1)
    lower, upper = band_bounds(old[0].log(), delta=delta, divergence=name)
    ratios = (new[:, 0] / old[0])[divergences <= delta]
    assert ((ratios >= lower - 1e-9) & (ratios <= upper + 1e-9)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_is_reached_by_a_distribution(name: str):
    old = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    for bound in band_bounds(old[0].log(), delta=0.05, divergence=name):
        new = torch.cat([old[:1] * bound, old[1:] * (1 - 0.2 * bound) / 0.8])
        divergence = (old * DIVERGENCES[name].f((new / old).log().clamp(min=-1e30))).sum()
        assert divergence.item() == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_monotone_in_probability_and_radius(name: str, dtype: torch.dtype):
    slack = 1 + (2e-6 if dtype == torch.float32 else 1e-11)
    logprobs = torch.cat([torch.linspace(-23, -0.7, 400), torch.log1p(-torch.logspace(-0.3, -6, 300))]).to(dtype)
    lower, upper = band_bounds(logprobs, delta=0.05, divergence=name)
    assert (upper[1:] <= upper[:-1] * slack).all()
    assert (lower[1:] >= lower[:-1] - (slack - 1)).all()
    deltas = torch.logspace(-2.3, 0, 60, dtype=dtype)[:, None]
    lower, upper = band_bounds(logprobs[::10].expand(60, -1), delta=deltas, divergence=name)
    assert (upper[1:] >= upper[:-1] / slack).all() and (lower[1:] <= lower[:-1] + (slack - 1)).all()


# ---- edges ----


@pytest.mark.parametrize("name", NAMES)
def test_edges(name: str):
    logprobs = torch.tensor([0.0, -0.0, -math.inf, math.nan, -200.0, -1e-30, 1e-6])
    lower, upper = band_bounds(logprobs, delta=0.05, divergence=name)
    certain = [0, 1, 5, 6]  # p = 1, or above it by rounding: finite, nothing above one
    assert (upper[certain] == 1).all() and ((lower[certain] > 0.7) & (lower[certain] <= 1)).all()
    assert (lower[[2, 4]] == 0).all()  # p = 0, and exp(-200), which is 0 in float32
    assert (upper[[2, 4]] > 1e16).all() and upper.nan_to_num().isfinite().all()
    assert lower[3].isnan() and upper[3].isnan()
    lower, upper = band_bounds(logprobs, delta=0.05, divergence=name, cap=10.0)
    assert upper[2] == 10 and upper[4] == 10 and upper[3].isnan() and (upper[certain] == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_next_to_zero_and_one_in_float32(name: str):
    logprobs = torch.tensor([math.log(1e-12), math.log1p(-1e-7)])
    lower, upper = band_bounds(logprobs, delta=0.05, divergence=name)
    for i, x in enumerate(logprobs.tolist()):
        low, high = exact(name, x, torch.tensor(0.05).item())
        assert lower[i].item() == pytest.approx(float(low), abs=2e-6)
        assert upper[i].item() == pytest.approx(float(high), rel=1e-5)


def test_half_precision_is_computed_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        logprobs = torch.tensor([-5.0, -0.5, -0.0625]).to(dtype)  # stored exactly
        half, single = (band_bounds(x, delta=0.05, divergence="kl") for x in (logprobs, logprobs.float()))
        assert half[0].dtype == half[1].dtype == torch.float32
        assert torch.equal(half[0], single[0]) and torch.equal(half[1], single[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_bound_does_not_depend_on_neighbours_shape_or_chunks(name: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    logprobs = -torch.rand(6, 50).exponential_() * 3
    deltas = torch.rand(50) + 0.01
    whole = torch.stack(band_bounds(logprobs, delta=deltas, divergence=name))
    monkeypatch.setattr(band, "CHUNK_TOKENS", 7)
    assert torch.equal(torch.stack(band_bounds(logprobs, delta=deltas, divergence=name)), whole)
    alone = torch.stack(band_bounds(logprobs[2, 3], delta=deltas[3].item(), divergence=name))
    # A vector unit and the scalar tail of a loop round differently, hence not bit for bit.
    torch.testing.assert_close(alone, whole[:, 2, 3], rtol=1e-6, atol=1e-7)
    assert alone.shape == (2,) and band_bounds(torch.empty(0), delta=0.1, divergence=name)[0].shape == (0,)


def test_a_radius_per_token():
    old = torch.tensor([0.1, 0.1]).log()
    lower, upper = band_bounds(old, delta=torch.tensor([0.05, 0.3]), divergence="kl")
    for i, delta in enumerate((0.05, 0.3)):
        one = band_bounds(old[:1], delta=delta, divergence="kl")
        assert lower[i] == one[0] and upper[i] == one[1]


def test_bounds_have_no_gradient():
    old = torch.tensor([-1.0], requires_grad=True)
    assert not any(b.requires_grad for b in band_bounds(old, delta=0.05, divergence="kl"))


def test_extreme_radii_stay_finite():
    p = torch.logspace(-36, -0.001, 200)
    for delta in (1e-8, 1e3):
        for name in NAMES:
            lower, upper = band_bounds(p.log(), delta=delta, divergence=name)
            assert not lower.isnan().any() and not upper.isnan().any(), name


def test_inside_band_at_the_ends():
    old = torch.tensor([-1.0, -1.0, -1.0, math.nan])
    new = torch.tensor([-1.0, -math.inf, 0.0, -1.0])
    assert inside_band(new, old, delta=0.05, divergence="kl").tolist() == [True, False, False, False]
    assert inside_band(new, old, delta=0.99, divergence="tv").tolist() == [True, True, True, False]


def test_errors_name_the_argument():
    old = torch.tensor([-1.0])
    for arguments, words in [
        ({"divergence": "js"}, "divergence: 'js'.*kl, tv, chi2"),
        ({"delta": 0.0}, "delta: 0.0.*above 0"),
        ({"delta": math.inf}, "delta: inf.*finite"),
        ({"delta": torch.tensor([0.5, -0.25])}, r"delta: -0.25 .*above 0"),
        ({"cap": 0.5}, "cap: 0.5.*at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            band_bounds(old, **{"delta": 0.05, "divergence": "kl", **arguments})
    with pytest.raises(ValueError, match="old_logprobs: 0.5 is above 0"):
        band_bounds(torch.tensor([-1.0, 0.5, math.nan]), delta=0.05, divergence="kl")
    with pytest.raises(ValueError, match="old_logprobs: dtype torch.int64"):
        band_bounds(torch.tensor([-1]), delta=0.05, divergence="kl")
    with pytest.raises(ValueError, match="alpha: 1"):
        alpha_divergence(1)
    with pytest.raises(ValueError, match="delta: -1"):
        inside_band(old, old, delta=-1, divergence="kl")


def test_where_values_are_not_read_a_wrong_one_becomes_nan(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU, nothing may be read
    old = torch.tensor([-1.0, 0.5, -1.0])
    for name in NAMES:
        lower, upper = band_bounds(old, delta=torch.tensor([0.1, 0.1, 0.0]), divergence=name, cap=10.0)
        assert lower.isnan().tolist() == upper.isnan().tolist() == [False, True, True]


def test_no_value_is_read_back():
    """On the meta device there are no values: whatever reads one raises."""
    old = torch.empty(5, device="meta")
    for name in NAMES:
        for delta in (0.05, torch.empty(5, device="meta")):
            assert band_bounds(old, delta=delta, divergence=name)[0].shape == (5,)
            assert inside_band(old, old, delta=delta, divergence=name).shape == (5,)


def test_the_example_of_the_readme_line():
    lower, upper = band_bounds(torch.tensor([0.08]).log(), delta=0.05, divergence="kl", cap=10.0)
    assert 0.08 * (upper.item() - 1) == pytest.approx(0.113, abs=5e-4)  # fixed clipping at 0.2 leaves 0.016
    assert lower.item() == pytest.approx(0.262, abs=5e-4)
