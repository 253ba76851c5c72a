"""Cutting and laying out micro-batches: budgets and order, and that nothing computed depends on the cut.

Tolerance of the equalities: 1e-5 of the largest log-prob or gradient entry, float32 on one thread; measured: 1e-6.
"""

from array import array
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, ragged, tiny_model

from bandpo.objective import aggregation_weights
from trainer.batching import TokenRow, cut, deal, group_numbers, lay_out
from trainer.policy import LogprobModel, PolicyOptions, register_attention

register_attention()

CPU = torch.device("cpu")
# Three samples of every prompt, one after another.
SEQUENCES = [(ragged(12, longest=24)[i - i % 3][0], r, a) for i, (_, r, a) in enumerate(ragged(12, longest=24))]
LAYOUTS = ["padded", "packed", "by_sequence"]
OPTIONS = PolicyOptions(
    sharding="none",
    precision="float32",
    attention="sdpa",
    gradient_checkpointing=False,
    compile=False,
    logprob_kernel="chunked",
    temperature=0.7,
    vocab_size=VOCABULARY,
    chunk_tokens=16,
    trust_remote_code=False,
)


# ---- cut ----


@given(
    sequences=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 4), st.booleans()), min_size=1, max_size=40),
    budget=st.integers(60, 300),
    padded=st.booleans(),
    more=st.integers(0, 5),
)
@settings(max_examples=300, deadline=None)
def test_cut_keeps_every_sequence_once_within_the_budget(
    sequences: list[tuple[int, int, bool]], budget: int, padded: bool, more: int
):
    lengths, groups, signal = ([sequence[k] for sequence in sequences] for k in range(3))
    settings = {"groups": groups, "signal": signal, "budget": budget, "padded": padded}
    alone = cut(lengths, **settings, parts=1)
    parts = min(len(lengths), len(alone) + more)
    cuts = cut(lengths, **settings, parts=parts)
    assert sorted(i for part in cuts for i in part) == list(range(len(lengths)))
    assert len(cuts) == parts and all(cuts)
    for part in cuts:
        of_part = [lengths[i] for i in part]
        assert (len(part) * max(of_part) if padded else sum(of_part)) <= budget
    order = [groups[i] for part in cuts for i in part]
    assert len([g for g, _ in groupby(order)]) == len(set(groups))  # no group is met twice
    heard = {g for g, has_signal in zip(groups, signal, strict=True) if has_signal}
    first = next((part for part in cuts if heard & {groups[i] for i in part}), cuts[0])
    longest = [n for n, g in zip(lengths, groups, strict=True) if g in heard] or lengths
    assert max(longest) in [lengths[i] for i in first]  # out of memory shows in the first backward pass
    if len(alone) > 1:
        kinds = [g in heard for g in order]
        assert kinds == sorted(kinds)  # those without a signal first


def test_cut_by_hand():
    # Longest first: 5, 4 | 3, 3, 2 would be 9 and 8 tokens packed; padded, 5 + 5 = 10 and 3 * 3 = 9.
    def alone(lengths: list[int], **keys: Any) -> list[list[int]]:
        return cut(lengths, groups=list(range(len(lengths))), signal=[True] * len(lengths), **keys)

    assert alone([3, 5, 2, 4, 3], budget=9, padded=False, parts=1) == [[1, 3], [0, 4, 2]]
    assert alone([3, 5, 2, 4, 3], budget=10, padded=True, parts=1) == [[1, 3], [0, 4, 2]]
    assert alone([3, 5, 2, 4, 3], budget=9, padded=True, parts=1) == [[1], [3, 0], [4, 2]]
    assert alone([3, 5, 2, 4, 3], budget=9, padded=False, parts=3) == [[1, 3], [0], [4, 2]]
    assert alone([7], budget=7, padded=True, parts=1) == [[0]]
    assert alone([4, 4, 4, 4], budget=8, padded=True, parts=1) == [[0, 1], [2, 3]]  # equal lengths in their order
    with pytest.raises(AssertionError, match="3 micro-batches cannot be made of 2 sequences"):
        alone([1, 2], budget=10, padded=True, parts=3)


