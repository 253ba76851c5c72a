"""Runs that are stopped or killed, and resumed: to the last bit what they would have been, and nothing left behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import ACCELERATE, ONE_PROCESS, ROOT, metrics, together

import train
from bench.chaos import SMALL, STEPS, Trial, difference, killed_run, left_behind, two_processes
from rewards import Verifier
from trainer import checkpoint
from trainer.resume import load_state
from trainer.run import Run
from trainer.stopping import is_launcher

pytestmark = pytest.mark.slow


def argv(model: str, run: Path, **overrides: object) -> list[str]:
    keys = {"model": model, "output_dir": run.parent, "run_name": run.name, "engine": "hf", **SMALL, **overrides}
    return ["--config", "demo_band", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def alone(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nobody disturbed."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    assert train.main(argv(toy_model, run)) == 0
    return run


# ---- undisturbed ----


def test_the_same_seed_is_the_same_run_on_a_busy_machine(toy_model: str, tmp_path: Path):
    """Two small steps with all threads, twice, in each other's way: every metric and every weight."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_WAIT_POLICY": "passive"}  # twice as fast beside others
    runs = []
    for name in ("one", "other"):
        keys = {"config": "demo_band", "model": toy_model, "output_dir": tmp_path, "run_name": name}
        keys |= {**SMALL, "engine": "vllm", "max_steps": 2, "eval_every": 2, "kl_coef": 0.01}
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        runs.append(subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, env=environment))
    assert [run.wait(timeout=400) for run in runs] == [0, 0]
    assert difference(tmp_path / "one", tmp_path / "other", 2) == ""


# ---- random numbers ----


def test_a_rule_that_draws_at_random_is_resumed_bit_for_bit(toy_model: str, tmp_path: Path):
    """clip_cov draws from torch's global generator, which every step seeds."""
    keys = {
        "eval_every": 0,
        "save_every": 1,
        "keep_last": 9,
        "rule": "clip_cov",
        "rule_args": "{cov_low: 0, share: 0.5}",
    }
    assert train.main(argv(toy_model, tmp_path / "whole", **keys)) == 0
    assert train.main(argv(toy_model, tmp_path / "parts", max_steps=2, **keys)) == 0
    assert train.main(argv(toy_model, tmp_path / "parts", **keys)) == 0
    assert difference(tmp_path / "parts", tmp_path / "whole") == ""
    assert any(row.get("clip/up", 0) > 0 for row in metrics(tmp_path / "whole"))


