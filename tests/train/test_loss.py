"""The loss of train.py: numbers by hand, PPO written out per token, corrections, splits, statistics of tokens."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bandpo.band import DIVERGENCES, inside_band
from bandpo.rule import RULES, Rule, load_rule, synthetic_batch
from configs.schema import Config
from rewards import GraderError
from train import group_advantages, grpo_loss, importance_weight, kl_estimate
from trainer.batching import loss_weights
from trainer.metrics import Stats
from trainer.types import MicroBatch

PLAIN = Config(dual_clip=None, kl_coef=0.0)
FIXED, BAND = load_rule("fixed", {}), load_rule("band", {})
NAMES = sorted(RULES)


def micro_batch(
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    lengths: Sequence[int] = (),
    weights: Tensor | None = None,
    rollout: Tensor | None = None,
    ref: Tensor | None = None,
) -> MicroBatch:
    """What the loss reads of a micro-batch; by default one sequence, every token of weight 1."""
    none = torch.empty(0)
    ids = torch.repeat_interleave(torch.tensor(lengths or [len(advantages)])).to(advantages.device)
    return MicroBatch(
        samples=[],
        input_ids=none,
        attention_mask=None,
        position_ids=none,
        predictors=none,
        targets=none,
        sequence_ids=ids,
        rollout_logprobs=0 * advantages if rollout is None else rollout,
        advantages=advantages,
        loss_weights=torch.ones_like(advantages) if weights is None else weights,
        old_logprobs=old_logprobs,
        ref_logprobs=ref,
    )


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, old_logprobs, advantages) in float64, ratios from far below to far above any bounds."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.empty(count, dtype=torch.float64).exponential_(generator=generator)
    shift = torch.randn(count, generator=generator, dtype=torch.float64)
    advantages = torch.randn(count, generator=generator, dtype=torch.float64)
    advantages[::7] = 0
    return -(old + shift).abs(), old, advantages


def run_loss(cfg: Config, rule: Rule, batch: MicroBatch, logprobs: Tensor) -> tuple[float, Tensor, dict[str, Any]]:
    """(loss, its gradient, statistics)."""
    leaf = logprobs.clone().requires_grad_()
    loss, stats = grpo_loss(cfg, rule, batch, leaf, torch.zeros_like(leaf))
    return loss.item(), torch.autograd.grad(loss, leaf)[0], dict(stats)


def of_ratios(
    ratio: Sequence[float], advantages: Sequence[float], rule: Rule, cfg: Config = PLAIN, **given: Any
) -> tuple[float, Tensor, dict[str, Any]]:
    """`run_loss` for tokens with these ratios and advantages."""
    A = torch.tensor(advantages, dtype=torch.float64)
    old = torch.full_like(A, -4.0)
    return run_loss(cfg, rule, micro_batch(old, A, **given), old + torch.tensor(ratio, dtype=torch.float64).log())


# ---- clip bounds ----


def test_ppo_by_hand():
    """r = 2, 2, 1/2, 1/2, 20 with bounds 0.8 and 1.2."""
    ratio, A = [2.0, 2.0, 0.5, 0.5, 20.0], [1.0, -1.0, 1.0, -1.0, -2.0]
    for cfg, last, slope in ((PLAIN, 40, 40), (replace(PLAIN, dual_clip=10.0), 20, 0)):
        loss, gradient, _ = of_ratios(ratio, A, FIXED, cfg)
        assert loss == pytest.approx(-1.2 + 2 - 0.5 + 0.8 + last)
        assert gradient.tolist() == pytest.approx([0, 2, -0.5, 0, slope])


@given(st.integers(0, 2**31), st.sampled_from(["fixed", "band", "dcpo", "none", "bapo"]), st.sampled_from([None, 2.0]))
@settings(max_examples=40)
def test_loss_is_ppo_written_out_per_token(seed: int, name: str, dual_clip: float | None):
    logprobs, old, A = tokens(30, seed)
    weights = torch.linspace(0.1, 2, 30, dtype=torch.float64)
    loss, gradient, stats = run_loss(
        replace(PLAIN, dual_clip=dual_clip), load_rule(name, {}), micro_batch(old, A, weights=weights), logprobs
    )
    wanted = 0.0
    for t in range(30):
        lower, upper = stats["band/lower_mean"][t].item(), stats["band/upper_mean"][t].item()
        r, a, weight = math.exp(logprobs[t] - old[t]), A[t].item(), weights[t].item()
        term = -min(r * a, min(max(r, lower), upper) * a)
        clipped = (a > 0 and r > upper) or (a < 0 and r < lower)
        if dual_clip is not None and a < 0 and r > dual_clip:
            term, clipped = -dual_clip * a, True
        wanted += weight * term
        assert gradient[t].item() == (0.0 if clipped else pytest.approx(-weight * r * a, rel=1e-12))
        assert stats["clip/weight_mean"][t].item() == (0.0 if clipped else pytest.approx(r))
    assert loss == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_gradient_vanishes_outside_the_trust_region_on_the_clipped_side_only(name: str):
    logprobs, old, A = tokens(400)
    _, gradient, _ = run_loss(
        PLAIN, load_rule("band", {"divergence": name, "ratio_cap": None}), micro_batch(old, A), logprobs
    )
    inside = inside_band(logprobs, old, delta=0.05, divergence=name)
    moves_away = (logprobs > old) == (A > 0)
    assert (~inside & moves_away).sum() > 20 and (inside | ~moves_away).sum() > 20
    assert torch.equal(gradient == 0, (~inside & moves_away) | (A == 0))


def test_first_update_without_old_logprobs_is_on_policy():
    logprobs, _, A = tokens(20)
    for name in ("band", "cispo", "up"):
        batch = micro_batch(None, A)
        loss, gradient, stats = run_loss(PLAIN, load_rule(name, {}), batch, logprobs)
        torch.testing.assert_close(gradient, -A)
        assert (stats["ratio/mean"] == 1).all() and not stats["clip/fraction"].any()
    loss, _, _ = run_loss(PLAIN, BAND, micro_batch(None, A), logprobs)
    assert loss == pytest.approx(-A.sum().item())


# ---- gradient weights ----


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"clip_cov"}))
def test_gradient_is_the_weight_times_the_advantage(name: str):
    given, rule = synthetic_batch(torch.float64), load_rule(name, {})
    result = rule(**given)
    lengths = given["sequence_ids"].bincount().tolist()
    for cfg in (PLAIN, replace(PLAIN, dual_clip=3.0)):
        batch = micro_batch(given["old_logprobs"], given["advantages"], lengths=lengths)
        _, gradient, stats = run_loss(cfg, rule, batch, given["logprobs"])
        A, ratio = given["advantages"], (given["logprobs"] - given["old_logprobs"]).exp()
        beyond = (A < 0) & ((result if isinstance(result, Tensor) else ratio) > (cfg.dual_clip or math.inf))
        torch.testing.assert_close(gradient, -stats["clip/weight_mean"] * A)
        if isinstance(result, Tensor):
            torch.testing.assert_close(stats["clip/weight_mean"], torch.where(beyond, 0.0, result))
            assert not result.requires_grad and "band/lower_mean" not in stats
        assert (gradient[beyond] == 0).all() and (cfg.dual_clip is not None or not beyond.any())


def test_dual_clip_limits_the_weight_that_multiplies_the_gradient():
    """GSPO: the ratio of the sequence, e^2 and e^(2/3) here, not the token's. CISPO: the truncated ratio."""
    A, old = -torch.ones(4, dtype=torch.float64), torch.full((4,), -9.0, dtype=torch.float64)
    logprobs = old + torch.tensor([4.0, 0.0, 4.0, -8 / 3], dtype=torch.float64)
    gspo = load_rule("gspo", {"low": 1.0, "high": 9.0})
    for rule, kept in ((gspo, [False, False, True, True]), (load_rule("cispo", {}), [True] * 4)):
        batch = micro_batch(old, A, lengths=[2, 2])
        _, gradient, stats = run_loss(replace(PLAIN, dual_clip=5.0), rule, batch, logprobs)
        assert (gradient != 0).tolist() == kept and (~stats["clip/fraction"]).tolist() == kept


