"""Cutting and laying out micro-batches: budgets and order, and that nothing computed depends on the cut.

Tolerance of the equalities: 1e-5 of the largest log-prob or gradient entry, float32 on one thread; measured: 1e-6.
"""

from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, make_batch, make_sample, policy_options, ragged, tiny_model

from configs import load
from configs.schema import Config, Plan
from trainer.attention import register_attention
from trainer.batching import assign_to_ranks, loss_weights, make_micro_batches, make_minibatches
from trainer.policy import LogprobModel
from trainer.rollout import Completion

register_attention()

CPU = torch.device("cpu")
# Three samples of every prompt, one after another.
SEQUENCES = [(ragged(12, longest=24)[i - i % 3][0], r, a) for i, (_, r, a) in enumerate(ragged(12, longest=24))]
LAYOUTS = ["padded", "packed", "by_sequence"]
OPTIONS = policy_options(temperature=0.7)


# ---- cut ----


@given(
    sequences=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 4), st.booleans()), min_size=1, max_size=40),
    budget=st.integers(60, 300),
    padded=st.booleans(),
    more=st.integers(0, 5),
)
@settings(max_examples=300)
def test_cut_keeps_every_sequence_once_within_the_budget(
    sequences: list[tuple[int, int, bool]], budget: int, padded: bool, more: int
):
    lengths, groups, zeros = ([sequence[k] for sequence in sequences] for k in range(3))
    settings = {"groups": groups, "zeros": zeros, "budget": budget, "padded": padded}
    alone = make_micro_batches(lengths, **settings, at_least=1)
    parts = min(len(lengths), len(alone) + more)
    cuts = make_micro_batches(lengths, **settings, at_least=parts)
    assert sorted(i for part in cuts for i in part) == list(range(len(lengths)))
    assert len(cuts) == parts and all(cuts)
    for part in cuts:
        of_part = [lengths[i] for i in part]
        assert (len(part) * max(of_part) if padded else sum(of_part)) <= budget
    order = [groups[i] for part in cuts for i in part]
    assert len([g for g, _ in groupby(order)]) == len(set(groups))  # no group is met twice
    heard = {g for g, zero in zip(groups, zeros, strict=True) if not zero}
    first = next((part for part in cuts if heard & {groups[i] for i in part}), cuts[0])
    longest = [n for n, g in zip(lengths, groups, strict=True) if g in heard] or lengths
    assert max(longest) in [lengths[i] for i in first]  # out of memory shows in the first backward pass
    if len(alone) > 1:
        kinds = [g in heard for g in order]
        assert kinds == sorted(kinds)  # zero-advantage groups first


def test_cut_by_hand():
    # Longest first: 5, 4 | 3, 3, 2 would be 9 and 8 tokens packed; padded, 5 + 5 = 10 and 3 * 3 = 9.
    def alone(lengths: list[int], **keys: Any) -> list[list[int]]:
        return make_micro_batches(lengths, groups=list(range(len(lengths))), zeros=[False] * len(lengths), **keys)

    assert alone([3, 5, 2, 4, 3], budget=9, padded=False, at_least=1) == [[1, 3], [0, 4, 2]]
    assert alone([3, 5, 2, 4, 3], budget=10, padded=True, at_least=1) == [[1, 3], [0, 4, 2]]
    assert alone([3, 5, 2, 4, 3], budget=9, padded=True, at_least=1) == [[1], [3, 0], [4, 2]]
    assert alone([3, 5, 2, 4, 3], budget=9, padded=False, at_least=3) == [[1, 3], [0], [4, 2]]
    assert alone([7], budget=7, padded=True, at_least=1) == [[0]]
    assert alone([4, 4, 4, 4], budget=8, padded=True, at_least=1) == [[0, 1], [2, 3]]  # equal lengths in their order


