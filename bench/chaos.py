"""Kill training runs at random times, resume them, and compare each with an uninterrupted run.

    python -m bench.chaos --runs 6 --vllm 2 --two 2 --seed 0      # or: make chaos

Trains `--runs` runs of the synthetic task (`--vllm` of them with vLLM, the others with transformers) and `--two` runs
of two processes. Each run is killed with SIGKILL at a random time and resumed; about a third are killed twice.

A run passes if all of its processes have ended, and its metrics (except times), final weights and optimizer state are
bit-identical to the uninterrupted run. Exit code 1 if a run fails. Other faults: tests/train/test_faults.py.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
import torch

from data.toy import save_start
from eval.records import is_of_clock

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6
SMALL = {
    "max_steps": STEPS,
    "prompts_per_step": 16,
    "minibatches": 4,
    "epochs": 1,
    "lr": "1e-3",
    "eval_every": 3,
    "eval_samples": 4,
    "save_every": 2,
    "wandb": "disabled",
    "verifier_workers": 1,
}
MARK = "BANDPO_CHAOS_RUN"  # environment variable of a run's processes
MOMENTS = ("starting", "training", "saving")
TWO = (("vllm", "fsdp2"), ("hf", "ddp"))  # engine and sharding of runs of two processes


# ---- comparing ----


def rows(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without times, speed and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not is_of_clock(key)} for line in lines]


def difference(run: Path, other: Path, step: int = STEPS) -> str:
    """Describe the first difference of two runs after `step` steps; "" if they are bit-identical."""
    for ours, theirs in zip_longest(rows(run), rows(other), fillvalue={}):
        if keys := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
            return f"metrics of step {ours.get('step')}: {', '.join(keys[:3])}"
    folder, their_folder = (path / "checkpoints" / f"step_{step:06d}" for path in (run, other))
    if not folder.is_dir():
        return f"no {folder.name}"
    weights = Path("policy", "model.safetensors")
    if (folder / weights).read_bytes() != (their_folder / weights).read_bytes():
        return "weights"
    moments = [torch.load(path / "optimizer.pt", weights_only=True) for path in (folder, their_folder)]
    return "" if equal(*moments) else "optimizer state"


def equal(a: Any, b: Any) -> bool:
    """Return True if two nested states are bit-identical."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- processes ----


