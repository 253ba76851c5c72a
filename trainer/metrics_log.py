"""metrics.jsonl: a row of metrics a step, kept in memory as well, in every checkpoint, and compared at a resume.

    log, warnings = open_log(path, kept, lock)     # kept: the rows of the checkpoint that is resumed, b"" without one
    log.append({"step": 3, "reward/mean": 0.5})    # written through to the disk
    log.rows                                       # what the next checkpoint keeps
    log.complete()                                 # raises unless the file has every row
    log.close()

The rows in memory are the run's; the file is their copy for whoever reads along. So nothing that happens to the file
(an editor's save, a deletion, a full disk, a lost line) loses a row: it is written anew from memory, or at the next
start from the checkpoint, and told. NaN and the infinities are written as null: JSON has no name for them.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from trainer.checkpoint import RunLock, replace_file

FOUND = "metrics_found.jsonl"  # a file that was changed by others, moved aside


class LogError(Exception):
    """Rows of metrics could not be written; the text says why."""


class MetricsLog:
    """The open log of one run; see `open_log`."""

    def __init__(self, path: Path, rows: bytes, lock: RunLock):
        """`path` holds `rows`, the whole lines logged so far."""
        self.rows = rows
        self._path, self._lock = path, lock
        self._written = len(rows)  # bytes of `rows` that are in the file
        self._file = open(path, "ab", buffering=0)

    def append(self, row: Mapping[str, float | None]) -> str:
        """One more row, flushed to the disk; a warning when the disk did not take it or the file was not ours any more.

        A row that the disk did not take is written with the next one. Raises CheckpointError when the run's folder is
        not ours any more.
        """
        self.check_folder()
        plain = {key: value if value is None or math.isfinite(value) else None for key, value in row.items()}
        self.rows += json.dumps(plain, allow_nan=False).encode() + b"\n"
        try:
            return self._write()
        except OSError as error:
            return f"{self._path.name} is behind ({error.strerror}); its lines are kept and written later"

    def complete(self) -> str:
        """Nothing is left to write; a warning when the file had to be written anew.

        Raises LogError when that cannot be, CheckpointError when the run's folder is not ours any more.
        """
        self.check_folder()
        try:
            return self._write()
        except OSError as error:
            raise LogError(f"{self._path} lacks rows that could not be written ({error.strerror})") from error

    def check_folder(self) -> None:
        """Raise CheckpointError when the run's folder is not ours any more."""
        self._lock.check()

    def close(self) -> None:
        self._file.close()

    def _write(self) -> str:
        warning = ""
        if not self._unchanged():
            replace_file(self._path, self.rows)
            self._file.close()
            self._file, self._written = open(self._path, "ab", buffering=0), len(self.rows)
            count = self.rows.count(b"\n")
            warning = (
                f"{self._path.name} was replaced, changed or deleted by others; written anew with all {count} rows"
            )
        while self._written < len(self.rows):
            self._written += self._file.write(self.rows[self._written :])
        os.fsync(self._file.fileno())
        return warning

    def _unchanged(self) -> bool:
        """Whether the file of that name is the one that is open here, of the size that was written."""
        try:
            there, ours = os.stat(self._path), os.fstat(self._file.fileno())
        except FileNotFoundError:
            return False
        return os.path.samestat(there, ours) and there.st_size == self._written


def open_log(path: Path, kept: bytes, lock: RunLock) -> tuple[MetricsLog, list[str]]:
    """The log at `path` with exactly the rows `kept`, and a line for whatever else was there.

    Rows after them are dropped: their steps are trained again. A file that lacks some of them, or has them altered or
    twice, is moved aside and written anew. Raises OSError when it cannot be written.
    """
    found = path.read_bytes() if path.exists() else b""
    told = _told(path.name, found, kept)
    if found != kept:
        if found and not found.startswith(kept):
            replace_file(path.with_name(FOUND), found)
        replace_file(path, kept)
    return MetricsLog(path, kept, lock), told


def _told(name: str, found: bytes, kept: bytes) -> list[str]:
    if found.startswith(kept):
        later = [_step(line) for line in found[len(kept) :].splitlines()]
        broken = later.count("?")
        counts = [(len(later) - broken, "not in a checkpoint yet, trained again"), (broken, "not whole")]
        return [f"{name}: {count} line{'s' * (count > 1)} dropped: {why}" for count, why in counts if count]
    ours, theirs = Counter(kept.splitlines()), Counter(found.splitlines())
    lost = [_step(line) for line in ours if line not in theirs]
    doubled = [_step(line) for line in ours if theirs[line] > ours[line]]
    kinds = [("missing or altered", lost), ("there twice", doubled)]
    words = (
        "; ".join(f"{kind}: step {', '.join(steps[:9])}" for kind, steps in kinds if steps) or "other lines or order"
    )
    aside = f"; what was there is kept as {FOUND}" if found else ""
    return [f"warning: {name} was not as the checkpoint knows it ({words}); written anew from the checkpoint{aside}"]


def _step(line: bytes) -> str:
    """The step of a row as text, ? for what is no row."""
    try:
        return str(int(json.loads(line)["step"]))
    except (ValueError, TypeError, KeyError):
        return "?"
