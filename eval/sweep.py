"""Train a grid of configurations and seeds, several runs at once, then compare them.

    python -m eval.sweep GRID.yaml --jobs 2          # the same command again resumes; finished runs are skipped
    python -m eval.sweep GRID.yaml --dry_run         # list the runs and check their configurations

Example of a grid file. `base` and `seeds` are required:

    base: demo_band.yaml                    # --config of every run
    overrides: {max_steps: 20}              # keys of every run
    runs:                                   # name: keys; the first is the reference of the comparison
      grpo: {rule: fixed, rule_args: {low: 0.2, high: 0.2}}
      band: {rule: band}
    grid: {lr: [5.0e-5, 1.0e-4]}            # axes: each run with each combination of values
    seeds: [0, 1, 2]
    metric: eval/toy_eval/mean@32           # ranks the configurations by its final value

OUT (default runs/sweeps/GRID) contains a run folder and a console log per run, and comparison.md and .png of
eval.compare over the finished runs. Each run has --processes processes, each on its own GPU. On a CPU, each process has
one thread unless OMP_NUM_THREADS is set, so that --jobs does not change results.
Exit code: 0; 1 if a run failed; 2 for an invalid grid, before any run starts; 130 after Ctrl-C or SIGTERM.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from queue import Queue
from typing import Any

import torch
import yaml
from tqdm import tqdm

from configs import ConfigError, diff, load
from configs.schema import Config
from eval.compare import REPEAT_KEYS, Parser, flatten, save, tables
from eval.plots import Group
from eval.records import load_record
from trainer.checkpoint import latest, step_of
from trainer.preflight import check_model, find_rule

ROOT = Path(__file__).resolve().parent.parent
KEYS: dict[str, type] = {"base": str, "overrides": dict, "runs": dict, "grid": dict, "seeds": list, "metric": str}
WORDS = {str: "text", list: "a list [a, b]", dict: "a mapping {name: value}"}
LAST_LINES = 12  # lines of a failed run's console log to print


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    label: str  # label of its configuration
    folder: Path
    argv: list[str]  # arguments of train.py
    cfg: Config

    def is_finished(self) -> bool:
        """Return True if the last step has a checkpoint. Raises ValueError if it was trained with other keys."""
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
    """Load a grid file: every value as text, absent keys empty. Raises ValueError with one line per problem."""
    try:
        grid = dict(yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    problems = [f"{key}: is not a key; the keys are {', '.join(KEYS)}" for key in grid.keys() - KEYS.keys()]
    problems += [f"{key}: is missing" for key in ("base", "seeds") if key not in grid]
    checks = [(key, grid.setdefault(key, kind()), kind) for key, kind in KEYS.items()]
    for part, kind in (("runs", dict), ("grid", list)):
        entries = grid[part].items() if isinstance(grid[part], dict) else ()
        checks += [(f"{part}: {name}", value or kind(), kind) for name, value in entries]  # `grpo:` alone is the base
    for where, value, kind in checks:
        if not isinstance(value, kind):
            problems.append(f"{where}: is not {WORDS[kind]} (got {str(value)!r:.60})")
    if problems:
        raise ValueError("\n".join(f"{path}: {line}" for line in problems))
    return grid


def options(*layers: Mapping[str, Any]) -> dict[str, str]:
    """Merge layers of train.py keys: later layers override earlier ones, and `rule` drops earlier `rule_args`.

    >>> options({"rule": "band", "rule_args": {"delta": "0.1"}, "adam_betas": ["0.9", "0.99"]}, {"rule": "sapo"})
    {'rule': 'sapo', 'adam_betas': '[0.9, 0.99]'}
    """
    merged: dict[str, str] = {}
    for layer in layers:
        if "rule" in layer:
            merged = {key: value for key, value in merged.items() if key.partition(".")[0] != "rule_args"}
        for key, value in flatten(layer).items():
            merged[key] = as_text(value)
    return merged


def as_text(value: Any, inside: bool = False) -> str:
    """Write a value of a grid for the command line. Texts inside a list or mapping are quoted if they need it."""
    if isinstance(value, list):
        return f"[{', '.join(as_text(each, True) for each in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {as_text(each, True)}' for key, each in value.items())}}}"
    return json.dumps(value, ensure_ascii=False) if inside and not re.fullmatch(r"[\w.+-]+", value) else value


def cells(grid: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (label, keys) of every configuration: the product of named runs and axes."""
    for name, keys in (grid["runs"] or {"": {}}).items():
        for values in product(*grid["grid"].values()):
            point = dict(zip(grid["grid"], values, strict=True))
            words = [name, *(f"{key.rpartition('.')[2]}={as_text(value)}" for key, value in point.items())]
            yield " ".join(filter(None, words)) or "base", options(grid["overrides"], keys or {}, point)