def test_tokens_without_advantage_do_not_count_as_clipped():
    _, gradient, stats = of_ratios([1e10, 1e-10, 3.0, 1e10], [0.0, 0.0, 0.0, 1.0], FIXED)
    assert gradient.tolist() == [0] * 4 and stats["clip/fraction"].tolist() == [False] * 3 + [True]


def test_gspo_gradient_is_that_of_the_published_objective():
    """Equation 5: the mean over sequences of min(s A, clip(s) A), s the geometric mean ratio, by autograd."""
    logprobs, old, _ = tokens(9)
    lengths, A = [2, 3, 4], torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    owner = torch.repeat_interleave(torch.tensor(lengths))
    given: dict[str, Any] = {"sequences": 3, "tokens": 9, "max_response_tokens": 1}
    each = loss_weights(lengths, aggregation="seq-mean-token-mean", **given)
    batch = micro_batch(old, A[owner], lengths=lengths, weights=torch.tensor(each, dtype=torch.float64)[owner])
    for low, high in ((1.0, 9.0), (0.1, 0.1)):
        leaf = logprobs.clone().requires_grad_()
        s = torch.stack([gap.mean().exp() for gap in (leaf - old).split(lengths)])
        objective = torch.minimum(s * A, s.clamp(1 - low, 1 + high) * A).mean()
        wanted = torch.autograd.grad(-objective, leaf)[0]
        _, gradient, _ = run_loss(PLAIN, load_rule("gspo", {"low": low, "high": high}), batch, logprobs)
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)
        assert (low == 0.1) == bool((wanted == 0).any())


