"""Runs of the synthetic task that are killed, damaged and starved, resumed, and compared with one that was left alone.

    python -m bench.chaos --runs 20 --vllm 4 --seed 0      # or: make chaos

`--runs` runs (`--vllm` of them with vLLM's engine, the others with transformers') are killed with SIGKILL at random
moments, some of them twice, and resumed; then one rank is killed in each of `--two` runs of two processes, and every
other fault of `FAULTS` is tried once. A run has survived when its metrics (times aside), final weights and optimizer
state are those of the undisturbed run to the last bit and no process of it is left. The batch is the demo's, with all
threads. Prints a table for docs/reliability.md; the exit code is 1 when a run has not survived.

Left out: GPUs, machines that disappear as a whole (tests/train/test_two_machines.py).
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
}
DEMO = {"prompts_per_step": 64, "minibatches": 8, "epochs": 4, "lr": "1e-4"}  # the batch of the demo
FILE_LIMIT_BYTES = 200_000  # below the size of the toy model's weights
MARK = "BANDPO_CHAOS_RUN"  # in the environment of a run's processes
MOST_KILLS = 40
GRADER = """
import time
def grade(completion, gold):
    time.sleep(0.002)
    return completion.rpartition("{")[2].partition("}")[0] == gold
"""


# ---- comparing ----


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what may differ: times, speed, memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not is_of_clock(key)} for line in lines]


def difference(run: Path, other: Path, step: int = STEPS) -> str:
    """Where two runs differ after `step` steps, in words; empty when they are the same to the last bit."""
    for ours, theirs in zip(rows(run), rows(other), strict=False):
        keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if keys:
            return f"metrics of step {ours['step']}: {', '.join(keys[:3])}"
    if len(rows(run)) != len(rows(other)):
        return f"{len(rows(run))} rows of metrics against {len(rows(other))}"
    folder, their_folder = (path / "checkpoints" / f"step_{step:06d}" for path in (run, other))
    if not folder.is_dir():
        return f"no {folder.name}"
    weights = Path("policy", "model.safetensors")
    if (folder / weights).read_bytes() != (their_folder / weights).read_bytes():
        return "weights"
    moments, their_moments = (torch.load(path / "optimizer.pt", weights_only=True) for path in (folder, their_folder))
    return "" if _equal(moments, their_moments) else "optimizer state"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


# ---- processes ----


@dataclass
class Trial:
    """A run that will be killed or damaged."""

    folder: Path  # output_dir/run_name
    engine: str
    overrides: dict[str, object] = field(default_factory=dict)
    launcher: tuple[str, ...] = (sys.executable,)
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    events: list[str] = field(default_factory=list)

    def launch(self, *, environment: dict[str, str] | None = None, file_limit: int = 0, **extra: object) -> None:
        """Start train.py in a session of its own, without waiting; what it prints goes to a file beside the folder."""
        keys = {
            **{"model": ROOT / "build" / "toy_model", "output_dir": self.folder.parent, "run_name": self.folder.name},
            **{"engine": self.engine, **SMALL, **self.overrides, **extra},
        }
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        # A thread that waits gives its core away: several runs beside each other are then twice as fast.
        own = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", MARK: str(self.folder)}
        own |= {**self.environment, **(environment or {})}

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        with open(self.console_file, "ab") as console:
            self.process = subprocess.Popen(
                [*self.launcher, "train.py", "--config", "demo_band", *words],
                cwd=ROOT,
                env={**os.environ, **own},
                stdout=console,
                stderr=subprocess.STDOUT,
                preexec_fn=limit if file_limit else None,
                start_new_session=True,
            )

    @property
    def console_file(self) -> Path:
        return self.folder.with_suffix(".console.txt")

    def console(self) -> str:
        return self.console_file.read_text(errors="replace")

    def running(self) -> bool:
        assert self.process
        return self.process.poll() is None

    def code(self) -> int:
        """Wait for the end; the exit code."""
        assert self.process
        return self.process.wait(timeout=600)

    def wait_until(self, moment: Callable[[], bool], then_s: float = 0.0) -> bool:
        """Wait for a moment and some seconds more; whether the run is still going on then."""
        while self.running() and not moment():
            time.sleep(0.001)
        time.sleep(then_s)
        return self.running()

    def send(self, number: signal.Signals, pid: int | None = None) -> None:
        """To the process that was started, or to another one."""
        assert self.process
        os.kill(pid or self.process.pid, number)
        self.events.append(f"{number.name} {self.where()}")

    def children(self, word: bytes) -> list[int]:
        """Processes started by ours whose command line has `word` (Linux)."""
        assert self.process
        found = []
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            try:
                pids = [int(pid) for pid in task.read_text().split()]
                found += [pid for pid in pids if word in Path(f"/proc/{pid}/cmdline").read_bytes()]
            except OSError:
                continue  # gone
        return found

    def steps(self) -> int:
        """Rows of metrics so far, step 0 included."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step_*"))

    def saving(self) -> bool:
        return any((self.folder / "checkpoints").glob(".saving_step_*"))

    def where(self) -> str:
        """How far the run is, judged by its files."""
        done = self.steps() - 1
        if done < 0:
            return "before the first metrics"
        return f"while saving step {done}" if self.saving() else f"after step {done}"


