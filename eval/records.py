"""Files of a run: metrics.jsonl and config.yaml (`load_record`), checkpoints (`find_policy`).

    run = load_record(Path("runs/band_seed0"));  steps, values = run.series("train/entropy")
    policy = find_policy("runs/band_seed0")      # newest whole checkpoint: policy.path, .step, .settings

`load_record` does not raise for broken files: an unfinished last line, a broken line or a missing file is left out and
named in `run.notes`. Of a step logged twice, as after a resume from an earlier checkpoint, the later values count. A
null is a number that was not finite.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trainer.checkpoint import MANIFEST, damage, latest

Series = tuple[np.ndarray, np.ndarray]  # steps (n,) int, ascending; values (n,) float


@dataclass(frozen=True)
class Record:
    """A run, read from its folder."""

    path: Path
    name: str
    config: dict[str, Any]  # the resolved config; {} where none could be read
    rows: dict[int, dict[str, float]]  # step -> metrics, steps ascending; nan where a number was not finite
    notes: tuple[str, ...]  # what a reader of its figures must know

    @property
    def last_step(self) -> int:
        return max(self.rows, default=0)

    @property
    def keys(self) -> list[str]:
        """Every metric seen, in the order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows.values() for key in row))

    def value(self, key: str, step: int) -> float:
        """One metric at one step; nan where there is none."""
        return self.rows.get(step, {}).get(key, np.nan)

    def scores(self, name: str, step: int) -> dict[str, float]:
        """Share of correct responses per problem of an evaluation set at one step; {} where none is stored."""
        try:
            stored = json.loads((self.path / "evals" / f"step_{step:06d}.json").read_text())
            return {problem: float(share) for problem, share in stored[name].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def series(self, key: str) -> Series:
        """The finite values of one metric, by step."""
        found = [(step, row[key]) for step, row in self.rows.items() if np.isfinite(row.get(key, np.nan))]
        return np.array([step for step, _ in found], dtype=int), np.array([value for _, value in found], dtype=float)


def is_of_clock(metric: str) -> bool:
    """Whether two runs of the same seed may differ in it: times, speed and memory."""
    return metric.split("/")[0] in ("time", "throughput", "memory")


def load_record(path: Path) -> Record:
    """Read one run folder. Raises ValueError for a path that is none, with the folder that may be meant."""
    path = Path(path)
    _check_is_run(path)
    notes: list[str] = []
    config = _read_config(path / "config.yaml", notes)
    lines = read_lines(path / "metrics.jsonl", "step", int, notes)
    if not (path / "metrics.jsonl").exists():
        notes.append("no metrics.jsonl")
    rows: dict[int, dict[str, float]] = {}
    not_finite: dict[str, int] = {}
    twice = 0
    for line in lines:
        step = int(line.pop("step"))
        row = rows.setdefault(step, {})
        known = {key: value for key, value in line.items() if value is None or isinstance(value, (int, float))}
        numbers = {key: np.nan if value is None else float(value) for key, value in known.items()}
        twice += any(key in row for key in numbers)
        row.update(numbers)
        for key, value in numbers.items():
            if not np.isfinite(value):
                not_finite.setdefault(key, step)
    if twice:
        notes.append(f"{twice} steps were logged twice (resumed?); the later values are shown")
    if not_finite:
        where = ", ".join(f"{key} from step {step}" for key, step in sorted(not_finite.items())[:3])
        more = f" and {len(not_finite) - 3} more" if len(not_finite) > 3 else ""
        notes.append(f"not a finite number: {where}{more}; these values are left out")
    if not rows:
        notes.append("nothing logged yet")
    wanted = config.get("max_steps")
    if rows and isinstance(wanted, int) and 0 < max(rows) < wanted:
        notes.append(f"at step {max(rows)} of {wanted}: stopped early or still running")
    return Record(
        path, str(config.get("run_name") or path.resolve().name), config, dict(sorted(rows.items())), tuple(notes)
    )


def nearest(path: Path) -> str:
    """For messages: what a path that does not exist may have meant, "" where nothing beside it is like it."""
    names: Iterable[str] = (each.name for each in path.parent.iterdir()) if path.parent.is_dir() else ()
    near = get_close_matches(path.name, list(names), 1)
    return f"did you mean {path.with_name(near[0])}?" if near else ""


def runs_in(folder: Path) -> str:
    """For messages: the first runs in a folder, "" where there are none."""
    found = sorted(str(folder / file.parent.name) for file in folder.resolve().glob("*/metrics.jsonl"))
    return ", ".join(found[:3]) + ", ..." * (len(found) > 3)


def _check_is_run(path: Path) -> None:
    whole = path.resolve()
    around = [each for each in (*path.parents[:3], *whole.parents[:3]) if (each / "metrics.jsonl").is_file()]
    if (whole / "metrics.jsonl").is_file():
        return
    if not whole.exists():
        fix = nearest(path) or "it is not there; give folders such as runs/NAME"
    elif around:
        fix = f"it is inside one; give {around[0]}"
    elif inside := runs_in(path):
        fix = f"it holds runs; give {inside}"
    elif not (whole / "config.yaml").is_file():
        fix = "it has neither metrics.jsonl nor config.yaml; give folders such as runs/NAME"
    else:
        return  # of a run that has logged nothing yet
    raise ValueError(f"{path} is no run folder: {fix}")


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        notes.append("no config.yaml")
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        notes.append(f"config.yaml cannot be read ({str(error).splitlines()[0]})")
        return {}
    if not isinstance(config, dict):
        notes.append("config.yaml holds no keys")
        return {}
    return config


def read_lines(path: Path, key: str, kind: type, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file whose `key` is of that kind; [] without the file. Other lines are told in notes."""
    if not path.exists():
        return []
    rows, broken = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # also a whole number of too many digits
            row = None
        if isinstance(row, dict) and isinstance(row.get(key), kind):
            rows.append(row)
        else:
            broken.append(number)
    if broken and broken[-1] == len(lines):  # no newline behind it: the writer is in the middle of this line
        broken.pop()
        notes.append(f"the last line of {path.name} is unfinished and left out")
    if broken:
        places = ", ".join(map(str, broken[:5]))
        notes.append(f"{path.name}: no JSON object with {key!r} in line {places}; left out")
    return rows


# ---- checkpoints ----


@dataclass(frozen=True)
class TrainedPolicy:
    """The policy of a checkpoint."""

    path: Path  # of its folder in Hugging Face format
    run: str  # name of its run
    step: int
    settings: dict[str, Any]  # configs.schema.Config as it was saved
    warnings: tuple[str, ...]


def find_policy(model: str) -> TrainedPolicy | None:
    """The policy of a run (its newest whole checkpoint), of a checkpoint, or of a checkpoint's `policy` folder.

    None for any other folder and for a hub id. Raises ValueError for a path that does not exist, a run without a whole
    checkpoint, and a checkpoint that is not whole.
    """
    path = Path(model)
    if not path.exists() and path.parent != Path() and path.parent.is_dir():
        fix = nearest(path) or "name a run, a checkpoint, another model's folder or a hub id"
        raise ValueError(f"model: {model} is not there; {fix}")
    whole = path.resolve()
    if whole.name == "policy" and (whole.parent / MANIFEST).is_file():
        return _of_checkpoint(path.parent if path.name == "policy" else whole.parent, ())
    if (whole / "policy").is_dir() and (whole / MANIFEST).is_file():
        return _of_checkpoint(path, ())
    if whole.name == "checkpoints":
        path, whole = path.parent, whole.parent
    if runs := runs_in(path):
        raise ValueError(f"model: {model} holds runs: name one, {runs}")
    if not (whole / "checkpoints").is_dir() and not (whole / "metrics.jsonl").is_file():
        return None
    newest, warnings = latest(path / "checkpoints")
    if newest is None:
        every = _config(path).get("save_every")
        why = "; ".join(warnings) or f"one is written every {every} steps (save_every) and after the last"
        raise ValueError(f"model: {model} has no whole checkpoint yet: {why}")
    return _of_checkpoint(newest, tuple(warnings))


def _of_checkpoint(folder: Path, warnings: tuple[str, ...]) -> TrainedPolicy:
    try:
        step = int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["step"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"model: {folder / MANIFEST} is not readable; name another checkpoint") from None
    found = damage(folder, checksums=False)
    if found.startswith("policy/"):  # what else is missing is not needed here
        raise ValueError(f"model: checkpoint {folder} is damaged: {found}; name another")
    settings = _config(folder)
    return TrainedPolicy(folder / "policy", str(settings.get("run_name", "run")), step, settings, warnings)


def _config(folder: Path) -> dict[str, Any]:
    """Raises ValueError when config.yaml is not there or cannot be read."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"model: {folder / 'config.yaml'} cannot be read ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"model: {folder / 'config.yaml'} holds no keys")
    return settings