def test_groups_stay_together():
    def split(lengths: list[int], groups: list[int], budget: int) -> list[list[int]]:
        zeros = [False] * len(lengths)
        return make_micro_batches(lengths, groups, zeros, budget=budget, padded=True, at_least=1)

    # Groups of 5, 1 and of 4, 3: by length alone 5, 4, 3, 1.
    assert split([4, 5, 3, 1], [7, 2, 7, 2], 100) == [[1, 3, 0, 2]]
    # 5, 1 fill 10 of 12 slots; 4 makes 15. A part that begins inside a group is as wide as what follows.
    assert split([4, 5, 3, 1], [7, 2, 7, 2], 12) == [[1, 3], [0, 2]]
    assert split([2, 5, 4, 1], [0, 1, 2, 1], 8) == [[1], [3, 2], [0]]


def test_zero_advantage_groups_come_first():
    def split(zeros: list[bool], budget: int) -> list[list[int]]:
        lengths, groups = [4, 5, 3, 1, 2], [7, 2, 7, 2, 3]
        return make_micro_batches(lengths, groups, zeros, budget=budget, padded=False, at_least=1)

    some = [True, True, False, True, True]  # all but group 7
    assert split(some, 8) == [[1, 3, 4], [0, 2]]
    assert split([True] * 5, 8) == [[1, 3], [0, 2], [4]]
    assert split(some, 15) == [[1, 3, 0, 2, 4]]  # one pass: nothing to skip


# ---- ranks ----


