"""What a rule is told of the update that it judges; and backward passes that are spared."""

import weakref
from pathlib import Path
from typing import Any

import pytest
from launching import metrics, without_clock

import train
from bench.chaos import SMALL, difference
from trainer.batching import Tokens
from trainer.policy import LogprobModel, MicroBatch
from trainer.run import Run

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("kl_coef", [0, 0.1])
def test_a_backward_pass_that_is_spared_changes_no_bit_and_keeps_no_memory(
    kl_coef: float, toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Many groups of the start model are all wrong. With a KL term their answers are trained on all the same."""
    ask, forward = train.has_gradient, LogprobModel.forward
    answers: list[tuple[bool, bool]] = []  # has the micro-batch a signal, and a gradient?
    graphs: list[weakref.ref[Any]] = []

    def asking(run: Run, tokens: Tokens, *rest: Any) -> bool:
        answers.append((tokens.has_signal, ask(run, tokens, *rest)))
        return answers[-1][1]

    def watched(model: LogprobModel, batch: MicroBatch) -> Any:
        assert not any(graph() for graph in graphs)  # activations of one micro-batch at a time
        logprobs, entropy = forward(model, batch)
        if logprobs.requires_grad:
            graphs.append(weakref.ref(logprobs.grad_fn))
        return logprobs, entropy

    monkeypatch.setattr(LogprobModel, "forward", watched)
    for name, has_gradient in (("spared", asking), ("all", lambda *about: True)):
        monkeypatch.setattr(train, "has_gradient", has_gradient)
        keys = {**SMALL, "model": toy_model, "output_dir": tmp_path, "run_name": name, "engine": "hf", "max_steps": 2}
        keys |= {"eval_every": 0, "micro_batch_tokens": 256, "kl_coef": kl_coef}
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        assert train.main(["--config", "demo_band", *words]) == 0
    assert difference(tmp_path / "spared", tmp_path / "all", step=2) == ""
    assert (True, False) not in answers and (True, True) in answers
    assert ((False, True) if kl_coef else (False, False)) in answers