def test_groups_stay_together():
    # Groups of 5, 1 and of 4, 3: by length alone 5, 4, 3, 1.
    every = [True] * 4
    assert cut([4, 5, 3, 1], groups=[7, 2, 7, 2], signal=every, budget=100, padded=True, parts=1) == [[1, 3, 0, 2]]
    # 5, 1 fill 10 of 12 slots; 4 makes 15. A part that begins inside a group is as wide as what follows.
    assert cut([4, 5, 3, 1], groups=[7, 2, 7, 2], signal=every, budget=12, padded=True, parts=1) == [[1, 3], [0, 2]]
    assert cut([2, 5, 4, 1], groups=[0, 1, 2, 1], signal=every, budget=8, padded=True, parts=1) == [[1], [3, 2], [0]]


def test_groups_without_a_signal_come_first():
    keys = {"groups": [7, 2, 7, 2, 3], "padded": False, "parts": 1}
    some = [False, False, True, False, False]  # of group 7 alone
    assert cut([4, 5, 3, 1, 2], signal=some, budget=8, **keys) == [[1, 3, 4], [0, 2]]
    assert cut([4, 5, 3, 1, 2], signal=[False] * 5, budget=8, **keys) == [[1, 3], [0, 2], [4]]
    assert cut([4, 5, 3, 1, 2], signal=some, budget=15, **keys) == [[1, 3, 0, 2, 4]]  # one pass: nothing to spare


# ---- deal ----


@given(lengths=st.lists(st.integers(1, 4096), min_size=1, max_size=30), ranks=st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_deal_is_even(lengths: list[int], ranks: int):
    lengths = lengths * ranks
    shares = deal(lengths, list(range(len(lengths))), [True] * len(lengths), ranks)
    assert sorted(i for chosen in shares for i in chosen) == list(range(len(lengths)))
    assert {len(chosen) for chosen in shares} == {len(lengths) // ranks}
    tokens = [sum(lengths[i] for i in chosen) for chosen in shares]
    assert max(tokens) - min(tokens) <= max(lengths) - min(lengths)


def test_deal_by_hand():
    def all_heard(lengths: list[int], groups: list[int]) -> list[list[int]]:
        return deal(lengths, groups, [True] * len(lengths), 2)

    assert all_heard([1, 9, 3, 7, 5, 2], [0, 1, 2, 3, 4, 5]) == [[1, 2, 5], [3, 4, 0]]  # 9 3 2 and 7 5 1
    assert all_heard([1, 9, 3, 7, 5, 2, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3]) == [[0, 1, 6, 7], [2, 3, 4, 5]]  # 10 2, 10 7
    assert all_heard([1, 9, 3, 7, 5, 2], [0, 0, 1, 1, 2, 2]) == [[1, 2, 5], [3, 4, 0]]  # three groups, two ranks
    assert all_heard([1, 9, 3, 7], [0, 0, 0, 1]) == [[1, 0], [3, 2]]  # groups of unequal size
    with pytest.raises(AssertionError, match="3 sequences cannot be dealt out evenly to 2 ranks"):
        all_heard([1, 2, 3], [0, 1, 2])


def test_deal_gives_every_rank_as_much_without_a_signal():
    """By tokens alone one rank would have both that have a signal, 9 and 6, and the other one none."""
    assert deal([9, 8, 7, 6], [0, 1, 2, 3], [True] * 4, 2) == [[0, 3], [1, 2]]
    assert deal([9, 8, 7, 6], [0, 1, 2, 3], [True, False, False, True], 2) == [[0, 2], [3, 1]]


def test_group_numbers():
    rows = [
        TokenRow(array("q", p), array("q", [1]), array("d", [0.0]), 1.0, 0, 0) for p in ([5, 6], [5, 6], [5], [5, 6])
    ]
    assert group_numbers(rows) == [0, 0, 1, 2]


# ---- lay_out ----


def test_lay_out_by_hand():
    prompts, responses = [[1, 2], [3]], [[4], [5, 6, 0]]  # 0 is a token like any other; the last ones are no input
    padded = lay_out(prompts, responses, layout="padded", device=CPU)
    assert padded.input_ids.tolist() == [[1, 2, 0], [3, 5, 6]]
    assert padded.attention_mask is not None and padded.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert padded.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert padded.predictors.tolist() == [1, 3, 4, 5] and padded.targets.tolist() == [4, 5, 6, 0]
    packed = lay_out(prompts, responses, layout="packed", device=CPU)
    assert packed.input_ids.tolist() == [[1, 2, 3, 5, 6]] and packed.attention_mask is None
    assert packed.position_ids.tolist() == [[0, 1, 0, 1, 2]]
    assert packed.predictors.tolist() == [1, 2, 3, 4] and packed.targets.tolist() == [4, 5, 6, 0]
    assert packed.sequences is None and packed.places is None


def test_a_prompt_is_laid_out_once_for_its_samples():
    prompts, responses = [[1, 2], [1, 2], [3], [1, 2]], [[4, 9], [5, 6, 9], [7, 9], [8, 9]]
    batch = lay_out(prompts, responses, layout="by_sequence", device=CPU)
    assert batch.input_ids.tolist() == [[1, 2, 4, 5, 6, 3, 7, 1, 2, 8]] and batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 0, 1, 2]]
    assert batch.predictors.tolist() == [1, 2, 1, 3, 4, 5, 6, 8, 9]
    assert batch.targets.tolist() == [4, 9, 5, 6, 9, 7, 9, 8, 9]
    assert batch.sequences is not None and batch.places is not None
    assert batch.sequences.tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]]  # 0 beyond the end
    assert batch.places.tolist() == [0, 1, 2, 6, 7, 8, 9, 12, 13, 14]  # of a shared prompt: its first sample's