@pytest.mark.parametrize("name", ["fixed", "none", "band", "cispo", "sapo", "gppo", "drpo", "up", "gspo"])
def test_tokens_beyond_e20_have_gradient_and_weight_zero(name: str):
    """Without dual clip. A < 0 at e^21 and A > 0 at e^-21 are the sides that PPO does not clip."""
    A = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    shift = torch.tensor([21.0, -21.0, 21.0, -21.0, 0.0], dtype=torch.float64)
    old = torch.full_like(A, -30.0)
    _, gradient, stats = run_loss(PLAIN, load_rule(name, {}), micro_batch(old, A, lengths=[1] * 5), old + shift)
    assert gradient.tolist() == [0, 0, 0, 0, -1] and stats["clip/weight_mean"].tolist() == [0, 0, 0, 0, 1]
    assert stats["clip/fraction"].tolist() == [True] * 4 + [False]
    # Just inside, a rule without clip has both.
    _, gradient, stats = run_loss(PLAIN, load_rule("none", {}), micro_batch(old, A), old + 19 / 21 * shift)
    assert (gradient != 0).all() and (stats["clip/weight_mean"] > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden(name: str):
    logprobs, old, A = tokens(20)
    logprobs[3] = math.nan
    assert math.isnan(run_loss(Config(kl_coef=0.0), load_rule(name, {}), micro_batch(old, A), logprobs)[0])


# ---- KL and entropy ----


def test_kl_estimate_by_hand_and_on_average():
    values = kl_estimate(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -0.5]))
    assert values.tolist() == pytest.approx([math.exp(-1) - 1 + 1, math.exp(0.5) - 1 - 0.5])
    # Weighted by the policy, k3 is the KL itself.
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = (p * (p / q).log()).sum().item()
    assert (p * kl_estimate(p.log(), q.log())).sum().item() == pytest.approx(exact)
    far, near = torch.tensor([-100.0]), torch.tensor([-0.1])
    assert kl_estimate(far, near) == kl_estimate(near, far) == 10  # also where d is -99.9


