"""What a rule is told of the update that it judges."""

from pathlib import Path

import pytest
from launching import metrics, without_clock

import train
from bench.chaos import SMALL


@pytest.mark.parametrize("rule", ["acpo", "clip_cov", "m2po"])
def test_the_sums_of_a_rule_do_not_depend_on_how_an_update_is_cut(rule: str, toy_model: str, tmp_path: Path):
    """One micro-batch, whose own pass gives the sums, and several, which take a pass more."""
    for name, budget in (("whole", 8192), ("cut", 256)):
        keys = {**SMALL, "model": toy_model, "output_dir": tmp_path, "run_name": name, "engine": "hf", "rule": rule}
        keys |= {"max_steps": 2, "eval_every": 0, "save_every": 0, "micro_batch_tokens": budget, "temperature": 1.5}
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        assert train.main(["--config", "demo_band", *words]) == 0
    whole, cut = (without_clock(metrics(tmp_path / name)) for name in ("whole", "cut"))
    for ours, theirs in zip(whole, cut, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)  # mismatch/max is rounding
