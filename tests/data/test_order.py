"""The order of training: permutations, no repeats in an epoch, pure in (seed, step)."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data


@given(st.integers(0, 200), st.integers(0, 2**31), st.integers(0, 50))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(data.epoch_order(n, seed=seed, epoch=epoch)) == list(range(n))


def test_the_order_never_changes_between_versions() -> None:
    # A stored run resumes on this order: a change here breaks every resume.
    assert data.epoch_order(10, seed=0, epoch=0) == [8, 4, 2, 6, 0, 7, 5, 1, 9, 3]


def test_orders_differ_by_seed_and_by_epoch() -> None:
    orders = {tuple(data.epoch_order(50, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_first_places_are_uniform() -> None:
    # 6,000 orders of 6: each index comes first 1,000 times, standard deviation 29.
    firsts = [data.epoch_order(6, seed=seed, epoch=3)[0] for seed in range(6000)]
    assert all(abs(firsts.count(index) - 1000) < 150 for index in range(6))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 100), st.integers(0, 5))
def test_steps_cut_the_epoch_and_drop_its_rest(n: int, per_step: int, seed: int, epoch: int) -> None:
    if per_step > n:
        with pytest.raises(ValueError, match="prompts_per_step"):
            data.epoch_length(n, per_step)
        return
    position, joined = epoch * data.epoch_length(n, per_step), []
    for _ in range(n // per_step):
        batch, position = data.next_problems(position, per_step, n=n, per_step=per_step, seed=seed, taken=())
        assert len(batch) == per_step
        joined += batch
    assert joined == data.epoch_order(n, seed=seed, epoch=epoch)[: n // per_step * per_step]
    assert position == (epoch + 1) * data.epoch_length(n, per_step)


@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 100), st.data())
def test_refills_go_on_in_the_order_without_what_is_in_the_batch(n: int, position: int, seed: int, draw) -> None:
    per_step = draw.draw(st.integers(1, n))
    keys = {"n": n, "per_step": per_step, "seed": seed}
    batch, after = data.next_problems(position, per_step, **keys, taken=())
    count = draw.draw(st.integers(1, n))
    more, end = data.next_problems(after, count, **keys, taken=batch)
    assert len(set(batch)) == per_step and len(set(more)) == count and end > after
    if per_step + count <= n:
        assert not set(batch) & set(more)
    # In the order of the epochs, nothing left out but what is in the batch or came before.
    length, passed = data.epoch_length(n, per_step), []
    for place in range(after, end):
        passed.append(data.epoch_order(n, seed=seed, epoch=place // length)[place % length])
    kept = [index for index in dict.fromkeys(passed) if index in more]
    assert kept == more and (set(passed) - set(more) <= set(batch))


def test_too_few_problems_says_how_to_go_on() -> None:
    with pytest.raises(ValueError, match=r"prompts_per_step 256 must be 1\.\.30.*lower it"):
        data.epoch_length(30, 256)


def test_importing_data_loads_nothing_heavy() -> None:
    code = "import data, sys; print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