def two_processes(folder: Path, engine: str, sharding: str) -> Trial:
    """A run of two processes on this machine's CPU."""
    torchrun = (str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2")
    return Trial(folder, engine, {"sharding": sharding}, torchrun, {"ACCELERATE_USE_CPU": "true"})


def left_behind(mark: str, patience_s: float = 10.0) -> list[str]:
    """Command lines of processes that belong to a run that has ended (Linux)."""
    until = time.monotonic() + patience_s
    while True:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={mark}\0".encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80])
            except OSError:
                continue  # gone, or somebody else's
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


# ---- killing ----


@dataclass(frozen=True)
class Pace:
    """What an undisturbed run took, to aim by."""

    first_row_s: float
    total_s: float
    sampling_s: float
    saving_s: float


def undisturbed(trial: Trial) -> Pace:
    """Run to the end."""
    started = time.monotonic()
    trial.launch()
    trial.wait_until(lambda: trial.steps() > 0)
    first_row_s = time.monotonic() - started
    code = trial.code()
    assert code == 0, f"the undisturbed run ended with {code}:\n{trial.console()[-3000:]}"
    lines = [json.loads(line) for line in (trial.folder / "metrics.jsonl").read_text().splitlines()]
    saving = [float(line.split()[-2]) for line in trial.console().splitlines() if line.startswith("checkpoint of step")]
    sampling_s = sum(line["time/rollout_s"] for line in lines[1:]) / STEPS
    return Pace(first_row_s, time.monotonic() - started, sampling_s, max(0.05, sum(saving) / len(saving)))


def kill_sometime(trial: Trial, moment: str, pace: Pace, rng: random.Random) -> bool:
    """SIGKILL at a random instant of the kind `moment`; False when the run ended before."""
    assert trial.process
    if moment == "starting":
        alive = trial.wait_until(lambda: True, rng.uniform(0.3, pace.first_row_s))
    elif moment == "sampling":  # which begins when the row of the step before is written
        row = rng.randint(1, STEPS)
        alive = trial.wait_until(lambda: trial.steps() >= row, rng.uniform(0.0, pace.sampling_s))
    elif moment == "saving":
        row = rng.randint(1, STEPS)
        alive = trial.wait_until(lambda: trial.steps() >= row and trial.saving(), rng.uniform(0.0, pace.saving_s))
    else:
        alive = trial.wait_until(lambda: trial.steps() > 0, rng.uniform(0.0, pace.total_s - pace.first_row_s))
    if alive:
        ranks = trial.children(b"train.py")  # none of a run without a launcher: its own process
        trial.send(signal.SIGKILL, rng.choice(ranks) if ranks else None)
        trial.code()
    return alive


TWO = (("vllm", "fsdp2"), ("hf", "ddp"))  # engine and sharding of runs of two processes
MOMENTS = ("starting", "sampling", "saving", "any moment")


def killed_run(trial: Trial, moment: str, pace: Pace, rng: random.Random) -> None:
    """Kill the run at `moment`, every third one once more, and let it end."""
    trial.launch()
    while not kill_sometime(trial, moment, pace, rng):
        shutil.rmtree(trial.folder)
        trial.launch()
    if rng.random() < 1 / 3:
        trial.launch()
        kill_sometime(trial, rng.choice(MOMENTS), pace, rng)
    trial.launch()
    _expect(trial, 0)


# ---- other faults ----


def _expect(trial: Trial, code: int, words: str = "") -> None:
    got = trial.code()
    assert got == code, f"exit code {got}, {code} expected:\n{trial.console()[-3000:]}"
    assert words in trial.console(), f"{words!r} was not said:\n{trial.console()[-3000:]}"
    if len(trial.launcher) == 1:  # torchrun prints one of its own for a rank that was killed
        assert "Traceback" not in trial.console(), trial.console()[-3000:]


def damaged_checkpoint(trial: Trial, how: str) -> None:
    """Kill when there are two checkpoints, damage the newest, resume."""
    trial.launch()
    trial.wait_until(lambda: len(trial.checkpoints()) >= 2 and not trial.saving())
    trial.send(signal.SIGKILL)
    trial.code()
    newest = trial.checkpoints()[-1]
    damage(newest / "policy" / "model.safetensors", how)
    trial.events.append(f"{newest.name}: model.safetensors {how}")
    trial.launch()
    _expect(trial, 0, f"checkpoint {newest.name} is damaged and skipped")


def damage(path: Path, how: str) -> None:
    """Make a file truncated, altered (one bit of it), emptied or deleted."""
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def disk_full(trial: Trial) -> None:
    """No file may grow beyond FILE_LIMIT_BYTES from the third step on; then the limit is lifted."""
    trial.launch(max_steps=3)  # a step that is evaluated anyhow
    _expect(trial, 0)
    good = trial.checkpoints()
    trial.launch(file_limit=FILE_LIMIT_BYTES)
    _expect(trial, 1, "the disk is full")
    assert trial.checkpoints() == good
    trial.events.append(f"refused {trial.console().count('checkpoint not saved')} times, {good[-1].name} kept")
    trial.launch()
    _expect(trial, 0)


def asked_to_stop(trial: Trial, number: signal.Signals) -> None:
    """SIGTERM or Ctrl-C in the middle, then resume."""
    trial.launch()
    trial.wait_until(lambda: trial.steps() > 3, 0.05)
    trial.send(number)
    sent = time.monotonic()
    _expect(trial, 130 if number == signal.SIGINT else 0)
    trial.events.append(f"ended after {time.monotonic() - sent:.1f} s with {trial.checkpoints()[-1].name}")
    trial.launch()
    _expect(trial, 0)


def workers_killed(trial: Trial) -> None:
    """Every grading process found is killed, every 0.5 s, from the first evaluation on, until MOST_KILLS of them are:
    on a loaded machine none would be up sooner than the next kill, and the run would not end.
    """
    trial.launch()
    trial.wait_until(lambda: trial.steps() > 0)
    killed = 0
    while trial.running() and killed < MOST_KILLS:
        time.sleep(0.5)
        for pid in trial.children(b"rewards.pool.worker"):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    assert killed, "no worker was met"
    trial.events.append(f"{killed} workers killed")
    _expect(trial, 0)


def killed_with(trial: Trial, checkpoints: int) -> None:
    """Killed when it has `checkpoints` of them and has logged a row since."""
    trial.launch()
    trial.wait_until(lambda: len(trial.checkpoints()) >= checkpoints and not trial.saving())
    row = trial.steps() + 1
    trial.wait_until(lambda: trial.steps() >= row)
    trial.send(signal.SIGKILL)
    trial.code()


def unmounted_checkpoints(trial: Trial) -> None:
    """The folder of checkpoints is empty at one launch, as a disk that is not mounted, and back at the next."""
    killed_with(trial, 2)
    folder, disk = trial.folder / "checkpoints", trial.folder.with_suffix(".disk")
    folder.rename(disk)
    folder.mkdir()
    trial.launch()
    _expect(trial, 2, "is its disk mounted?")
    folder.rmdir()
    disk.rename(folder)
    trial.events.append("refused, mounted again")
    trial.launch()
    _expect(trial, 0)


def renamed_checkpoint(trial: Trial) -> None:
    """A copy of the oldest checkpoint under the name of a step that was not reached."""
    killed_with(trial, 2)
    oldest = trial.checkpoints()[0]
    shutil.copytree(oldest, oldest.with_name("step_000005"))
    trial.events.append(f"{oldest.name} copied to step_000005")
    trial.launch()
    _expect(trial, 0, f"its manifest.json is that of step {int(oldest.name[5:])}: renamed or copied")


def metrics_lost(trial: Trial) -> None:
    """metrics.jsonl lacks a row and has another one twice when the run goes on."""
    killed_with(trial, 2)
    path = trial.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], *lines[2:]]))
    trial.events.append("row 1 cut, row 2 doubled")
    trial.launch()
    _expect(trial, 0, "metrics.jsonl does not match the checkpoint")