@dataclass
class Trial:
    """Training run to be killed or damaged."""

    folder: Path  # output_dir/run_name
    engine: str
    overrides: dict[str, object] = field(default_factory=dict)
    launcher: tuple[str, ...] = (sys.executable,)
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] = field(init=False, repr=False)  # of the latest launch
    events: list[str] = field(default_factory=list)

    def launch(self, *, environment: dict[str, str] | None = None, **extra: object) -> None:
        """Start train.py in a new session without waiting. Its output goes to `console_file`."""
        keys = {
            **{"model": ROOT / "build" / "toy_model", "output_dir": self.folder.parent, "run_name": self.folder.name},
            **{"engine": self.engine, **SMALL, **self.overrides, **extra},
        }
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        # Passive waiting: spinning threads would occupy the cores of other processes.
        own = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", MARK: str(self.folder)}
        with open(self.console_file, "ab") as console:
            self.process = subprocess.Popen(
                [*self.launcher, "train.py", "--config", "demo_band", *words],
                cwd=ROOT,
                env={**os.environ, **own, **self.environment, **(environment or {})},
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def console_file(self) -> Path:
        return self.folder.with_suffix(".console.txt")

    def console(self) -> str:
        return self.console_file.read_text(errors="replace")

    def code(self) -> int:
        """Wait for the end of the process and return its exit code."""
        return self.process.wait(timeout=600)

    def wait_until(self, moment: Callable[[], bool], then_s: float = 0.0) -> bool:
        """Wait until `moment` returns True, then `then_s` seconds; return True if the run has not ended."""
        while self.process.poll() is None and not moment():
            time.sleep(0.001)
        time.sleep(then_s)
        return self.process.poll() is None

    def send(self, number: signal.Signals, pid: int | None = None) -> None:
        """Send a signal to the started process, or to `pid`."""
        os.kill(pid or self.process.pid, number)
        self.events.append(f"{number.name} after {self.steps()} rows{' while saving' * self.saving()}")

    def children(self, word: str) -> list[int]:
        """Return the ids of child processes whose command line contains `word`."""
        pids = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):  # it has ended
                pids += [child.pid] if word in " ".join(child.cmdline()) else []
        return pids

    def steps(self) -> int:
        """Return the number of rows of metrics so far, including step 0."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step_*"))

    def saving(self) -> bool:
        return any((self.folder / "checkpoints").glob(".saving_step_*"))


def two_processes(folder: Path, engine: str, sharding: str) -> Trial:
    """Define a run of two processes on the CPU."""
    torchrun = (str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2")
    return Trial(folder, engine, {"sharding": sharding}, torchrun, {"ACCELERATE_USE_CPU": "true"})


def left_behind(mark: str, patience_s: float = 10.0) -> list[str]:
    """Return command lines of processes that outlive their run by more than `patience_s` seconds."""
    until = time.monotonic() + patience_s
    while True:
        commands = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended, or belongs to another user
                commands += [" ".join(process.cmdline())[:80]] if process.environ().get(MARK) == mark else []
        if not commands or time.monotonic() > until:
            return commands
        time.sleep(0.1)


# ---- killing ----


def undisturbed(trial: Trial) -> tuple[float, float]:
    """Run to the end; return the seconds until the first row of metrics, and from there to the end."""
    started = time.monotonic()
    trial.launch()
    trial.wait_until(lambda: trial.steps() > 0)
    first_row_s = time.monotonic() - started
    assert trial.code() == 0, trial.console()[-3000:]
    return first_row_s, time.monotonic() - started - first_row_s


def killed_run(trial: Trial, moment: str, pace: tuple[float, float], rng: random.Random) -> None:
    """Send SIGKILL at a random time of the kind `moment`, in a third of the runs twice, then resume to the end."""
    kills, wanted = 0, 1 + (rng.random() < 1 / 3)
    while kills < wanted:
        trial.launch()
        if moment == "starting":
            alive = trial.wait_until(lambda: True, rng.uniform(0.3, pace[0]))
        elif moment == "training":
            alive = trial.wait_until(lambda: trial.steps() > 0, rng.uniform(0.0, pace[1]))
        else:
            row = trial.steps() + rng.randint(0, 2)
            alive = trial.wait_until(lambda row=row: trial.steps() >= row and trial.saving(), rng.uniform(0.0, 0.05))
        if not alive:  # it ended before the signal
            shutil.rmtree(trial.folder)
            continue
        ranks = trial.children("train.py")  # empty without a launcher
        trial.send(signal.SIGKILL, rng.choice(ranks) if ranks else None)
        trial.code()
        kills, moment = kills + 1, "training"
    trial.launch()
    assert trial.code() == 0, trial.console()[-3000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=6, help="runs of one process")
    parser.add_argument("--vllm", type=int, default=2, help="of them with vLLM's engine")
    parser.add_argument("--two", type=int, default=2, help="runs of two processes, one of which is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos_"))
    save_start(ROOT / "build" / "toy_model", "toy", seed=0, device="cpu")
    started, rng, failed = time.monotonic(), random.Random(options.seed), 0
    alone: dict[tuple[str, str], tuple[float, float]] = {}
    kinds = [("vllm" if number < options.vllm else "hf", "") for number in range(options.runs)]
    kinds += [TWO[number % len(TWO)] for number in range(options.two)]

    def trial_of(name: str, engine: str, sharding: str) -> Trial:
        return two_processes(folder / name, engine, sharding) if sharding else Trial(folder / name, engine)

    for number, kind in enumerate(kinds):
        name, moment = " ".join(filter(None, kind)), MOMENTS[number % len(MOMENTS)]
        reference = trial_of(f"alone_{'_'.join(kind)}", *kind)
        if kind not in alone:
            alone[kind] = undisturbed(reference)
            print(f"undisturbed, {name}: {sum(alone[kind]):.0f} s", flush=True)
        trial = trial_of(f"killed_{number}", *kind)
        killed_run(trial, moment, alone[kind], rng)
        wrong = difference(trial.folder, reference.folder) or "; ".join(left_behind(str(trial.folder)))
        failed += bool(wrong)
        print(f"{'NOT identical: ' + wrong if wrong else 'identical'} | {name} | {', '.join(trial.events)}", flush=True)
    print(f"{len(kinds) - failed} of {len(kinds)} runs identical, {(time.monotonic() - started) / 60:.1f} minutes")
    if not failed:
        shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
