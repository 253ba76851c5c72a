"""Readers of a run's files: metrics.jsonl and config.yaml (`load_record`), checkpoints (`find_policy`).

    run = load_record(Path("runs/band_seed0"));  steps, values = run.series("train/entropy")
    policy = find_policy("runs/band_seed0")      # newest undamaged checkpoint: policy.path, .step, .settings

Broken lines and missing files are skipped and listed in `run.notes`. A null is a number that was not finite.
"""

import json
from collections.abc import Sequence
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
    """Config and metrics of a run, read from its folder."""

    path: Path
    name: str
    config: dict[str, Any]  # the resolved config; {} if it cannot be read
    rows: dict[int, dict[str, float]]  # step -> metrics, steps ascending; nan for numbers that were not finite
    notes: tuple[str, ...]  # missing or broken data

    @property
    def last_step(self) -> int:
        return max(self.rows, default=0)

    @property
    def keys(self) -> list[str]:
        """All metrics, in the order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows.values() for key in row))

    def value(self, key: str, step: int) -> float:
        """Return one metric at one step; nan if there is none."""
        return self.rows.get(step, {}).get(key, np.nan)

    def scores(self, name: str, step: int) -> dict[str, float]:
        """Return the share of correct responses per problem of an evaluation set at one step; {} if not stored."""
        path = self.path / "evals" / f"step_{step:06d}.json"
        return json.loads(path.read_text()).get(name, {}) if path.exists() else {}

    def series(self, key: str) -> Series:
        """Return the finite values of one metric, by step."""
        points = [(step, row[key]) for step, row in self.rows.items() if np.isfinite(row.get(key, np.nan))]
        return np.array([step for step, _ in points], dtype=int), np.array([value for _, value in points], dtype=float)


def is_of_clock(metric: str) -> bool:
    """Return True for times, speed and memory, which may differ between two runs with the same seed."""
    return metric.split("/")[0] in ("time", "throughput", "memory")


def load_record(path: Path) -> Record:
    """Read one run folder. Raises ValueError for any other path, with suggestions."""
    path, near = Path(path), runs_near(path)
    if not (path / "metrics.jsonl").is_file() and (near or not (path / "config.yaml").is_file()):
        raise ValueError(f"{path} is not a run folder; {f'did you mean {near}?' if near else 'name one, runs/NAME'}")
    notes: list[str] = []
    config: dict[str, Any] = {}
    try:
        config = read_config(path)
    except ValueError as error:
        notes.append(str(error))
    rows: dict[int, dict[str, float]] = {}
    for line in read_lines(path / "metrics.jsonl", ("step",), notes):
        step = line.pop("step")
        rows[step] = {key: np.nan if value is None else value for key, value in line.items()}
    not_finite = {key: step for step in reversed(rows) for key, value in rows[step].items() if not np.isfinite(value)}
    if not_finite:
        where = [f"{key} from step {step}" for key, step in sorted(not_finite.items())]
        notes.append(f"not a finite number: {', '.join(where[:3])}{', ...' * (len(where) > 3)}; left out")
    if not rows:
        notes.append("nothing logged yet")
    if max(rows, default=0) < config.get("max_steps", 0):
        notes.append(f"at step {max(rows, default=0)} of {config['max_steps']}: stopped early or still running")
    return Record(path, config.get("run_name") or path.resolve().name, config, rows, tuple(notes))


def runs_near(path: Path) -> str:
    """Suggest runs for an error message: around `path`, inside it, or with a similar name; "" if there are none."""
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() and not path.exists() else []
    similar = [path.with_name(name) for name in get_close_matches(path.name, names)]
    for folders in (path.resolve().parents, sorted(path.glob("*")), similar):
        if runs := [str(folder) for folder in folders if (folder / "metrics.jsonl").is_file()]:
            return ", ".join(runs[:3])
    return ""


def read_config(folder: Path) -> dict[str, Any]:
    """Load config.yaml. Raises ValueError if it is absent or cannot be read."""
    try:
        return dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{folder / 'config.yaml'} cannot be read ({' '.join(str(error).split())})") from None


def read_lines(path: Path, keys: Sequence[str], notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file that have all `keys`; [] without the file. `notes` lists other lines."""
    if not path.exists():
        return []
    rows, broken = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        try:
            row = json.loads(line or "null")
        except (ValueError, RecursionError):  # also an integer with too many digits
            row = None
        if isinstance(row, dict) and row.keys() >= {*keys}:
            rows.append(row)
        elif line:
            broken.append(str(number))
    if broken:
        notes.append(f"{path.name}: no JSON object with {', '.join(keys)} in line {', '.join(broken[:5])}; left out")
    return rows


# ---- checkpoints ----


@dataclass(frozen=True)
class TrainedPolicy:
    """Policy of a checkpoint."""

    path: Path  # folder in Hugging Face format
    run: str  # name of its run
    step: int
    settings: dict[str, Any]  # saved configs.schema.Config
    warnings: list[str]


def find_policy(model: str) -> TrainedPolicy | None:
    """Find the policy of a run (newest undamaged checkpoint), of a checkpoint, or of a checkpoint's `policy` folder.

    Returns None for any other folder and for a hub id. Raises ValueError for a path near runs, for a run without an
    undamaged checkpoint, and for a damaged checkpoint.
    """
    path, warnings = Path(model), []
    newest = path.parent if path.name == "policy" else path
    if not (newest / MANIFEST).is_file():
        if not (path / "checkpoints").is_dir():
            if not (path / "config.json").is_file() and (near := runs_near(path)):
                raise ValueError(f"model: {model} is not a run; did you mean {near}?")
            return None
        newest, warnings = latest(path / "checkpoints")
        if newest is None:
            why = "; ".join(warnings) or "save_every sets how often one is saved"
            raise ValueError(f"model: {model} has no complete checkpoint yet ({why})")
    elif (problem := damage(newest, checksums=False)).startswith(("policy/", MANIFEST)):  # other files are not needed
        raise ValueError(f"model: checkpoint {newest} is damaged: {problem}; name another")
    settings, step = read_config(newest), json.loads((newest / MANIFEST).read_text())["step"]
    return TrainedPolicy(newest / "policy", settings["run_name"], step, settings, warnings)