def metrics_replaced(trial: Trial) -> None:
    """An editor saves metrics.jsonl while the run writes it; later somebody deletes it."""
    trial.launch()
    path = trial.folder / "metrics.jsonl"
    for row in (2, 4):
        assert trial.wait_until(lambda row=row: trial.steps() >= row)
        if row == 2:
            path.with_name("saved").write_bytes(path.read_bytes())
            path.with_name("saved").rename(path)
        else:
            path.unlink()
    _expect(trial, 0, "metrics.jsonl was changed or deleted by another program")
    trial.events.append(f"restored {trial.console().count('restored with all')} times")


def suspended(trial: Trial) -> None:
    """A scheduler stops the whole process group for longer than a grade may take, three times."""
    trial.launch()
    assert trial.process
    for row in (1, 3, 5):
        assert trial.wait_until(lambda row=row: trial.steps() >= row, 0.1)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in [trial.process.pid, *trial.children(b"rewards.pool.worker")]:
                os.kill(pid, number)
            time.sleep(5.0 if number == signal.SIGSTOP else 0.0)
    _expect(trial, 0)
    trial.events.append("three times 5 s")


def wandb_unreachable(trial: Trial) -> None:
    """A key, and a server that is not there."""
    trial.launch(
        wandb="auto",
        environment={"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40},
    )
    _expect(trial, 0, "wandb sync")
    trial.events.append("offline at once")


FAULTS: dict[str, Callable[[Trial], None]] = {
    "newest checkpoint truncated": lambda trial: damaged_checkpoint(trial, "truncated"),
    "newest checkpoint: one bit flipped": lambda trial: damaged_checkpoint(trial, "altered"),
    "newest checkpoint: a file emptied": lambda trial: damaged_checkpoint(trial, "emptied"),
    "newest checkpoint: a file deleted": lambda trial: damaged_checkpoint(trial, "deleted"),
    "checkpoints not mounted at one launch": unmounted_checkpoints,
    "a checkpoint copied to the name of a later step": renamed_checkpoint,
    "metrics.jsonl: a row lost, one doubled, between launches": metrics_lost,
    "metrics.jsonl replaced and deleted while running": metrics_replaced,
    "all processes suspended and continued": suspended,
    "disk full": disk_full,
    "SIGTERM": lambda trial: asked_to_stop(trial, signal.SIGTERM),
    "Ctrl-C": lambda trial: asked_to_stop(trial, signal.SIGINT),
    "grading processes killed": workers_killed,
    "wandb: a key, and a closed port": wandb_unreachable,
}


# ---- the campaign ----


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="runs to kill")
    parser.add_argument("--vllm", type=int, default=4, help="of them with vLLM's engine")
    parser.add_argument("--two", type=int, default=4, help="more runs to kill, a rank of two processes")
    parser.add_argument("--seed", type=int, default=0, help="of moments and kinds")
    parser.add_argument("--faults", type=int, default=len(FAULTS), help="other faults to try, from the top of the list")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos_"))
    save_start(ROOT / "build" / "toy_model", "toy", seed=0, device="cpu")
    grader = folder / "grader.py"
    grader.write_text(GRADER)
    started, rng, outcomes = time.monotonic(), random.Random(options.seed), []
    left_alone: dict[str, tuple[Path, Pace]] = {}

    def trial_of(name: str, engine: str, sharding: str = "", **overrides: object) -> Trial:
        trial = two_processes(folder / name, engine, sharding) if sharding else Trial(folder / name, engine)
        trial.overrides |= DEMO | overrides
        return trial

    def reference(name: str, engine: str, sharding: str = "", **overrides: object) -> tuple[Path, Pace]:
        if name not in left_alone:
            trial = trial_of(f"alone_{name}", engine, sharding, **overrides)
            left_alone[name] = trial.folder, undisturbed(trial)
            print(f"left alone, {name}: {left_alone[name][1]}", flush=True)
        return left_alone[name]

    def judge(fault: str, trial: Trial, alone: Path) -> None:
        wrong = difference(trial.folder, alone) or "; ".join(left_behind(str(trial.folder)))
        outcomes.append((fault, trial.engine, wrong))
        print(f"{'NOT the same: ' + wrong if wrong else 'same':6} | {trial.engine:4} | {fault}: ", end="")
        print(", ".join(trial.events), flush=True)

    for number in range(options.runs):
        engine = "vllm" if number < options.vllm else "hf"
        alone, pace = reference(engine, engine)
        trial, moment = trial_of(f"killed_{number}", engine), MOMENTS[number % len(MOMENTS)]
        killed_run(trial, moment, pace, rng)
        judge(f"SIGKILL, {moment}", trial, alone)
    for number in range(options.two):
        (engine, sharding), moment = TWO[number % len(TWO)], MOMENTS[number % len(MOMENTS)]
        alone, pace = reference(f"{engine}_{sharding}", engine, sharding)
        trial = trial_of(f"two_{number}", engine, sharding)
        killed_run(trial, moment, pace, rng)
        judge(f"SIGKILL of one of two ranks ({sharding}), {moment}", trial, alone)
    for number, (fault, inflict) in enumerate(list(FAULTS.items())[: options.faults]):
        graded = {"reward": f"{grader}:grade"} if inflict in (workers_killed, suspended) else {}
        alone, _ = reference("hf_own_grader" if graded else "hf", "hf", **graded)
        trial = trial_of(f"fault_{number}", "hf", **graded)
        inflict(trial)
        judge(fault, trial, alone)
    print(f"\n{table(outcomes)}\n\n{(time.monotonic() - started) / 60:.1f} minutes, seed {options.seed}")
    failed = any(wrong for *_, wrong in outcomes)
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


def table(outcomes: list[tuple[str, str, str]]) -> str:
    """Markdown: for each fault and engine the number of runs and of those that ended as if nothing had happened."""
    tried = Counter((fault, engine) for fault, engine, _ in outcomes)
    same = Counter((fault, engine) for fault, engine, wrong in outcomes if not wrong)
    lines = [f"| {fault} | {engine} | {n} | {same[fault, engine]} |" for (fault, engine), n in tried.items()]
    return "\n".join(["| fault | engine | runs | identical |", "|---|---|---|---|", *lines])


if __name__ == "__main__":
    sys.exit(main())
