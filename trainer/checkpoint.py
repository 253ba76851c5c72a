"""Atomic checkpoint folders, and the name and lock of a run's folder.

    begin(root, step)                               # rank 0: empty folder root/.saving_step_000010
    with writing(): ...                             # every rank writes its files into saving_dir(root, step)
    commit(root, step, {"score": 0.31})             # rank 0: becomes root/step_000010
    prune(root, keep_last=2, keep_best=1)

    path, warnings = recover(root)                  # rank 0, at launch: the newest undamaged checkpoint

A checkpoint gets its name by one rename, after all files are flushed to disk. manifest.json lists the size and SHA-256
of each file. At launch, checkpoints that do not match their manifest are renamed to damaged_step_*.

With several machines, `root` is on a shared file system. trainer/resume.py defines the files and the barriers.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MANIFEST = "manifest.json"
FILES_OF_RUN = ("metrics.jsonl", "config.yaml", "environment.json")
_STEP = re.compile(r"step_(\d{6,})")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+,-]{0,127}")


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message names the file and the reason."""


# ---- writing ----


def saving_dir(root: Path, step: int) -> Path:
    """Return the folder in which a checkpoint is written until it is complete; the same on every rank."""
    return root / f".saving_step_{step:06d}"


def begin(root: Path, step: int) -> Path:
    """Create an empty `saving_dir`. Rank 0 only, before a barrier. Raises CheckpointError if that fails."""
    folder = saving_dir(root, step)
    with writing():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


@contextmanager
def writing() -> Iterator[None]:
    """Raise CheckpointError for a failed write inside the block (disk full, quota, file size limit).

    For a full disk, Python's files raise OSError and safetensors raises SafetensorError. torch.save raises RuntimeError
    ("unexpected pos 896 vs 790") while it handles the OSError of the file.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        numbers = {getattr(each, "errno", None) for each in (error, error.__context__)}
        full = numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        full = full or re.search("No space|quota exceeded|File too large", str(error))
        reason = "the disk is full or a quota is reached; free space or lower keep_last" if full else "writing failed"
        raise CheckpointError(f"checkpoint not saved: {reason} ({error})") from error


def commit(root: Path, step: int, info: dict[str, Any]) -> Path:
    """Write the manifest and rename `saving_dir` to root/step_000010, which must not exist.

    Rank 0 only, after a barrier. info: JSON values for the manifest. `prune` ranks by info["score"], higher is better.
    Raises CheckpointError if a write fails.
    """
    folder, final = saving_dir(root, step), _final(root, step)
    with writing():
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        with ThreadPoolExecutor() as pool:  # hashing and fsync release the interpreter lock
            entries = pool.map(_flush_and_hash, files)
        names = [path.relative_to(folder).as_posix() for path in files]
        body = {"step": step, "info": info, "files": dict(zip(names, entries, strict=True))}
        for directory in (p for p in folder.rglob("*") if p.is_dir()):
            _fsync(directory)
        replace_file(folder / MANIFEST, json.dumps({**body, "sha256": _digest_of(body)}, indent=1).encode())
        folder.rename(final)
        _fsync(root)
    return final


def prune(root: Path, keep_last: int, keep_best: int) -> list[Path]:
    """Keep the `keep_last` newest and the `keep_best` best checkpoints by info["score"]; delete and return the others.

    Only complete checkpoints (every file present, with the recorded size) count, so at least one is kept. Rank 0 only.
    """
    good = [path for path in _checkpoints(root) if not damage(path, checksums=False)]
    all_scores = {path: info(path).get("score") for path in good}
    scores = {path: score for path, score in all_scores.items() if score is not None and math.isfinite(score)}
    best = sorted(scores, key=scores.__getitem__, reverse=True)[:keep_best]  # ties: the newest first
    keep = {*good[: max(keep_last, 1)], *best}
    deleted = [path for path in _checkpoints(root) if good and path not in keep]
    for path in deleted:
        # Rename before deleting, so that an interruption leaves no incomplete checkpoint under this name.
        shutil.rmtree(path.rename(root / f".deleted_{path.name}"), ignore_errors=True)
    return deleted


# ---- reading ----


def latest(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and one warning per newer damaged checkpoint."""
    warnings = []
    for path in _checkpoints(root):
        problem = damage(path, checksums=True)
        if not problem:
            return path, warnings
        warnings.append(f"checkpoint {path.name} is damaged and skipped: {problem}")
    return None, warnings