def test_kl_and_entropy_terms_by_hand():
    """Weights 1 and 2: KL of d = ln 2 is 1 - ln 2, its gradient 1 - e^d = -1; the bonus is of the entropy alone."""
    old = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    cfg = Config(dual_clip=None, kl_coef=0.5, entropy_coef=0.25)
    batch = micro_batch(old, 0 * old, weights=torch.tensor([1.0, 2.0]).double(), ref=old + math.log(2))
    leaf, entropy = old.clone().requires_grad_(), torch.tensor([3.0, 5.0], dtype=torch.float64, requires_grad=True)
    loss, stats = grpo_loss(cfg, BAND, batch, leaf, entropy)
    assert loss.item() == pytest.approx(3 * 0.5 * (1 - math.log(2)) - 0.25 * (3 + 2 * 5))
    torch.testing.assert_close(stats["kl/reference"], torch.full_like(leaf, 1 - math.log(2)))
    gradients = torch.autograd.grad(loss, (leaf, entropy))
    assert [g.tolist() for g in gradients] == [pytest.approx([-0.5, -1.0]), pytest.approx([-0.25, -0.5])]
    loss, stats = grpo_loss(PLAIN, BAND, micro_batch(old, 0 * old), leaf, entropy)
    assert loss == 0 and "kl/reference" not in stats


def test_distillation_by_hand():
    """ln(teacher / old) is ln 2 and -ln 2: with coefficient 3 the advantages 1 and 0 become 1 + 3 ln 2 and -3 ln 2."""
    old, gap = torch.tensor([-1.0, -1.0], dtype=torch.float64), torch.tensor([math.log(2), -math.log(2)]).double()
    batch = replace(micro_batch(old, torch.tensor([1.0, 0.0]).double()), teacher_logprobs=old + gap)
    leaf = old.clone().requires_grad_()
    loss, stats = grpo_loss(Config(dual_clip=None, kl_coef=0, teacher_coef=3.0), BAND, batch, leaf, leaf.detach())
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.tolist() == pytest.approx([-1 - 3 * math.log(2), 3 * math.log(2)])
    torch.testing.assert_close(stats["kl/teacher"], -gap)


def test_a_logged_clip_has_the_sign_of_the_token_s_own_advantage():
    """Reward advantage 0.5; the teacher's term makes it -1.5, 0.5 and 0.5. Ratios 0.5, 1.5 and 1 in [0.8, 1.2]."""
    old = torch.tensor([-2.0, -2.0, -2.0])
    batch = replace(micro_batch(old, torch.full((3,), 0.5)), teacher_logprobs=old - torch.tensor([2.0, 0.0, 0.0]))
    now = old + torch.tensor([0.5, 1.5, 1.0]).log()
    loss, stats = grpo_loss(Config(kl_coef=0), FIXED, batch, now, now)
    step = Stats(skipped_in_a_row=0)
    step.add(batch, loss, now, now, stats)
    ((_, values),) = step.latest.values()
    assert values["clip"].tolist() == [-1, 1, 0] and values["weight"].tolist() == pytest.approx([0, 0, 1])


# ---- truncated importance sampling ----

TIS: list[Any] = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.mark.parametrize(
    ("tis", "wanted"),
    [
        ("token_truncate", [3.0, 0.5, 0.25]),
        ("token_mask", [0.0, 0.5, 0.0]),
        ("sequence_truncate", [2.0, 2.0, 0.25]),
        ("sequence_mask", [2.0, 2.0, 0.0]),
    ],
)
def test_importance_weights_by_hand(tis: Any, wanted: list[float]):
    """Ratios old / rollout 4, 1/2 | 1/4 in sequences of 2 and 1 tokens, cap 3, floor 0.4; 2 for the first sequence."""
    old = torch.full((3,), -4.0, dtype=torch.float64)
    rollout = old - torch.tensor([4.0, 0.5, 0.25], dtype=torch.float64).log()
    A = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    cfg = Config(dual_clip=None, kl_coef=1.0, tis=tis, tis_cap=3.0, tis_floor=0.4)
    batch = micro_batch(old, A, lengths=[2, 1], rollout=rollout)
    assert importance_weight(cfg, old, batch).tolist() == pytest.approx(wanted)
    for name in ("fixed", "cispo"):
        _, gradient, stats = run_loss(cfg, load_rule(name, {}), batch, old)
        assert stats["rollout/tis_mean"].tolist() == pytest.approx(wanted)
        assert gradient.tolist() == pytest.approx([-w * a for w, a in zip(wanted, A.tolist(), strict=True)])
        # The KL term is not weighted: its gradient at d = ln 2 is 1 - 2.
        _, more, _ = run_loss(cfg, load_rule(name, {}), replace(batch, ref_logprobs=old + math.log(2)), old)
        assert (more - gradient).tolist() == pytest.approx([-1.0] * 3)
    loss, _, _ = run_loss(cfg, FIXED, batch, old)
    assert loss == pytest.approx(-sum(w * a for w, a in zip(wanted, A.tolist(), strict=True)))