@given(lengths=st.lists(st.integers(1, 4096), min_size=8, max_size=60), ranks=st.integers(1, 8))
@settings(max_examples=300)
def test_ranks_get_about_the_same_number_of_tokens(lengths: list[int], ranks: int):
    shares = assign_to_ranks(lengths, list(range(len(lengths))), ranks)
    assert sorted(i for chosen in shares for i in chosen) == list(range(len(lengths)))
    counts = [len(chosen) for chosen in shares]
    assert max(counts) - min(counts) <= 1
    tokens = [sum(lengths[i] for i in chosen) for chosen in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_assign_to_ranks_by_hand():
    assert assign_to_ranks([1, 9, 3, 7, 5, 2], [0, 1, 2, 3, 4, 5], 2) == [[1, 2, 5], [3, 4, 0]]  # 9 3 2 and 7 5 1
    groups = [0, 0, 1, 1, 2, 2, 3, 3]
    assert assign_to_ranks([1, 9, 3, 7, 5, 2, 1, 1], groups, 2) == [[0, 1, 6, 7], [2, 3, 4, 5]]  # 10 2 and 10 7
    assert assign_to_ranks([1, 9, 3, 7, 5, 2], [0, 0, 1, 1, 2, 2], 2) == [[1, 2, 5], [3, 4, 0]]  # 3 groups, 2 ranks
    assert assign_to_ranks([1, 9, 3, 7], [0, 0, 0, 1], 2) == [[1, 0], [3, 2]]  # groups of unequal size
    assert assign_to_ranks([1, 2, 3], [0, 1, 2], 2) == [[2], [1, 0]]


# ---- minibatches ----


def run_of(cfg: Config, *, processes: int = 1, step: int = 0) -> Any:
    """What `make_minibatches` needs of a run, on one process."""
    plan = Plan(cfg)
    ranks = SimpleNamespace(gather=lambda rows: rows, device=CPU, rank=0)
    return SimpleNamespace(cfg=cfg, plan=plan, ranks=ranks, policy=SimpleNamespace(layout="padded"), step=step)


def config(**changed: object) -> Config:
    keys = {"prompts_per_step": 4, "samples_per_prompt": 2, "minibatches": 2, "micro_batch_tokens": 64, **changed}
    keys |= {"max_prompt_tokens": 8, "max_response_tokens": 24}
    return load(Config, [word for key, value in keys.items() for word in (f"--{key}", str(value))])


def test_a_minibatch_is_chosen_by_the_index_of_the_sample():
    """Samples from elsewhere, such as a replay buffer, go where their index says and move no other sample."""
    fresh = [make_sample([3], [4] * (i + 1), index=i) for i in range(8)]
    replayed = [make_sample([5], [6, 7], index=1, step=-1), make_sample([5], [6, 7, 8], index=6, step=-2)]
    for samples in (fresh + replayed, replayed[::-1] + fresh[::-1]):
        found = make_minibatches(run_of(config()), samples)
        indices = [sorted((s.index, s.step) for batch in minibatch for s in batch.samples) for minibatch in found]
        assert indices == [[(0, 0), (1, -1), (1, 0), (2, 0), (3, 0)], [(4, 0), (5, 0), (6, -2), (6, 0), (7, 0)]]
        for minibatch in found:  # seq-mean-token-mean over 5 sequences
            assert sum(batch.loss_weights.sum().item() for batch in minibatch) == pytest.approx(1)


@pytest.mark.parametrize("added, budget, found", [(1, 64, 2), (1, 33, 0), (2, 33, 3), (-3, 64, 0), (-4, 64, 0)])
def test_every_rank_needs_a_sequence_for_each_micro_batch(added: int, budget: int, found: int):
    """Two ranks share a minibatch of 4 + `added` samples. found: micro-batches of a rank; 0: refused."""
    indices = [0, 1, 2, 3, 3, 3][: 4 + added] + [4, 5, 6, 7]
    samples = [make_sample([3], [4] * 24, index=i) for i in indices]
    run = run_of(config(micro_batch_tokens=budget))
    run.plan = SimpleNamespace(rank=0, processes=2, minibatches=2, sequences_per_minibatch=4)
    if found:
        assert len(make_minibatches(run, samples)[0]) == found
    else:
        with pytest.raises(ValueError, match=f"a minibatch has {4 + added} samples for 2 processes.*a multiple of 2"):
            make_minibatches(run, samples)


def test_advantages_are_one_number_or_one_per_token_and_rollout_logprobs_are_the_samples():
    completion = Completion([4, 5, 6], [-0.1, -0.2, -0.3], "stop", "")
    samples = [make_sample([3], [4, 5], index=0, advantage=-2.0)]
    samples += [replace(make_sample([3], [4], index=1, advantage=[0.5, 1.0, -1.5]), completion=completion)]
    (batch,), _ = make_minibatches(run_of(config()), samples + [make_sample([3], [4], index=i) for i in range(4, 6)])
    order = [s.index for s in batch.samples]
    assert order == [1, 0] and batch.sequence_ids.tolist() == [0, 0, 0, 1, 1]
    assert batch.advantages.tolist() == [0.5, 1.0, -1.5, -2.0, -2.0]
    assert batch.rollout_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -1.0, -1.0])


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        ("seq-mean-token-mean", [1 / (2 * 2), 1 / (2 * 4)]),
        ("token-mean", [1 / 6, 1 / 6]),
        ("seq-mean-token-sum-norm", [1 / (2 * 24), 1 / (2 * 24)]),
    ],
)
def test_truncated_responses_carry_no_loss_and_count_in_no_denominator(aggregation: str, expected: list[float]):
    samples = [make_sample([3], [4] * n, index=i) for i, n in enumerate((2, 4, 3))]
    samples[2] = replace(samples[2], completion=replace(samples[2].completion, finish_reason="length"))
    other = [make_sample([3], [4], index=i) for i in range(4, 6)]
    cfg = config(mask_truncated="true", loss_aggregation=aggregation)
    (batch,), _ = make_minibatches(run_of(cfg), samples + other)
    weights = {s.index: batch.loss_weights[batch.sequence_ids == i] for i, s in enumerate(batch.samples)}
    assert not weights[2].any()
    for i, weight in enumerate(expected):
        assert weights[i].tolist() == pytest.approx([weight] * len(weights[i]))
    whole = [replace(s, completion=replace(s.completion, finish_reason="length")) for s in samples]
    (batch,), _ = make_minibatches(run_of(cfg), whole + other)
    assert not batch.loss_weights.any()  # every response truncated: zeros, not a division by zero


# ---- model inputs ----


