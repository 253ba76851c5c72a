"""What a run has left on the disk: metrics.jsonl (an offline wandb file where that is all there is) and config.yaml.

    run = load_record(Path("runs/band_seed0"));  steps, values = run.series("train/entropy")

A run may be crashed or still running: what cannot be read (an unfinished last line, a broken line, a missing file) is
left out and said in `run.notes`, never raised. Steps logged twice, as after a resume from an earlier checkpoint, keep
the later value. A null is a number that was not finite.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import yaml

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
    if not lines:
        logged, lines = _read_wandb(path, notes)
        config = config or logged
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
    elif not (whole / "config.yaml").is_file() and not any(whole.rglob("*.wandb")):
        fix = "it has neither metrics.jsonl nor config.yaml; give folders such as runs/NAME"
    else:
        return  # of a run that has logged nothing yet, or to wandb alone
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


def _read_wandb(path: Path, notes: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Config and history of the offline wandb files under `path`, oldest first."""
    files = sorted(path.glob("**/offline-run-*/*.wandb")) + sorted(path.glob("*.wandb"))
    if not files:
        notes.append("no metrics.jsonl and no offline wandb file")
        return {}, []
    notes.append(f"read from {', '.join(file.name for file in files)}: no metrics.jsonl")
    # Here and not above: importing wandb takes a second and hardly any run needs it.
    from wandb.proto import wandb_internal_pb2 as messages

    config: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    ended = False
    for file in files:
        for data in _wandb_records(file.read_bytes(), notes):
            entry = messages.Record()  # pyright: ignore[reportAttributeAccessIssue]  (wandb picks its module by version)
            entry.ParseFromString(data)
            kind = entry.WhichOneof("record_type")
            if kind == "run":
                config |= {item.key: json.loads(item.value_json) for item in entry.run.config.update}
            elif kind == "history":
                row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in entry.history.item}
                entries.append({"step": row.get("step", row.get("_step", entry.history.step.num))} | row)
            ended = kind == "exit" or (ended and kind != "history")
    if not ended:
        notes.append("the wandb file has no end: killed, or still being written; its last steps may be missing")
    config.pop("_wandb", None)
    return config, [{k: v for k, v in row.items() if k[0] != "_"} for row in entries]


def _wandb_records(data: bytes, notes: list[str]) -> Iterator[bytes]:
    """Payloads of the log format of LevelDB that wandb writes: 32 KiB blocks of fragments, each behind a 7-byte head
    (checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last), after a 7-byte file head."""
    block, head = 32768, 7
    position, payload = head, b""
    if data[:4] != b":W&B":
        notes.append("a wandb file has another format than this reader knows, or is still empty")
        return
    while position + head <= len(data):
        left = block - position % block
        if left < head:  # too short for a head: filled with zeros
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + head])
        fragment = data[position + head : position + head + length]
        if kind == 0 or len(fragment) < length:
            return  # the writer is in the middle of this record
        position += head + length
        payload = fragment if kind in (1, 2) else payload + fragment
        if kind in (1, 4):
            yield payload
