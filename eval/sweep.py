"""Train a grid of configurations times seeds, several runs at once, then compare them.

    python -m eval.sweep GRID.yaml --jobs 2          # the same command again resumes; finished runs are skipped
    python -m eval.sweep GRID.yaml --dry_run         # list the runs and check their configurations

A grid file; `base`, `seeds` and one of `runs` and `grid` are required:

    base: demo_band.yaml                    # --config of every run
    overrides: {max_steps: 20}              # keys of every run
    runs:                                   # name: keys; the first one is the reference of the comparison
      grpo: {rule: fixed, rule_args: {low: 0.2, high: 0.2}}
      band: {rule: band}
    grid: {rule_args.delta: [0.03, 0.1]}    # axes: each run with each combination of values
    seeds: [0, 1, 2]
    metric: eval/toy_eval/mean@32           # ranks the configurations by its final value

OUT (default runs/sweeps/GRID) gets a run folder and a console log per run, and comparison.md and .png of eval.compare
over the finished runs. Each run is `accelerate launch train.py` with --processes processes, on GPUs of its own where
there are any; on a CPU with one thread per process unless OMP_NUM_THREADS is set, so that --jobs changes no result.
Exit code: 0; 1 if a run failed; 2 for an invalid grid, before any run starts; 130 after Ctrl-C or SIGTERM.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from queue import Queue
from typing import Any

import torch
import yaml
from tqdm import tqdm

from configs import ConfigError, diff, load
from configs.schema import Config
from data import set_name
from eval.compare import REPEAT_KEYS, Group, Parser, flatten, save, tables
from eval.plots import FIGURES
from eval.records import load_record
from trainer.checkpoint import latest, step_of
from trainer.preflight import check_model, find_rule

ROOT = Path(__file__).resolve().parent.parent
KEYS: dict[str, type] = {"base": str, "overrides": dict, "runs": dict, "grid": dict, "seeds": list, "metric": str}
WORDS = {str: "text", list: "a list [a, b]", dict: "a mapping {name: value}"}
OWN_KEYS = ("config", "run_name", "output_dir", "seed")  # set by the sweep
LAUNCH = "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0 --num_processes".split()
LAST_LINES = 12  # of a failed run's console, shown again


@dataclass(frozen=True)
class Job:
    """One run."""

    label: str  # of its configuration
    folder: Path
    argv: list[str]  # of train.py
    cfg: Config

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def steps(self) -> int:
        """Steps logged so far."""
        path = self.folder / "metrics.jsonl"
        return min(path.read_bytes().count(b"\n") if path.exists() else 0, self.cfg.max_steps)

    def is_finished(self) -> bool:
        """Whether the last step's checkpoint is there. Raises ValueError when it was trained with other keys."""
        newest, _ = latest(self.folder / "checkpoints")
        if newest is None or step_of(newest) < self.cfg.max_steps:
            return False
        changed = diff(yaml.safe_load((newest / "config.yaml").read_text()), self.cfg)
        changed = [f"{key} {old} -> {new}" for key, (old, new) in changed.items() if key not in REPEAT_KEYS]
        if changed:
            raise ValueError(f"{self.folder}: finished with other keys ({', '.join(changed)}); use another --out")
        return True


# ---- the plan ----


def read_grid(path: Path) -> dict[str, Any]:
    """The grid file, every value as text. Raises ValueError with one line per problem."""
    try:
        grid = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(grid, dict):
        raise ValueError(f"{path}: is not a list of keys; write lines such as base: demo_band.yaml")
    problems = []
    for key in grid.keys() - KEYS.keys():
        near = get_close_matches(key, KEYS, 1)
        fix = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}"
        problems.append(f"{key}: is not a key; {fix}")
    problems += [f"{key}: is missing" for key in ("base", "seeds") if key not in grid]
    if not grid.keys() & {"runs", "grid"}:
        problems.append("runs, grid: both are missing; name configurations or axes")
    checks = [(key, value, KEYS[key]) for key, value in grid.items() if key in KEYS]
    for part, kind in (("runs", dict), ("grid", list)):
        entries = grid[part].items() if isinstance(grid.get(part), dict) else ()
        # `grpo:` alone is the base itself
        checks += [(f"{part}: {name}", value, kind) for name, value in entries if part == "grid" or value]
    checks += [("seeds", seed, str) for seed in grid.get("seeds", ()) if not isinstance(grid["seeds"], str)]
    for where, value, kind in checks:
        if not isinstance(value, kind) or not value:
            problems.append(f"{where}: is not {WORDS[kind]} (got {str(value)!r:.60})")
    if problems:
        raise ValueError("\n".join(f"{path}: {line}" for line in problems))
    return grid