def test_model_inputs_by_hand():
    prompts, responses = [[1, 2], [3]], [[4], [5, 6, 0]]  # 0 is a token like any other; the last ones are no input
    padded = make_batch(prompts, responses, layout="padded")
    assert padded.input_ids.tolist() == [[1, 2, 0], [3, 5, 6]]
    assert padded.attention_mask is not None and padded.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert padded.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert padded.predictors.tolist() == [1, 3, 4, 5] and padded.targets.tolist() == [4, 5, 6, 0]
    packed = make_batch(prompts, responses, layout="packed")
    assert packed.input_ids.tolist() == [[1, 2, 3, 5, 6]] and packed.attention_mask is None
    assert packed.position_ids.tolist() == [[0, 1, 0, 1, 2]]
    assert packed.predictors.tolist() == [1, 2, 3, 4] and packed.targets.tolist() == [4, 5, 6, 0]
    assert packed.sequences is None and packed.places is None


def test_a_prompt_is_packed_once_for_its_samples():
    prompts, responses = [[1, 2], [1, 2], [3], [1, 2]], [[4, 9], [5, 6, 9], [7, 9], [8, 9]]
    batch = make_batch(prompts, responses, layout="by_sequence")
    assert batch.input_ids.tolist() == [[1, 2, 4, 5, 6, 3, 7, 1, 2, 8]] and batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 0, 1, 2]]
    assert batch.predictors.tolist() == [1, 2, 1, 3, 4, 5, 6, 8, 9]
    assert batch.targets.tolist() == [4, 9, 5, 6, 9, 7, 9, 8, 9]
    assert batch.sequences is not None and batch.places is not None
    assert batch.sequences.tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]]  # 0 beyond the end
    assert batch.places.tolist() == [0, 1, 2, 6, 7, 8, 9, 12, 13, 14]  # of a shared prompt: its first sample's


def test_the_common_start_of_two_prompts_is_packed_once():
    batch = make_batch([[1, 2, 3], [1, 2, 4], [1]], [[5, 9], [6, 9], [7, 9]], layout="by_sequence")
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 4, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 1]]
    assert batch.predictors.tolist() == [2, 3, 4, 5, 0, 6]
    assert batch.sequences is not None and batch.places is not None
    assert batch.sequences.tolist() == [[0, 1, 2, 3], [0, 1, 4, 5], [0, 6, 0, 0]]
    assert batch.places.tolist() == [0, 1, 2, 3, 6, 7, 9]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_predictors_are_the_positions_before_the_targets(layout: str):
    batch = make_batch([p for p, _, _ in SEQUENCES], [r for _, r, _ in SEQUENCES], layout=layout)
    flat, start = batch.input_ids.flatten(), 0
    for prompt, response, _ in SEQUENCES:
        own = batch.predictors[start : start + len(response)]
        assert flat[own].tolist() == [prompt[-1], *response[:-1]]
        assert batch.targets[start : start + len(response)].tolist() == response
        start += len(response)
    assert start == len(batch.targets)


# ---- the cut changes nothing ----