def plan(path: Path, out: Path, processes: int) -> tuple[list[Job], str]:
    """Return all runs, ordered by seed, and the metric. Raises ValueError with the problems of an invalid run."""
    grid = read_grid(path)
    jobs: dict[Path, Job] = {}
    for seed in grid["seeds"]:
        for label, keys in cells(grid):
            name = re.sub(r"[^\w.=+-]+", "_", label)
            folder = out / f"{name}_seed{seed}"
            own = {"config": grid["base"], "run_name": folder.name, "output_dir": str(out), "seed": str(seed)}
            argv = [word for key, value in (*own.items(), *keys.items()) for word in (f"--{key}", value)]
            os.environ["WORLD_SIZE"] = str(processes)  # batch sizes of a config depend on it
            try:
                if folder in jobs:
                    raise ValueError("two configurations have this name; rename one")
                cfg = load(Config, argv)
                if seed == grid["seeds"][0]:
                    check_model(cfg.model)
                    find_rule(cfg)
                jobs[folder] = Job(label, folder, argv, cfg)
            except ValueError as error:
                lines = error.problems if isinstance(error, ConfigError) else [" ".join(str(error).split())]
                raise ValueError("\n".join(f"{path}: {label}: {line}" for line in lines)) from None
            finally:
                del os.environ["WORLD_SIZE"]
    return list(jobs.values()), grid["metric"]


# ---- running ----


def environment(slot: int, processes: int) -> dict[str, str]:
    """Return the environment of a run: the GPUs of its slot, or one thread per process on a CPU."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return {"OMP_NUM_THREADS": "1", **os.environ}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible[slot * processes : (slot + 1) * processes])}


def run_all(jobs: Sequence[Job], at_once: int, processes: int) -> list[Job]:
    """Run the unfinished jobs; return those that failed. Raises KeyboardInterrupt after stopping all runs."""
    todo = [job for job in jobs if not job.is_finished()]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} finished", flush=True)
    failed: list[Job] = []
    running: list[subprocess.Popen[bytes]] = []
    slots: Queue[int] = Queue()
    for slot in range(at_once):
        slots.put(slot)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]

    def train(job: Job) -> str:
        """Train one job; return "" if it finished, else its exit code and last lines."""
        slot, log = slots.get(), job.folder.with_name(f"{job.folder.name}.log")
        with log.open("a") as output:
            # In a new session, Ctrl-C reaches the run only once, through `terminate`.
            process = subprocess.Popen(
                [*launcher, str(ROOT / "train.py"), *job.argv],
                env=environment(slot, processes),
                start_new_session=True,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            running.append(process)
            code = process.wait()
        slots.put(slot)
        if code == 0 and job.is_finished():
            return ""
        lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join([f"exit code {code}, {log}", *(f"    {line}" for line in lines)])

    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(todo), unit="run", disable=None) as bar:
        pending = {pool.submit(train, job): job for job in todo}
        try:
            for future in as_completed(pending):
                job, failure = pending[future], future.result()
                failed += [job] * bool(failure)
                bar.update()
                bar.write(f"{job.folder.name}: {f'FAILED, {failure}' if failure else 'done'}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()  # the run saves a checkpoint
            raise
    return failed


def compare_finished(jobs: Sequence[Job], failed: Sequence[Job], metric: str, out: Path) -> None:
    """Print the tables of the finished runs, and write tables and figures to OUT/comparison.*."""
    groups: dict[str, list[Job]] = {}
    for job in [job for job in jobs if job not in failed]:
        groups.setdefault(job.label, []).append(job)
    if groups:
        record_groups = [Group(label, tuple(load_record(job.folder) for job in of)) for label, of in groups.items()]
        text = tables(record_groups, metric) + "".join(
            f"\n- {job.folder.name}: failed, left out of all tables" for job in failed
        )
        print(text, flush=True)
        save(record_groups, text, out / "comparison.png")


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
        parser.exit(2, "".join(f"error: {line}\n" for line in str(error).splitlines()))
    if args.dry_run:
        for job, is_finished in zip(jobs, finished, strict=True):
            print(f"{job.folder.name}: {'finished' if is_finished else 'to train'}")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: shells start background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        failed = run_all(jobs, args.jobs, args.processes)
        compare_finished(jobs, failed, metric, out)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    except ValueError as error:
        parser.error(str(error))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
