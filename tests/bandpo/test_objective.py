"""The objective: hand-worked numbers, PPO written out per token, exact zeros of the gradient, sums that can be cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo.band import DIVERGENCES, inside_band
from bandpo.objective import ClipStatistics, aggregation_weights, kl_estimate, policy_loss, sequence_logprobs
from bandpo.radius import scheduled_delta, token_radius
from bandpo.rule import Rule, View, clipped_loss
from bandpo.rules import load_rule

CLIP_METHODS = ("fixed", "band", "band_relaxed", "dcpo", "none")
KNOBS = {"delta": 0.05, "divergence": "kl", "ratio_cap": 10.0, "clip_low": 0.2, "clip_high": 0.28}


def batch(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs, old_logprobs, advantages) in float64, ratios from far below to far above any interval."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.empty(tokens, dtype=torch.float64).exponential_(generator=generator)
    shift = torch.randn(tokens, generator=generator, dtype=torch.float64)
    advantages = torch.randn(tokens, generator=generator, dtype=torch.float64)
    advantages[::7] = 0
    return torch.minimum(old + shift, torch.tensor(-1e-6)), old, advantages


def view_of(logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> View:
    """The tokens as one sequence of no entropy."""
    one = torch.tensor([old.numel()], device=old.device)
    return View(logprobs, old, advantages, torch.zeros_like(old), one, torch.zeros_like(one))


def clip_bounds(old: torch.Tensor, *, clip: str, **knobs) -> tuple[torch.Tensor, torch.Tensor]:
    """The interval of a rule, given those of the knobs that it has."""
    rule = load_rule(clip, {})
    result = rule.with_parameters({k: v for k, v in knobs.items() if k in rule.defaults})(view_of(old, old, old))
    assert isinstance(result, tuple) and len(result) == 2
    return result


def clip_statistics(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    dual_clip: float | None,
) -> ClipStatistics:
    view = view_of(logprobs, old, advantages)
    found = clipped_loss(Rule("these", lambda _: (lower, upper)), view, surrogate="ppo", dual_clip=dual_clip)
    return found.statistics(view)


def gradient(logprobs: torch.Tensor, *rest: torch.Tensor, **options) -> torch.Tensor:
    leaf = logprobs.clone().requires_grad_()
    return torch.autograd.grad(policy_loss(leaf, *rest, **options).sum(), leaf)[0]


# ---- intervals ----


def test_intervals_by_hand():
    old = torch.tensor([0.08, 0.8]).log()

    def bounds(clip, **knobs):
        lower, upper = clip_bounds(old, clip=clip, **{**KNOBS, **knobs})
        return [round(x, 3) for x in [*lower.tolist(), *upper.tolist()]]

    assert bounds("fixed") == [0.8, 0.8, 1.2 + 0.08, 1.28]
    assert bounds("none") == [0, 0, math.inf, math.inf]
    assert bounds("band") == [0.262, 0.821, 2.411, 1.131]
    assert bounds("band_relaxed") == [0.262, 0.8, 2.411, 1.28]
    # p = .08: 1 - 4 * .16 / .08 < 0 -> 1/2; 1/2 + sqrt(1 + 10) / 2. p = .8: 1/2 + sqrt(.2) / 2; 1/2 + sqrt(2) / 2.
    assert bounds("dcpo", clip_low=0.16, clip_high=0.2) == [0.5, 0.724, 2.158, 1.207]


def test_cap_binds_on_band_and_dcpo():
    rare = torch.tensor([1e-5]).log()
    for clip in ("band", "dcpo"):
        assert clip_bounds(rare, clip=clip, **KNOBS)[1] == 10
        assert clip_bounds(rare, clip=clip, **{**KNOBS, "ratio_cap": None})[1] > 100


@pytest.mark.parametrize("clip", CLIP_METHODS)
def test_intervals_contain_one_for_any_shape(clip: str):
    old = -torch.rand(2, 3, 4).exponential_()
    lower, upper = clip_bounds(old, clip=clip, **KNOBS)
    assert lower.shape == upper.shape == old.shape
    assert ((lower >= 0) & (lower <= 1) & (upper >= 1)).all()


def test_only_the_methods_that_use_delta_look_at_it():
    old = torch.tensor([-1.0])
    assert clip_bounds(old, clip="fixed", **{**KNOBS, "delta": -1.0})[0] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="delta: -1"):
        clip_bounds(old, clip="band", **{**KNOBS, "delta": -1.0})


# ---- the loss ----


def test_loss_by_hand():
    # r = 2, 2, 1/2, 1/2, 20 at an interval of 0.8 .. 1.2 and c = 10
    ratio = torch.tensor([2.0, 2.0, 0.5, 0.5, 20.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -2.0], dtype=torch.float64)
    old = torch.full_like(ratio, -4.0)
    lower, upper = torch.full_like(ratio, 0.8), torch.full_like(ratio, 1.2)

    def loss(**options):
        return policy_loss(old + ratio.log(), old, advantages, lower, upper, **options).tolist()

    assert loss(dual_clip=None, surrogate="ppo") == pytest.approx([-1.2, 2, -0.5, 0.8, 40])
    assert loss(dual_clip=10.0, surrogate="ppo") == pytest.approx([-1.2, 2, -0.5, 0.8, 20])
    # cispo: -A * clipped ratio * logprobs, logprobs = -4 + ln r
    weights = [1.2, 1.2, 0.8, 0.8, 1.2]
    wanted = [-a * w * x for a, w, x in zip(advantages.tolist(), weights, (old + ratio.log()).tolist(), strict=True)]
    assert loss(dual_clip=10.0, surrogate="cispo") == pytest.approx(wanted)
    with pytest.raises(ValueError, match="surrogate: 'a2c'.*ppo, cispo or gspo"):
        loss(dual_clip=None, surrogate="a2c")


@given(st.integers(0, 2**31), st.sampled_from(CLIP_METHODS), st.sampled_from([None, 3.0]))
@settings(deadline=None, max_examples=50)
def test_gradient_is_that_of_ppo_written_out_per_token(seed: int, clip: str, dual_clip: float | None):
    logprobs, old, advantages = batch(40, seed)
    lower, upper = clip_bounds(old, clip=clip, **KNOBS)
    got = gradient(logprobs, old, advantages, lower, upper, dual_clip=dual_clip, surrogate="ppo")
    for t in range(len(old)):
        r, a, lo, up = (x[t].item() for x in ((logprobs - old).exp(), advantages, lower, upper))
        clipped = (a > 0 and r > up) or (a < 0 and r < lo) or (a < 0 and dual_clip is not None and r > dual_clip)
        # d(-r A)/d logprob = -r A; exactly zero where clipped, on the clipped side only
        assert got[t].item() == (0.0 if clipped else pytest.approx(-r * a, rel=1e-12))


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_gradient_vanishes_outside_the_trust_region_on_the_clipped_side_only(name: str):
    logprobs, old, advantages = batch(400)
    lower, upper = clip_bounds(old, clip="band", **{**KNOBS, "divergence": name, "ratio_cap": None})
    got = gradient(logprobs, old, advantages, lower, upper, dual_clip=None, surrogate="ppo")
    inside = inside_band(logprobs, old, delta=0.05, divergence=name)
    leaving = (logprobs > old) == (advantages > 0)
    assert (~inside & leaving).sum() > 20 and (inside | ~leaving).sum() > 20
    assert torch.equal(got == 0, (~inside & leaving) | (advantages == 0))


def test_band_with_fixed_bounds_is_fixed_clipping_bit_for_bit():
    logprobs, old, advantages = batch(200)
    lower, upper = clip_bounds(old, clip="fixed", **KNOBS)
    ratio = (logprobs - old).exp()
    ppo = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    assert torch.equal(policy_loss(logprobs, old, advantages, lower, upper, dual_clip=None, surrogate="ppo"), ppo)


def test_no_gradient_reaches_the_old_policy_or_the_interval():
    logprobs, old, advantages = batch(20)
    lower, upper = clip_bounds(old, clip="band", **KNOBS)
    old.requires_grad_()
    loss = policy_loss(
        logprobs.requires_grad_(), old.detach(), advantages, lower, upper, dual_clip=10.0, surrogate="ppo"
    )
    loss.sum().backward()
    assert old.grad is None and logprobs.grad is not None


def test_cispo_keeps_every_gradient():
    logprobs, old, advantages = batch(50)
    lower, upper = clip_bounds(old, clip="band", **KNOBS)
    got = gradient(logprobs, old, advantages, lower, upper, dual_clip=1.1, surrogate="cispo")
    weight = (logprobs - old).exp().clamp(lower, upper)
    capped = torch.where(advantages < 0, weight.clamp(max=1.1), weight)
    assert not torch.equal(weight, capped)
    torch.testing.assert_close(got, -capped * advantages)


def test_a_broken_token_stays_finite_and_nan_is_not_hidden():
    old, one = torch.tensor([-300.0]), torch.tensor([1.0])
    options = {"dual_clip": 10.0, "surrogate": "ppo"}
    for advantage in (one, -one):
        assert policy_loss(torch.tensor([-0.1]), old, advantage, 0 * one, 2 * one, **options).isfinite()
        assert policy_loss(old * math.nan, old, advantage, 0 * one, 2 * one, **options).isnan()
        assert policy_loss(old, old, advantage, 0 * one, one * math.nan, **options).isnan()


# ---- sequences ----


def test_sequence_ratio_is_the_geometric_mean_and_its_gradient_that_of_gspo():
    logprobs, old, _ = batch(9)
    lengths, per_sequence = torch.tensor([2, 0, 3, 4]), torch.tensor([1.0, 5.0, -0.5, 2.0], dtype=torch.float64)
    owner = torch.tensor([0, 0, 2, 2, 2, 3, 3, 3, 3])
    wide = torch.zeros(9).double(), torch.full((9,), torch.inf).double()

    def sequence_ratios(x):
        gaps = (x - old).split([2, 3, 4])
        return torch.stack([gap.mean().exp() for gap in gaps])

    result = sequence_logprobs(logprobs, old, lengths)
    torch.testing.assert_close(
        (result - old).exp(), sequence_ratios(logprobs).repeat_interleave(torch.tensor([2, 3, 4]))
    )

    leaf = logprobs.clone().requires_grad_()
    weights = aggregation_weights(
        lengths, aggregation="seq-mean-token-mean", sequences=3, tokens=9, max_response_tokens=1
    )
    losses = policy_loss(
        sequence_logprobs(leaf, old, lengths), old, per_sequence[owner], *wide, dual_clip=None, surrogate="gspo"
    )
    got = torch.autograd.grad((weights * losses).sum(), leaf)[0]
    leaf = logprobs.clone().requires_grad_()
    wanted = torch.autograd.grad(-(sequence_ratios(leaf) * per_sequence[[0, 2, 3]]).mean(), leaf)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


# ---- aggregation ----


def test_weights_by_hand():
    def weights(aggregation):
        return aggregation_weights(
            torch.tensor([1, 0, 2]), aggregation=aggregation, sequences=8, tokens=20, max_response_tokens=5
        ).tolist()

    assert weights("seq-mean-token-mean") == [1 / 8, 1 / 16, 1 / 16]
    assert weights("token-mean") == pytest.approx([1 / 20] * 3)
    assert weights("seq-mean-token-sum-norm") == pytest.approx([1 / 40] * 3)
    with pytest.raises(ValueError, match="aggregation: 'mean'.*token-mean"):
        weights("mean")


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"])
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=8), data=st.data())
@settings(deadline=None, max_examples=25)
def test_the_gradient_does_not_depend_on_how_an_update_is_cut(
    aggregation: str, lengths: list[int], data: st.DataObject
):
    logprobs, old, advantages = batch(sum(lengths), seed=sum(lengths))
    lower, upper = clip_bounds(old, clip="band", **KNOBS)

    def update(parts: list[list[int]]) -> torch.Tensor:
        leaf = logprobs.clone().requires_grad_()
        flat = list(torch.arange(len(old)).split(lengths))
        for part in parts:
            index = torch.cat([flat[i] for i in part])
            weights = aggregation_weights(
                torch.tensor([lengths[i] for i in part]),
                aggregation=aggregation,
                sequences=len(lengths),
                tokens=sum(lengths),
                max_response_tokens=9,
            )
            tensors = (old[index], advantages[index], lower[index], upper[index])
            (weights * policy_loss(leaf[index], *tensors, dual_clip=10.0, surrogate="ppo")).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    order = data.draw(st.permutations(range(len(lengths))))
    middle = data.draw(st.integers(1, len(lengths) - 1))
    whole = update([list(range(len(lengths)))])
    torch.testing.assert_close(update([list(order[:middle]), list(order[middle:])]), whole, rtol=1e-12, atol=1e-15)


# ---- KL ----


def test_kl_estimates_by_hand_and_on_average():
    new, ref = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -0.5])
    assert kl_estimate(new, ref, estimator="k1").tolist() == [1.0, -0.5]
    assert kl_estimate(new, ref, estimator="k2").tolist() == [0.5, 0.125]
    wanted = [math.exp(-1) - 1 + 1, math.exp(0.5) - 1 - 0.5]
    assert kl_estimate(new, ref, estimator="k3").tolist() == pytest.approx(wanted)
    # Weighted by the policy, k1 and k3 are the KL itself.
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = (p * (p / q).log()).sum().item()
    for estimator in ("k1", "k3"):
        assert (p * kl_estimate(p.log(), q.log(), estimator=estimator)).sum().item() == pytest.approx(exact)
    far = torch.tensor([-100.0])
    assert kl_estimate(far, torch.tensor([-0.1]), estimator="k3") == 10
    assert kl_estimate(torch.tensor([-0.1]), far, estimator="k3") == 10
    with pytest.raises(ValueError, match="estimator: 'k4'"):
        kl_estimate(far, far, estimator="k4")


# ---- statistics ----


def statistics(count: int, seed: int, clip: str = "band") -> tuple[ClipStatistics, tuple[torch.Tensor, ...]]:
    logprobs, old, advantages = batch(count, seed)
    lower, upper = clip_bounds(old, clip=clip, **KNOBS)
    tensors = (logprobs, old, advantages, lower, upper)
    return clip_statistics(*tensors, 3.0), tensors


def test_statistics_by_counting():
    result, (logprobs, old, advantages, lower, upper) = statistics(3000, 1)
    rows = list(zip(*(x.tolist() for x in ((logprobs - old).exp(), old.exp(), advantages, lower, upper)), strict=True))
    edges = {"": (0, 1.1), "/p<0.01": (0, 0.01), "/p<0.2": (0, 0.2), "/p<0.4": (0.2, 0.4), "/p<0.6": (0.4, 0.6)}
    edges |= {"/p<0.8": (0.6, 0.8), "/p<=1": (0.8, 1.1)}
    wanted = {}
    for suffix, (low, high) in edges.items():
        part = [row for row in rows if low <= row[1] < high]
        gains, losses = [row for row in part if row[2] > 0], [row for row in part if row[2] < 0]
        wanted[f"clip/up{suffix}"] = sum(r > up for r, _, _, _, up in gains) / len(gains)
        wanted[f"clip/down{suffix}"] = sum(r < lo for r, _, _, lo, _ in losses) / len(losses)
    cut = sum((a > 0 and r > up) or (a < 0 and (r < lo or r > 3.0)) for r, _, a, lo, up in rows)
    columns = {"ratio/mean": 0, "band/lower_mean": 3, "band/upper_mean": 4}
    wanted |= {key: sum(row[i] for row in rows) / len(rows) for key, i in columns.items()}
    kept = [(a > 0 and r <= up) or (a < 0 and lo <= r <= 3.0) or a == 0 for r, _, a, lo, up in rows]
    wanted |= {"clip/weight_mean": sum(row[0] for row, keeps in zip(rows, kept, strict=True) if keeps) / len(rows)}
    wanted |= {"clip/fraction": cut / len(rows), "ratio/max": max(row[0] for row in rows)}
    assert result.summary() == pytest.approx(wanted)
    got = gradient(logprobs, old, advantages, lower, upper, dual_clip=3.0, surrogate="ppo")
    assert ((got == 0) & (advantages != 0)).sum().item() / len(rows) == pytest.approx(wanted["clip/fraction"])


def test_bins_end_where_they_say():
    edges = torch.tensor([0.01, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    old = torch.stack([edges * 0.9999, edges * 1.0001]).log()
    ones = torch.ones_like(old)
    below = clip_statistics(old, old, ones, 0 * ones, torch.tensor([[0.0], [2.0]]).expand(2, 5), None).summary()
    # Clipped are those just below an edge, each counted in the bin that ends there.
    shares = [below[f"clip/up{b}"] for b in ("/p<0.01", "/p<0.2", "/p<0.4", "/p<0.6", "/p<0.8", "/p<=1")]
    assert shares == pytest.approx([1, 2 / 3, 1 / 2, 1 / 2, 1 / 2, 0])
    sure = clip_statistics(0 * old, 0 * old, ones, 0 * ones, 0 * ones, None).summary()
    assert sure["clip/up/p<=1"] == 1  # p = 1 is in the last bin
    assert clip_statistics(
        old[:1, 4:], old[:1, 4:], ones[:1, 4:], ones[:1, 4:], ones[:1, 4:], None
    ).summary().keys() == {
        "clip/up",
        "clip/up/p<0.8",
        "clip/fraction",
        "clip/weight_mean",
        "ratio/mean",
        "ratio/max",
        "band/lower_mean",
        "band/upper_mean",
    }  # an empty bin is no zero


def test_statistics_merge_and_reduce_to_those_of_all_tokens():
    a, tensors_a = statistics(300, 2)
    b, tensors_b = statistics(500, 3)
    logprobs, old, advantages, lower, upper = (torch.cat(pair) for pair in zip(tensors_a, tensors_b, strict=True))
    together = clip_statistics(logprobs, old, advantages, lower, upper, 3.0).summary()
    assert a.merge(b).summary() == pytest.approx(together)
    assert b.merge(a).summary() == pytest.approx(together)

    # As over ranks: sums and counts are added, and divided once.
    pairs = [part.means() for part in (a, b)]
    for name, value in together.items():
        if name != "ratio/max":
            total, count = (sum(pair[name][i].item() for pair in pairs) for i in (0, 1))
            assert total / count == pytest.approx(value)


def test_an_infinite_interval_has_no_mean():
    found = statistics(100, 4, clip="none")[0].summary()
    assert "band/upper_mean" not in found and found["band/lower_mean"] == 0 and found["clip/up"] == 0
    assert found["clip/fraction"] > 0  # dual clip


def test_nothing_is_read_back():
    """On the meta device there are no values: whatever reads one raises."""
    x = torch.empty(6, device="meta")
    for clip in CLIP_METHODS:
        lower, upper = clip_bounds(x, clip=clip, **KNOBS)
        for surrogate in ("ppo", "cispo", "gspo"):
            policy_loss(x, x, x, lower, upper, dual_clip=10.0, surrogate=surrogate)
        one = clip_statistics(x, x, x, lower, upper, 10.0)
        one.merge(one)
    for estimator in ("k1", "k2", "k3"):
        kl_estimate(x, x, estimator=estimator)
    token_radius(x, delta=0.05, radius="entropy", mean_entropy=0.3)


# ---- radius ----


def test_radius_follows_entropy_with_the_stated_mean():
    entropies = torch.tensor([0.0, 0.5, 1.5, 2.0])
    found = torch.as_tensor(token_radius(entropies, delta=0.04, radius="entropy", mean_entropy=1.0))
    assert found.tolist() == pytest.approx([0.02, 0.03, 0.05, 0.06])
    assert found.mean().item() == pytest.approx(0.04)
    # The mean is taken over the whole step: a part of it gets the same radii.
    part = token_radius(entropies[2:], delta=0.04, radius="entropy", mean_entropy=1.0)
    assert torch.equal(torch.as_tensor(part), found[2:])
    assert token_radius(entropies, delta=0.04, radius="constant", mean_entropy=1.0) == 0.04
    assert token_radius(0 * entropies, delta=0.04, radius="entropy", mean_entropy=0.0) == 0.04
    clip_bounds(torch.full((4,), -1.0), clip="band", **{**KNOBS, "delta": found})
    with pytest.raises(ValueError, match="radius: 'token'.*constant or entropy"):
        token_radius(entropies, delta=0.04, radius="token", mean_entropy=1.0)


def test_schedules():
    def deltas(schedule, steps=5):
        return [scheduled_delta(s, steps, delta=0.1, delta_final=0.02, schedule=schedule) for s in range(steps)]

    assert deltas("constant") == [0.1] * 5
    assert deltas("linear") == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
    half = math.sqrt(0.5)
    assert deltas("cosine") == pytest.approx([0.1, 0.06 + 0.04 * half, 0.06, 0.06 - 0.04 * half, 0.02])
    assert deltas("linear", steps=1) == deltas("cosine", steps=1) == [0.02]
    assert scheduled_delta(9, 5, delta=0.1, delta_final=0.02, schedule="linear") == pytest.approx(0.02)
    with pytest.raises(ValueError, match="schedule: 'step'"):
        deltas("step")