@pytest.mark.parametrize("tis", TIS)
def test_importance_weights_per_token_in_plain_python(tis: Any):
    _, old, A = tokens(60, 1)
    rollout = old - 0.2 * torch.randn(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    lengths = [1, 9, 30, 1, 19]
    cfg = Config(tis=tis, tis_cap=1.4, tis_floor=0.6)
    wanted, start = [], 0
    for length in lengths:
        gaps = [(old[t] - rollout[t]).item() for t in range(start, start + length)]
        for gap in gaps:
            weight = math.exp(sum(gaps) if "sequence" in tis else gap)
            kept = weight if 0.6 <= weight <= 1.4 else 0.0
            wanted.append(kept if "mask" in tis else min(weight, 1.4))
        start += length
    found = importance_weight(cfg, old, micro_batch(old, A, lengths=lengths, rollout=rollout))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    assert len(set(wanted)) > 1


@pytest.mark.parametrize("tis", TIS)
def test_importance_weights_stay_finite(tis: Any):
    old = torch.full((2000,), -0.1)
    batch = micro_batch(old, torch.ones_like(old), rollout=old - 1)  # e^2000 for the sequence
    weight = importance_weight(Config(tis=tis, tis_cap=2.0), old, batch)
    assert (weight == (0 if "mask" in tis else 2)).all()


# ---- aggregation and splits ----


def test_loss_weights_by_hand():
    """8 sequences and 20 tokens in the update; this micro-batch has sequences of 1 and 2 tokens."""

    def weights(aggregation: str, sequences: int = 8, count: int = 20) -> list[float]:
        given: dict[str, Any] = {"sequences": sequences, "tokens": count, "max_response_tokens": 5}
        return loss_weights([1, 2], aggregation=aggregation, **given)

    assert weights("seq-mean-token-mean") == pytest.approx([1 / 8, 1 / 16])
    assert weights("token-mean") == pytest.approx([1 / 20] * 2)
    assert weights("seq-mean-token-sum-norm") == pytest.approx([1 / 40] * 2)
    assert weights("token-mean", 0, 0) == [1, 1]  # every response is masked: no division by 0
    with pytest.raises(ValueError, match="loss_aggregation: 'mean' is not known; use seq-mean-token-mean, token-mean"):
        weights("mean")


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"])
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=8), data=st.data())
@settings(max_examples=15)
def test_loss_and_gradient_do_not_depend_on_the_split(aggregation: str, lengths: list[int], data: st.DataObject):
    """Any sequences in any order in two micro-batches; the first sequence is truncated and masked."""
    total = sum(lengths)
    logprobs, old, A = tokens(total, seed=total)
    cfg = Config(dual_clip=2.0, kl_coef=0.1, entropy_coef=0.1, tis="sequence_truncate")
    of_update: dict[str, Any] = {"sequences": len(lengths) - 1, "tokens": total - lengths[0], "max_response_tokens": 9}
    places = list(torch.arange(total).split(lengths))

    def update(parts: list[list[int]], rule: Rule) -> tuple[float, Tensor]:
        leaf, losses = logprobs.clone().requires_grad_(), []
        for part in parts:
            index, own = torch.cat([places[i] for i in part]), [lengths[i] for i in part]
            each = loss_weights(own, aggregation=aggregation, **of_update)
            each = torch.tensor([0.0 if i == 0 else x for i, x in zip(part, each, strict=True)], dtype=torch.float64)
            batch = micro_batch(
                old[index],
                A[index],
                lengths=own,
                weights=each.repeat_interleave(torch.tensor(own)),
                rollout=old[index] - 0.1 * A[index],
                ref=old[index] + 0.3,
            )
            losses.append(grpo_loss(cfg, rule, batch, leaf[index], leaf[index].exp())[0])
        loss = torch.stack(losses).sum()
        return loss.item(), torch.autograd.grad(loss, leaf)[0]

    order = data.draw(st.permutations(range(len(lengths))))
    middle = data.draw(st.integers(1, len(lengths) - 1))
    for name in ("band", "gspo", "cppo"):  # rules of single tokens and of whole sequences
        rule = load_rule(name, {})
        loss, gradient = update([list(range(len(lengths)))], rule)
        split_loss, split_gradient = update([list(order[:middle]), list(order[middle:])], rule)
        assert split_loss == pytest.approx(loss, rel=1e-9, abs=1e-12)
        torch.testing.assert_close(split_gradient, gradient, rtol=1e-9, atol=1e-12)
        assert (gradient[: lengths[0]] == 0).all()