def options(*layers: Mapping[str, Any]) -> dict[str, str]:
    """Keys of train.py; later layers override earlier ones. A layer that sets `rule` drops earlier `rule_args`.

    >>> options({"rule": "band", "rule_args": {"delta": "0.1"}, "adam_betas": ["0.9", "0.99"]}, {"rule": "sapo"})
    {'rule': 'sapo', 'adam_betas': '[0.9, 0.99]'}
    """
    found: dict[str, str] = {}
    for layer in layers:
        if "rule" in layer:
            found = {key: value for key, value in found.items() if key.partition(".")[0] != "rule_args"}
        for key, value in flatten(layer).items():
            found[key] = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return found


def cells(grid: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """(label, keys) of every configuration: named runs crossed with the axes."""
    axes = grid.get("grid", {})
    for name, keys in grid.get("runs", {"": {}}).items():
        for values in product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            words = [name, *(f"{key.rpartition('.')[2]}={options({'': value})['']}" for key, value in point.items())]
            yield " ".join(filter(None, words)), options(grid.get("overrides", {}), keys or {}, point)


def plan(path: Path, out: Path, processes: int) -> tuple[list[Job], str]:
    """Every run, seed after seed, and the metric. Raises ValueError with one line per problem."""
    grid = read_grid(path)
    jobs: dict[Path, Job] = {}
    problems: dict[str, list[str]] = {}  # line -> labels of the configurations
    os.environ["WORLD_SIZE"] = str(processes)  # the batch arithmetic of a configuration depends on it
    for seed in grid["seeds"]:
        for label, keys in cells(grid):
            name = re.sub(r"[^\w.=+-]+", "_", label)
            folder = out / f"{name}_seed{seed}"
            own = {"config": grid["base"], "run_name": folder.name, "output_dir": str(out), "seed": seed}
            argv = [word for key, value in (own | keys).items() for word in (f"--{key}", value)]
            try:
                if taken := [key for key in OWN_KEYS if key in keys]:
                    raise ValueError(f"{taken[0]}: is set by the sweep; remove it")
                if folder in jobs:
                    raise ValueError("two configurations have this name; rename one")
                cfg = load(Config, argv)
                if seed == grid["seeds"][0]:
                    check_model(cfg.model)
                    find_rule(cfg)
                    check_metric(grid.get("metric", ""), cfg)
                jobs[folder] = Job(label, folder, argv, cfg)
            except ValueError as error:  # ConfigError too
                lines = error.problems if isinstance(error, ConfigError) else [" ".join(str(error).split())]
                for line in lines:
                    problems.setdefault(line.removeprefix("command line: "), []).append(label)
    del os.environ["WORLD_SIZE"]
    if problems:
        named = {line: ", ".join(dict.fromkeys(labels)) for line, labels in problems.items()}
        raise ValueError("\n".join(f"{path}: {labels}: {line}" for line, labels in named.items()))
    return list(jobs.values()), grid.get("metric", "")


def check_metric(metric: str, cfg: Config) -> None:
    """Raise ValueError for a metric that a run of `cfg` does not log."""
    sets = [cfg.eval_data] if isinstance(cfg.eval_data, str) else cfg.eval_data
    known = [f"eval/{set_name(each)}/{kind}@{cfg.eval_samples}" for each in sets for kind in ("mean", "pass", "maj")]
    patterns = [axis.pattern for axes in FIGURES.values() for axis in axes if not axis.pattern.startswith("eval")]
    if metric and metric not in known[: None if cfg.eval_every else 0]:
        if not any(re.fullmatch(pattern, metric) for pattern in patterns):
            near = get_close_matches(metric, [*known, *patterns], 1, 0.0)
            raise ValueError(f"metric: {metric!r} is not logged by this run; did you mean {near[0]}?")


# ---- running ----


@dataclass
class Runner:
    """Runs jobs, `jobs` at a time, each with `processes` processes."""

    jobs: int
    processes: int
    running: list[subprocess.Popen[str]] = field(default_factory=list)
    slots: Queue[int] = field(default_factory=Queue)
    stopped: bool = False

    def __post_init__(self) -> None:
        for slot in range(self.jobs):
            self.slots.put(slot)

    def environment(self, slot: int) -> dict[str, str]:
        """GPUs of this slot alone; one thread per process on a CPU."""
        gpus = torch.cuda.device_count()
        if not gpus:
            return {"OMP_NUM_THREADS": "1", **os.environ}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        first = slot * self.processes
        return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible[first : first + self.processes])}

    def run(self, job: Job) -> str:
        """Train one job; "" when it finished, else its last lines."""
        slot, tail = self.slots.get(), deque[str](maxlen=LAST_LINES)
        command = [sys.executable, "-m", "accelerate.commands.launch", "-q", *LAUNCH, str(self.processes)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        try:
            if self.stopped:
                return "not started"
            with (
                job.log.open("a") as log,
                # A session of its own: Ctrl-C reaches the run through `stop` alone, once.
                subprocess.Popen(
                    [*command, str(ROOT / "train.py"), *job.argv],
                    env=self.environment(slot),
                    start_new_session=True,
                    **pipes,
                ) as process,
            ):
                self.running.append(process)
                assert process.stdout
                for line in process.stdout:  # to the end of the last process that holds the pipe
                    log.write(line)
                    log.flush()
                    tail.append(line.rstrip())
        finally:
            self.slots.put(slot)
        if process.returncode == 0 and job.is_finished():
            return ""
        return "\n".join([f"exit code {process.returncode}, {job.log}", *(f"    {line}" for line in tail)])

    def stop(self) -> None:
        """End all runs with SIGTERM, on which they save a checkpoint."""
        self.stopped = True
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


def run_all(jobs: Sequence[Job], runner: Runner) -> dict[Path, str]:
    """Run the jobs that are not finished; folder -> last lines of those that failed. Raises KeyboardInterrupt."""
    todo = [job for job in jobs if not job.is_finished()]
    failed: dict[Path, str] = {}
    started, before, total = time.perf_counter(), sum(map(Job.steps, todo)), sum(job.cfg.max_steps for job in todo)
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} finished, {total - before:,} steps to train", flush=True)
    with (
        ThreadPoolExecutor(runner.jobs) as pool,
        tqdm(total=total, initial=before, unit="step", disable=None) as bar,
    ):
        pending: dict[Future[str], Job] = {pool.submit(runner.run, job): job for job in todo}
        try:
            while pending:
                done, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                bar.n = sum(map(Job.steps, todo))
                bar.refresh()
                for future in done:
                    job, trouble = pending.pop(future), future.result()
                    failed |= {job.folder: trouble} if trouble else {}
                    left_s = (time.perf_counter() - started) * (total - bar.n) / max(1, bar.n - before)
                    word = f"FAILED, {trouble}" if trouble else f"done, about {left_s / 60:.0f} min left"
                    bar.write(f"[{len(todo) - len(pending)}/{len(todo)}] {job.folder.name}: {word}")
        except KeyboardInterrupt:
            runner.stop()
            raise
    return failed