def test_a_tweak_that_draws_random_numbers_goes_on_with_the_same_ones(
    toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All generators are set anew at each step, from its number: a checkpoint holds none, of whatever device."""
    drawn: dict[str, list[tuple[float, ...]]] = {"whole": [], "cut": []}
    update = train.update_policy

    def drawing(run: Run, *rest: Any) -> train.Stats:
        drawn[run.cfg.run_name].append((torch.rand(()).item(), random.random(), np.random.random()))
        return update(run, *rest)

    monkeypatch.setattr(train, "update_policy", drawing)
    assert train.main(argv(toy_model, tmp_path / "whole", max_steps=3)) == 0
    assert train.main(argv(toy_model, tmp_path / "cut", max_steps=1)) == 0
    torch.manual_seed(99)
    assert train.main(argv(toy_model, tmp_path / "cut", max_steps=3)) == 0
    assert drawn["whole"] == drawn["cut"] and len(set(drawn["whole"])) == 3


# ---- asked to stop ----


def in_phase(name: str, step: int) -> Callable[[pytest.MonkeyPatch, signal.Signals], None]:
    """Sends the signal on entering a phase of the step after `step` completed ones."""

    def arrange(patch: pytest.MonkeyPatch, number: signal.Signals) -> None:
        phase = Run.phase

        @contextmanager
        def signalling(run: Run, entered: str) -> Iterator[None]:
            if entered == name and run.step == step and not run.signals.number:
                signal.raise_signal(number)
            with phase(run, entered):
                yield

        patch.setattr(Run, "phase", signalling)

    return arrange


def in_the_middle_of_an_evaluation(patch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    submit = Verifier.submit

    def signalling(verifier: Verifier, completion: str, gold: str, *about: Any):
        if sys._getframe(1).f_code.co_filename.endswith("evaluate.py"):
            seen.append(gold)
            assert len(seen) <= 99, "the evaluation goes on"
            if len(seen) == 99:
                signal.raise_signal(number)
        return submit(verifier, completion, gold, *about)

    seen: list[str] = []
    evaluate, when = train.evaluate_policy, iter([False, True])  # not the evaluation of step 0

    def evaluating(*words, **keys):
        if next(when, False):
            patch.setattr(Verifier, "submit", signalling)
        return evaluate(*words, **keys)

    patch.setattr(train, "evaluate_policy", evaluating)


def while_saving(patch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    commit = checkpoint.commit

    def signalling(root: Path, step: int, info: dict) -> Path:
        if step == 2:
            signal.raise_signal(number)
        return commit(root, step, info)

    patch.setattr(checkpoint, "commit", signalling)


MOMENTS = {
    # what happens at that moment -> (how the signal gets there, steps completed when the run has ended)
    "sampling": (in_phase("rollout", 3), 3),
    "updating": (in_phase("update", 3), 4),
    "evaluating": (in_the_middle_of_an_evaluation, 3),
    "saving": (while_saving, 2),
}


@pytest.mark.parametrize(
    ("moment", "number"), [*((moment, signal.SIGTERM) for moment in MOMENTS), ("sampling", signal.SIGINT)]
)
def test_asked_to_stop_a_run_saves_ends_and_goes_on_as_if_nothing_had_been(
    alone: Path, toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: signal.Signals
):
    arrange, completed = MOMENTS[moment]
    run, handler = tmp_path / "stopped", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        arrange(patch, number)
        assert train.main(argv(toy_model, run)) == {signal.SIGTERM: 0, signal.SIGINT: 130}[number]
    newest, warnings = checkpoint.latest(run / "checkpoints")
    assert newest and checkpoint.step_of(newest) == completed and not warnings
    assert signal.getsignal(signal.SIGTERM) == handler  # the handlers are gone with the run
    if number == signal.SIGTERM:  # what is resumed does not know which signal it was
        assert train.main(argv(toy_model, run)) == 0
        assert difference(run, alone) == ""


def test_a_death_after_the_interrupted_evaluation_was_made_writes_no_line_twice(
    alone: Path, toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        in_the_middle_of_an_evaluation(patch, signal.SIGTERM)
        assert train.main(argv(toy_model, run)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_minibatches", None)  # the next step raises
        with pytest.raises(TypeError):
            train.main(argv(toy_model, run))
    assert [row["step"] for row in metrics(run)] == [0, 1, 2, 3]
    assert train.main(argv(toy_model, run)) == 0
    assert difference(run, alone) == ""


def test_a_stop_before_the_first_step_leaves_a_run_that_starts(
    alone: Path, toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        in_phase("eval", 0)(patch, signal.SIGTERM)
        assert train.main(argv(toy_model, run)) == 0
    assert checkpoint.latest(run / "checkpoints") == (None, [])
    assert train.main(argv(toy_model, run)) == 0
    assert difference(run, alone) == ""


@pytest.mark.promise("SIGTERM while waiting for slow grades")
def test_asked_to_stop_while_grades_are_collected_a_run_does_not_wait_for_them(
    toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each of the 256 grades takes a second."""
    grader, collect, sent_s = tmp_path / "grader.py", Verifier.collect, []
    grader.write_text("import time\ndef grade(completion, gold):\n    time.sleep(1)\n    return True\n")

    def stop() -> None:
        sent_s.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    def collecting(verifier: Verifier, tickets: list[Any]) -> list[Any]:
        if len(tickets) == 256:  # not the one by which the reward is tried before the start
            threading.Timer(0.5, stop).start()
        return collect(verifier, tickets)

    monkeypatch.setattr(Verifier, "collect", collecting)
    assert train.main(argv(toy_model, tmp_path / "run", reward=f"{grader}:grade", eval_every=0)) == 0
    assert time.monotonic() - sent_s[0] < 10
    assert metrics(tmp_path / "run") == []


@pytest.mark.parametrize(("repeated", "same_s"), [(signal.SIGINT, 60.0), (signal.SIGTERM, -1.0)])
def test_one_ctrl_c_may_arrive_three_times(
    toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repeated: signal.Signals, same_s: float
):
    """From the terminal, soon after from torchrun, and as a late SIGTERM when the launcher has died of it."""
    monkeypatch.setattr("trainer.stopping.SAME_CTRL_C_S", same_s)
    in_phase("update", 0)(monkeypatch, signal.SIGINT)
    phase = Run.phase

    @contextmanager
    def again(run: Run, entered: str) -> Iterator[None]:
        if run.signals.number:
            signal.raise_signal(repeated)
        with phase(run, entered):
            yield

    monkeypatch.setattr(Run, "phase", again)
    assert train.main(argv(toy_model, tmp_path / "run")) == 130
    newest, _ = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest and checkpoint.step_of(newest) == 1


def test_a_later_ctrl_c_stops_at_once(toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.stopping.SAME_CTRL_C_S", -1.0)
    in_phase("sync", 2)(monkeypatch, signal.SIGINT)
    phase = Run.phase

    @contextmanager
    def again(run: Run, entered: str) -> Iterator[None]:
        with phase(run, entered):
            yield
            if run.signals.number:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "phase", again)
    with pytest.raises(KeyboardInterrupt):
        train.main(argv(toy_model, tmp_path / "run"))
    newest, _ = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest and checkpoint.step_of(newest) == 2  # the one there was


# ---- what else a resumed run must know ----


def test_extending_a_finished_run_equals_a_longer_one(alone: Path, toy_model: str, tmp_path: Path):
    """max_steps may be raised; an evaluation of the last step then stays, so both ends are multiples of eval_every."""
    run = tmp_path / "extended"
    assert train.main(argv(toy_model, run, max_steps=STEPS // 2)) == 0
    assert train.main(argv(toy_model, run)) == 0
    assert difference(run, alone) == ""


def test_the_checkpoint_holds_what_files_cannot(alone: Path):
    path = alone / "checkpoints" / f"step_{STEPS:06d}"
    state, info = load_state(path, rank=0, processes=1), checkpoint.info(path)
    rows = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert state.step == STEPS and state.tokens_seen == rows[-1]["train/tokens_seen"]
    assert state.score == info["score"] == rows[-1]["eval/toy_eval/mean@4"]
    assert state.pending_metrics == {} and state.skipped_in_a_row == 0 and len(info["wandb_run_id"]) == 8


def test_a_resumed_run_cannot_change_what_is_learnt(alone: Path, toy_model: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        train.main(argv(toy_model, alone, rule="fixed", lr=1e-4))
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "rule: 'band' then, 'fixed' now" in line and "lr: 0.001 then, 0.0001 now" in line


# ---- real processes ----


def test_a_run_killed_while_it_saves_ends_as_if_nothing_had_been(alone: Path, toy_model: str, tmp_path: Path):
    """`python -m bench.chaos` kills at any other moment too, and with vLLM."""
    trial = Trial(tmp_path / "killed", "hf")
    killed_run(trial, "saving", (0, 0), random.Random(0))
    assert difference(trial.folder, alone) == "", trial.events
    assert left_behind(str(trial.folder)) == []


def test_two_processes_killed_and_stopped_end_as_if_nothing_had_been(toy_model: str, tmp_path: Path):
    """One rank dies by SIGKILL; later the launcher is asked to stop; then the run is left to end. bench.chaos does the
    same with vLLM, and with ddp."""
    left_alone, trial = tmp_path / "alone", two_processes(tmp_path / "disturbed", "hf", "fsdp2")
    together(2, "train.py", *argv(toy_model, left_alone, sharding="fsdp2"), timeout_s=600)

    trial.launch()
    assert trial.wait_until(lambda: trial.steps() > 3)
    os.kill(trial.children("train.py")[0], signal.SIGKILL)
    assert trial.code() != 0
    assert left_behind(str(trial.folder), patience_s=60) == []

    trial.launch()
    assert trial.wait_until(lambda: trial.steps() > 4)
    trial.send(signal.SIGTERM)
    trial.code()
    assert left_behind(str(trial.folder), patience_s=30) == []
    newest, _ = checkpoint.latest(trial.folder / "checkpoints")
    assert newest and checkpoint.step_of(newest) == trial.steps() - 1 + bool(load_state(newest, 0, 2).pending_metrics)

    trial.launch()
    assert trial.code() == 0, trial.console()[-3000:]
    assert difference(trial.folder, left_alone) == ""


@pytest.mark.parametrize("ctrl_c", [False, True])
@pytest.mark.promise("the launcher stopped or killed later")
def test_a_stopped_launcher_takes_the_trainer_along_and_nothing_is_lost(toy_model: str, tmp_path: Path, ctrl_c: bool):
    """SIGTERM to `accelerate launch`, which dies of it at once; Ctrl-C to all processes of the terminal."""
    grader = tmp_path / "grader.py"
    grader.write_text("def grade(completion, gold):\n    return completion.endswith('{' + gold + '}')\n")
    launcher = (ACCELERATE, "launch", *ONE_PROCESS)
    trial = Trial(
        tmp_path / "run", "hf", {"max_steps": 500, "save_every": 0, "reward": f"{grader}:grade"}, launcher=launcher
    )
    trial.launch()
    assert trial.wait_until(lambda: trial.steps() > 2), trial.console()[-3000:]
    assert len(left_behind(str(trial.folder), patience_s=0)) >= 3  # launcher, trainer, grading process
    if ctrl_c:
        os.killpg(trial.process.pid, signal.SIGINT)
    else:
        trial.send(signal.SIGTERM)
    trial.code()
    assert left_behind(str(trial.folder), patience_s=60) == []
    newest, warnings = checkpoint.latest(trial.folder / "checkpoints")
    assert newest and not warnings  # a step whose evaluation was interrupted has its line when the run goes on
    pending_metrics = bool(load_state(newest, 0, 1).pending_metrics)
    assert checkpoint.step_of(newest) == metrics(trial.folder)[-1]["step"] + pending_metrics


@pytest.mark.promise("SIGTERM to the first process of a container")
def test_the_first_process_of_a_container_saves_when_it_is_asked_to_stop(toy_model: str, tmp_path: Path):
    """`python train.py` as number 1 of a PID namespace, where the kernel ignores a signal that has no handler."""
    unshare = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("namespaces are not allowed here")
    keys = {"max_steps": 500, "save_every": 0, "eval_every": 0}
    trial = Trial(tmp_path / "run", "hf", dict(keys), launcher=(*unshare, sys.executable))
    trial.launch()
    assert trial.wait_until(lambda: trial.steps() > 1), trial.console()[-3000:]
    (first,) = trial.children("train.py")
    trial.send(signal.SIGTERM, first)
    assert trial.code() == 0
    newest, warnings = checkpoint.latest(trial.folder / "checkpoints")
    assert newest and not warnings and checkpoint.step_of(newest) == metrics(trial.folder)[-1]["step"]


@pytest.mark.promise("the launcher killed while the trainer still imports")
def test_an_orphan_of_the_first_seconds_trains_no_step(toy_model: str, tmp_path: Path):
    """The launcher is killed while the trainer is still importing, before the trainer could ask to be told of it."""
    trial = Trial(tmp_path / "run", "hf", launcher=(ACCELERATE, "launch", *ONE_PROCESS))
    trial.launch()
    trial.wait_until(lambda: trial.children("train.py") != [])
    trial.send(signal.SIGKILL)
    trial.code()
    assert left_behind(str(trial.folder), patience_s=60) == []
    assert "the launcher has died: training does not start without it" in trial.console()
    assert trial.steps() == 0


@pytest.mark.promise("the launcher killed while the trainer still imports")
def test_a_launcher_is_known_by_torch_or_by_what_it_hands_down():
    assert is_launcher(os.getpid())  # has torch loaded
    for given, expected in (
        ({}, False),
        ({"TORCHELASTIC_RUN_ID": "1"}, True),
    ):  # init; a script that starts the trainer
        process = subprocess.Popen(["/bin/sh", "-c", "echo; read x"], env=given, stdin=-1, stdout=-1)
        assert process.stdout and process.stdout.readline()  # it runs: the kernel shows its environment
        assert is_launcher(process.pid) == expected
        process.kill()
        process.wait()
        assert not is_launcher(process.pid)


def test_a_schedule_keeps_its_length(toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`max_steps` may be raised at a resume, but not where the learning rate depends on it."""
    linear = {"lr_schedule": "linear", "eval_every": 0}
    assert train.main(argv(toy_model, tmp_path / "run", max_steps=1, **linear)) == 0
    with pytest.raises(SystemExit) as stopped:
        train.main(argv(toy_model, tmp_path / "run", max_steps=2, **linear))
    assert stopped.value.code == 2
    assert "max_steps: 1 then, 2 now" in capsys.readouterr().err


def test_deterministic_algorithms_have_all_that_a_step_needs(toy_model: str, tmp_path: Path):
    """torch raises for an operation without one; the KL to the reference is logged where there is a reference."""
    try:
        keys = {"max_steps": 2, "kl_coef": 0.01, "eval_every": 0, "temperature": 2}  # hot: groups differ, weights move
        assert train.main(argv(toy_model, tmp_path / "run", deterministic=True, **keys)) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(row["kl/reference"] > 0 for row in metrics(tmp_path / "run"))  # away from the model started from
    assert train.main(argv(toy_model, tmp_path / "without", max_steps=1, kl_coef=0, eval_every=0)) == 0
    assert "kl/reference" not in metrics(tmp_path / "without")[0]