# ---- statistics ----


def summary(stats: Stats) -> dict[str, float]:
    """Means by metric name, as step_metrics forms them; a count of 0 gives none."""
    pairs = {name: (float(total), float(count)) for name, (total, count) in stats.pairs().items()}
    return {name: total / count for name, (total, count) in pairs.items() if count}


def collect(cfg: Config, rule: Rule, *batches: tuple[Tensor, MicroBatch]) -> Stats:
    stats = Stats(0)
    for logprobs, batch in batches:
        leaf = logprobs.clone().requires_grad_()
        loss, of_tokens = grpo_loss(cfg, rule, batch, leaf, torch.zeros_like(leaf))
        stats.add(batch, loss, leaf, torch.zeros_like(leaf), of_tokens)
    return stats


@pytest.mark.parametrize("parts", [1, 3])
def test_statistics_by_counting(parts: int):
    logprobs, old, A = tokens(3000, 1)
    lower, upper = 0.7, 1.4
    rule, cfg = load_rule("fixed", {"low": 0.3, "high": 0.4}), replace(PLAIN, dual_clip=3.0)
    pieces = zip(logprobs.chunk(parts), old.chunk(parts), A.chunk(parts), strict=True)
    stats = collect(cfg, rule, *((new, micro_batch(before, a)) for new, before, a in pieces))
    rows = list(zip((logprobs - old).exp().tolist(), old.exp().tolist(), A.tolist(), strict=True))
    edges = {"": (0, 1.1), "/p<0.01": (0, 0.01), "/p<0.2": (0, 0.2), "/p<0.4": (0.2, 0.4), "/p<0.6": (0.4, 0.6)}
    edges |= {"/p<0.8": (0.6, 0.8), "/p<=1": (0.8, 1.1)}
    wanted = {}
    for suffix, (low, high) in edges.items():
        part = [row for row in rows if low <= row[1] < high]
        gains, losses = [row for row in part if row[2] > 0], [row for row in part if row[2] < 0]
        wanted[f"clip/up{suffix}"] = sum(r > upper for r, _, _ in gains) / len(gains)
        wanted[f"clip/down{suffix}"] = sum(r < lower for r, _, _ in losses) / len(losses)
    clipped = [(a > 0 and r > upper) or (a < 0 and (r < lower or r > 3)) for r, _, a in rows]
    wanted |= {"clip/fraction": sum(clipped) / len(rows), "ratio/mean": sum(r for r, _, _ in rows) / len(rows)}
    wanted |= {"clip/weight_mean": sum(row[0] for row, c in zip(rows, clipped, strict=True) if not c) / len(rows)}
    wanted |= {"band/lower_mean": lower, "band/upper_mean": upper}
    assert summary(stats) == pytest.approx(wanted)
    assert float(stats.ratio_max) == pytest.approx(max(r for r, _, _ in rows))


