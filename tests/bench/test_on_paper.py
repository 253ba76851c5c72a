"""The step on paper: by hand for the main run of the paper, 3.09G parameters by our count of Qwen2.5-3B's shape."""

import pytest

from bench.on_paper import enough_gpus, estimate
from configs import load
from configs.memory import MODELS
from configs.schema import Config

CFG = load(Config, ["--config", "qwen3b_band.yaml"])
SIZE = MODELS[CFG.model]


def test_eight_gpus_are_the_published_step():
    step = estimate(CFG, SIZE, 8, 0.005)
    assert (step.rollout, step.passes, step.updates) == (36.6, pytest.approx(25.6), 42.5)
    assert step.tail == pytest.approx(20.48) and step.gathers_wait == 0  # 4,096 tokens of 5 ms
    assert step.whole == pytest.approx(104.7, abs=0.1)  # without what was published as reward and logging


def test_the_tail_does_not_shrink_and_the_rest_does():
    step = estimate(CFG, SIZE, 64, 0.005)
    assert step.rollout == pytest.approx(20.48 + 16.12 / 8)
    assert step.updates == pytest.approx(42.5 / 8)  # four micro-batches of .5 s of gathers each: hidden
    assert enough_gpus(CFG, 0.005) == pytest.approx(8 * 16.12 / 20.48)


def test_on_512_gpus_gathers_are_what_the_updates_take():
    step = estimate(CFG, SIZE, 512, 0.005)
    a_copy = 2 * SIZE.parameters * 511 / 512 / 50e9  # seconds to gather the weights in bfloat16 over the network
    assert a_copy == pytest.approx(0.123, abs=0.001)
    assert step.sync == pytest.approx(a_copy)
    assert step.updates == pytest.approx(4 * (1 + 1 + 2) * a_copy)  # forward; backward, and float32 gradients
    assert step.passes == pytest.approx(4 * 1.75 * a_copy)  # three of four minibatches, and the reference
    assert step.gathers_wait == pytest.approx(step.updates - 42.5 / 64 + step.passes - 25.6 / 64)