def logprobs_alone(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """(T,) by the definition: all logits of one sequence, softmax over the tokenizer's rows at temperature."""
    logits = model(torch.tensor([prompt + response])).logits[0, :, :VOCABULARY] / OPTIONS.temperature
    chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return chosen.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def model_for(layout: str, *, tied: bool):
    model = tiny_model(tied=tied).eval()
    if layout == "by_sequence":
        model.set_attn_implementation("sdpa_by_sequence")
    return model


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(one: torch.Tensor, other: torch.Tensor, largest: float) -> None:
    assert (one - other).abs().max().item() < 1e-5 * largest


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_any_micro_batch_tokens_and_any_order_give_the_gradient_of_the_definition(
    tied: bool, layout: str, aggregation: str
):
    causal_lm, definition = model_for(layout, tied=tied), tiny_model(tied=tied).eval()
    model = LogprobModel(causal_lm, OPTIONS)
    total = sum(len(r) for _, r, _ in SEQUENCES)
    expected_loss = torch.zeros(())
    for prompt, response, advantage in SEQUENCES:
        scale = {
            "seq-mean-token-mean": 1 / (len(SEQUENCES) * len(response)),
            "token-mean": 1 / total,
            "seq-mean-token-sum-norm": 1 / (len(SEQUENCES) * 24),
        }[aggregation]
        expected_loss = expected_loss - scale * advantage * logprobs_alone(definition, prompt, response).sum()
    expected = gradient(definition, expected_loss)
    largest = max(g.abs().max().item() for g in expected.values())

    prompt_number = {tuple(p): k for k, (p, _, _) in enumerate(SEQUENCES)}
    for budget, order in [(31, 1), (64, 1), (10_000, 1), (64, -1)]:
        sequences = SEQUENCES[::order]
        loss = torch.zeros(())
        groups = [prompt_number[tuple(p)] for p, _, _ in sequences]
        cuts = make_micro_batches(
            [len(p) + len(r) for p, r, _ in sequences],
            groups=groups,
            zeros=[False] * len(sequences),
            budget=budget,
            padded=layout != "packed",
            at_least=1,
        )
        assert (len(cuts) == 1) == (budget == 10_000)
        for part in cuts:
            prompts, responses, advantages = zip(*[sequences[i] for i in part], strict=True)
            lengths = torch.tensor([len(r) for r in responses])
            logprobs, _ = model(make_batch(prompts, responses, layout=layout))
            weights = loss_weights(
                lengths.tolist(),
                aggregation=aggregation,
                sequences=len(sequences),
                tokens=total,
                max_response_tokens=24,
            )
            weights = torch.tensor(weights).repeat_interleave(lengths)
            loss = loss - (weights * torch.tensor(advantages).repeat_interleave(lengths) * logprobs).sum()
        for name, value in gradient(causal_lm, loss).items():
            assert_close(value, expected[name], largest)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "sdpa_by_sequence"])
def test_packed_sequences_do_not_see_each_other(attention: str):
    causal_lm = tiny_model(tied=True).eval()
    model = LogprobModel(causal_lm, OPTIONS)
    prompts, responses = [p for p, _, _ in SEQUENCES], [r for _, r, _ in SEQUENCES]
    layout = "by_sequence" if attention == "sdpa_by_sequence" else "packed"
    together = sum((p + r for p, r, _ in SEQUENCES), [])[len(prompts[0]) :]
    with torch.no_grad():
        expected = torch.cat([logprobs_alone(causal_lm, p, r) for p, r in zip(prompts, responses, strict=True)])
        causal_lm.set_attn_implementation(attention)
        packed, _ = model(make_batch(prompts, responses, layout=layout))
        one_long_text, _ = model(make_batch(prompts[:1], [together], layout=layout))
    assert_close(packed, expected, expected.abs().max().item())
    assert (one_long_text[-5:] - expected[-5:]).abs().max() > 0.1  # without the restarts they would


def test_a_sliding_window_is_kept_by_sequence():
    causal_lm = tiny_model(tied=True).eval()
    for layer in causal_lm.model.layers:
        layer.self_attn.sliding_window = 5  # type: ignore[union-attr]
    causal_lm.config.layer_types = ["sliding_attention"] * 2
    causal_lm.model.has_sliding_layers, causal_lm.config.sliding_window = True, 5
    model = LogprobModel(causal_lm, OPTIONS)
    prompts, responses = [p for p, _, _ in SEQUENCES], [r for _, r, _ in SEQUENCES]
    with torch.no_grad():
        expected, _ = model(make_batch(prompts, responses, layout="padded"))
        causal_lm.set_attn_implementation("sdpa_by_sequence")
        found, _ = model(make_batch(prompts, responses, layout="by_sequence"))
        for layer in causal_lm.model.layers:
            layer.self_attn.sliding_window = None  # type: ignore[union-attr]
        without, _ = model(make_batch(prompts, responses, layout="by_sequence"))
    assert_close(found, expected, expected.abs().max().item())
    assert (without - expected).abs().max() > 0.1