@pytest.mark.parametrize("name", NAMES)
def test_clip_fraction_is_the_share_without_gradient(name: str):
    """Over all tokens; clip/up and clip/down over those with A > 0 and A < 0. CISPO drops none."""
    logprobs, old, A = tokens(400)
    torch.manual_seed(0)  # clip_cov
    batch = micro_batch(old, A, lengths=[3] * 130 + [10])
    _, gradient, stats = run_loss(PLAIN, load_rule(name, {}), batch, logprobs)
    without = (gradient == 0) & (A != 0)
    assert torch.equal(stats["clip/fraction"], without)
    for metric, side in (("clip/up", A > 0), ("clip/down", A < 0)):
        clipped, mask = stats[metric]
        assert torch.equal(clipped & mask, without & side) and torch.equal(mask, side)
    assert without.any() == (name not in ("none", "cispo", "sapo", "gppo", "ce_gppo", "dgpo", "drpo", "kl_cov"))


def test_bins_end_at_their_edges():
    edges = torch.tensor([0.01, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    old = torch.cat([edges * 0.9999, edges * 1.0001]).log()
    just_below = (torch.arange(10) < 5).double()
    rule = Rule("mine", lambda ratio: 1 - just_below)  # w = 0 for the tokens just below an edge
    found = summary(collect(PLAIN, rule, (old, micro_batch(old, torch.ones_like(old)))))
    shares = [found[f"clip/up{b}"] for b in ("/p<0.01", "/p<0.2", "/p<0.4", "/p<0.6", "/p<0.8", "/p<=1")]
    assert shares == pytest.approx([1, 2 / 3, 1 / 2, 1 / 2, 1 / 2, 0])
    certain = torch.zeros(2, dtype=torch.float64)  # p = 1 is in the last bin; the others are empty, not 0
    found = summary(collect(PLAIN, Rule("mine", lambda ratio: 0 * ratio), (certain, micro_batch(certain, certain + 1))))
    assert {k: v for k, v in found.items() if k.startswith("clip/up")} == {"clip/up": 1, "clip/up/p<=1": 1}
    assert not any(name.startswith("clip/down") for name in found)


def test_an_infinite_bound_has_no_mean():
    logprobs, old, A = tokens(200)
    found = summary(collect(replace(PLAIN, dual_clip=2.0), load_rule("none", {}), (logprobs, micro_batch(old, A))))
    assert "band/upper_mean" not in found and found["band/lower_mean"] == 0 and found["clip/up"] == 0
    assert found["clip/fraction"] > 0  # dual clip


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_read_from_the_device(name: str):
    """On the meta device there are no values: reading one raises."""
    x = torch.empty(6, device="meta")
    batch = replace(micro_batch(x, x, ref=x), sequence_ids=torch.empty(6, dtype=torch.int64, device="meta"))
    for tis in ("none", *TIS):
        cfg = Config(tis=tis, entropy_coef=0.1)
        loss, of_tokens = grpo_loss(cfg, load_rule(name, {}), batch, x.clone().requires_grad_(), x)
        Stats(0).add(batch, loss, x, x, of_tokens)


# ---- advantages ----


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert group_advantages(rewards, "maxrl").tolist() == [[3.0, -1.0, -1.0, -1.0], [0.0] * 4, [0.0] * 4]
    assert group_advantages(rewards, "group_mean")[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(rewards, "rloo")[0].tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert group_advantages(rewards, "group_std")[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    with pytest.raises(GraderError, match="advantage: maxrl needs rewards from 0"):
        group_advantages(2 * rewards - 1, "maxrl")
    with pytest.raises(ValueError, match="advantage: 'max'.*group_std, group_mean, rloo or maxrl"):
        group_advantages(rewards, "max")


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "rloo", "maxrl"])
def test_advantages_of_equal_rewards_are_exactly_zero(kind: str):
    for size in range(2, 20):
        for reward in (0.1, 0.7, 1 / 3, 1.0, 0.0):
            rewards = torch.full((1, size), reward, dtype=torch.float64)
            assert (group_advantages(rewards, kind) == 0).all(), (size, reward)