def compare_finished(jobs: Sequence[Job], failed: Mapping[Path, str], metric: str, out: Path) -> None:
    """Print the tables of the finished runs and write them with the figures to OUT/comparison.*."""
    groups = []
    for label in dict.fromkeys(job.label for job in jobs):
        runs = [job.folder for job in jobs if job.label == label and job.folder not in failed]
        groups += [Group(label, tuple(map(load_record, runs)))] if runs else []
    if not groups:
        return
    text = tables(groups, metric)
    text += "".join(f"\n- {folder.name}: failed, left out of all tables" for folder in failed)
    print(text, flush=True)
    save(groups, text, out / "comparison.png")


def main(argv: Sequence[str]) -> int:
    parser = Parser("eval.sweep", __doc__)
    parser.add_argument("grid", type=Path, help="grid file")
    parser.add_argument("--out", type=Path, help="folder of the runs (default runs/sweeps/GRID)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="processes per run (default %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="list the runs and check them; train nothing")
    args = parser.parse_args(argv)
    out = args.out or Path("runs/sweeps") / args.grid.stem
    gpus = torch.cuda.device_count()
    try:
        if args.jobs < 1 or args.processes < 1 or gpus and args.jobs * args.processes > gpus:
            raise ValueError(f"--jobs, --processes: {args.jobs} x {args.processes} do not fit {gpus or 'any'} GPUs")
        jobs, metric = plan(args.grid, out, args.processes)
        finished = [job.is_finished() for job in jobs]
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        lines = str(error).splitlines()
        parser.exit(2, "".join(f"error: {line}\n" for line in lines))
    if args.dry_run:
        for job, is_finished in zip(jobs, finished, strict=True):
            print(f"{job.folder.name}: {'finished' if is_finished else f'step {job.steps()}'} of {job.cfg.max_steps}")
        return 0
    runner = Runner(args.jobs, args.processes)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background job starts with it ignored
        signal.signal(number, signal.default_int_handler)
    try:
        failed = run_all(jobs, runner)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    compare_finished(jobs, failed, metric, out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