def recover(root: Path) -> tuple[Path | None, list[str]]:
    """Remove the files of an interrupted save, then return `latest`. Rank 0 only, before anything else uses `root`.

    Damaged checkpoints newer than the result are renamed to damaged_step_000020, so that the repeated steps can save
    under their names. Raises ValueError if every checkpoint is damaged: starting over is the user's decision.
    """
    for leftover in [*root.glob(".saving_step_*"), *root.glob(".deleted_step_*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    path, warnings = latest(root)
    if path is None and warnings:
        fix = f"move {root} away to start from step 0"
        raise ValueError("\n".join([*warnings, f"{root} has no undamaged checkpoint; {fix}"]))
    for newer in _checkpoints(root)[: len(warnings)]:
        shutil.rmtree(root / f"damaged_{newer.name}", ignore_errors=True)
        newer.rename(root / f"damaged_{newer.name}")
    return path, warnings


def damage(path: Path, checksums: bool) -> str:
    """Describe the damage of a checkpoint; "" if it is intact. Without `checksums`, only sizes are checked."""
    try:
        body = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(body, dict) or body.pop("sha256", None) != _digest_of(body):
            return f"{MANIFEST} was altered"
        if path.name != _final(path.parent, body["step"]).name:
            return f"its {MANIFEST} is that of step {body['step']}: renamed or copied"
        for name, entry in body["files"].items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, {entry['bytes']} expected"
        if checksums:
            with ThreadPoolExecutor() as pool:
                digests = pool.map(sha256, [path / name for name in body["files"]])
            for (name, entry), digest in zip(body["files"].items(), digests, strict=True):
                if digest != entry["sha256"]:
                    return f"the contents of {name} do not match their checksum"
    except ValueError:  # not JSON, not UTF-8
        return f"{MANIFEST} is not readable"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    return ""


def info(path: Path) -> dict[str, Any]:
    """Return the `info` that was passed to `commit`."""
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))["info"]


def step_of(path: Path) -> int:
    """Return the step of a checkpoint folder. Example: root/step_000010 -> 10."""
    return int(path.name.removeprefix("step_"))


# ---- the folder of a run ----


def safe_run_dir(output_dir: str | Path, run_name: str) -> Path:
    """Return output_dir/run_name without creating it. Raises ValueError for an unsafe name or an unwritable folder.

    The check opens a temporary file: for root, os.access reports success even on a read-only disk.
    """
    if not _RUN_NAME.fullmatch(run_name):
        raise ValueError(
            f"run_name: {run_name!r} is not a folder name of letters, digits and . _ = + , - (128 at most, "
            f"a letter or digit first); for example run_name: band-kl_0.05"
        )
    folder = Path(output_dir) / run_name
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not parent.is_dir():
        kind = f"a link to {parent.readlink()}, which does not exist" if parent.is_symlink() else "a file"
        raise ValueError(f"output_dir: {parent} is {kind}, not a folder; choose another output_dir or move it away")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(f"output_dir: {folder} cannot be written ({error}); choose another output_dir") from None
    return folder


class RunLock:
    """Exclusive lock of `run_dir`, held until `close`. Creates `run_dir` and its folder `checkpoints`. Rank 0 only.

    The lock belongs to the process, not to forked children. The kernel releases it when the process ends, also after
    SIGKILL. Raises ValueError if another process holds it, or if one of the run's files is a folder.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / ".lock"
        try:
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")
        except OSError as error:
            path = Path(error.filename or run_dir)
            link = f"; it is a link to {path.readlink()}: is that disk mounted?" if path.is_symlink() else ""
            raise ValueError(f"output_dir: {path} cannot be used: {error.strerror}{link}") from None
        for name in FILES_OF_RUN:
            if (run_dir / name).is_dir():
                raise ValueError(f"output_dir: {run_dir / name} is a folder, the run needs a file there; move it away")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.close()
            raise ValueError(
                f"run_name: {run_dir.name!r} is being trained by another process; stop it or choose another name"
            ) from None

    def check(self) -> None:
        """Raise CheckpointError if the folder was deleted, moved or taken over by another launch."""
        try:
            ours = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except OSError:
            ours = False
        if not ours:
            raise CheckpointError(
                f"{self._path.parent} no longer belongs to this run: deleted, moved or unmounted during training"
            )

    def close(self) -> None:
        self._file.close()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: flush a temporary file to disk, then rename it."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    _fsync(new)
    new.rename(path)
    _fsync(path.parent)


# ---- details ----


def _final(root: Path, step: int) -> Path:
    return root / f"step_{step:06d}"


def _checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    folders = [p for p in root.glob("step_*") if _STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def _flush_and_hash(path: Path) -> dict[str, int | str]:
    """Flush a file to disk and return its manifest entry."""
    _fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _fsync(path: Path) -> None:
    """Flush a file or folder to disk. Some file systems do not support this for folders, which is ignored."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)