@pytest.mark.parametrize("layout", LAYOUTS)
def test_predictors_are_the_positions_before_the_targets(layout: str):
    batch = lay_out([p for p, _, _ in SEQUENCES], [r for _, r, _ in SEQUENCES], layout=layout, device=CPU)
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
        cuts = cut(
            [len(p) + len(r) for p, r, _ in sequences],
            groups=groups,
            signal=[True] * len(sequences),
            budget=budget,
            padded=layout != "packed",
            parts=1,
        )
        assert (len(cuts) == 1) == (budget == 10_000)
        for part in cuts:
            prompts, responses, advantages = zip(*[sequences[i] for i in part], strict=True)
            lengths = torch.tensor([len(r) for r in responses])
            logprobs, _ = model(lay_out(prompts, responses, layout=layout, device=CPU))
            weights = aggregation_weights(
                lengths, aggregation=aggregation, sequences=len(sequences), tokens=total, max_response_tokens=24
            )
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
        packed, _ = model(lay_out(prompts, responses, layout=layout, device=CPU))
        one_long_text, _ = model(lay_out(prompts[:1], [together], layout=layout, device=CPU))
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
        expected, _ = model(lay_out(prompts, responses, layout="padded", device=CPU))
        causal_lm.set_attn_implementation("sdpa_by_sequence")
        found, _ = model(lay_out(prompts, responses, layout="by_sequence", device=CPU))
        for layer in causal_lm.model.layers:
            layer.self_attn.sliding_window = None  # type: ignore[union-attr]
        without, _ = model(lay_out(prompts, responses, layout="by_sequence", device=CPU))
    assert_close(found, expected, expected.abs().max().item())
    assert (without - expected).abs().max() > 0.1
