"""Checkpoint folders that are either whole or absent, and the folder of a run: its name, its lock.

    if main: begin(root, step)                      # root/.saving_step_000010
    barrier
    with writing(): save files into saving_dir(root, step)       # every rank its own
    barrier
    if main: commit(root, step, {"score": 0.31}); prune(root, keep_last=2, keep_best=1)

    path, warnings = recover(root)                  # rank 0, before anything is loaded; then tell the others `path`

A checkpoint root/step_000010 appears by one rename, after every byte of it has been flushed to the disk and listed in
manifest.json with its size and SHA-256. What does not match its manifest is passed over, said, and set aside.

With several machines, `root` is on a file system that all of them share.
Left out: what the files mean and the barriers between ranks; both are trainer/resume.py's.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
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
    """A checkpoint could not be written or read; the text says which file and why."""


# ---- writing ----


def saving_dir(root: Path, step: int) -> Path:
    """Where the files of a checkpoint are written until it is complete; the same on every rank."""
    return root / f".saving_step_{step:06d}"


def begin(root: Path, step: int) -> Path:
    """Makes an empty `saving_dir`. Rank 0 only, before a barrier. Raises CheckpointError when it cannot."""
    folder = saving_dir(root, step)
    with writing():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


@contextmanager
def writing() -> Iterator[None]:
    """Turns a failed write inside the block (disk full, quota, file size limit) into CheckpointError.

    A full disk reaches Python as OSError from files, SafetensorError from safetensors, and from torch.save as a
    RuntimeError of its own ("unexpected pos 896 vs 790") that was raised while the file's OSError was on its way up.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        words = ("No space", "quota exceeded", "File too large")  # of ENOSPC, EDQUOT, EFBIG, where no errno is kept
        numbers = [getattr(each, "errno", None) for each in (error, error.__context__)]
        full = any(number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) for number in numbers)
        full = full or any(word in str(error) for word in words)
        reason = "the disk is full or a quota is reached; free space or lower keep_last" if full else "writing failed"
        raise CheckpointError(f"checkpoint not saved: {reason} ({error})") from error


def discard(root: Path, step: int) -> None:
    """Removes what a failed save has left. Rank 0 only, after a barrier."""
    shutil.rmtree(saving_dir(root, step), ignore_errors=True)


def commit(root: Path, step: int, info: dict[str, Any]) -> Path:
    """Makes the files of `saving_dir` the checkpoint root/step_000010. Rank 0 only, after a barrier.

    `info` (JSON values) is kept in the manifest; `info["score"]`, higher is better, is what `prune` ranks by.
    A checkpoint of the same step is replaced. On CheckpointError the new files are gone and the old ones untouched.
    """
    folder, final, aside = saving_dir(root, step), _final(root, step), root / f".replaced_step_{step:06d}"
    try:
        with writing():
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            with ThreadPoolExecutor() as pool:  # hashing and fsync release the interpreter lock
                entries = list(pool.map(_seal, files))
            names = [path.relative_to(folder).as_posix() for path in files]
            body = json.loads(json.dumps({"step": step, "info": info, "files": dict(zip(names, entries, strict=True))}))
            write_text(folder / MANIFEST, json.dumps({**body, "sha256": _digest_of(body)}, indent=1))
            for directory in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
                _fsync(directory)
            if final.exists():
                final.rename(aside)  # `recover` brings it back, should we die before the next line
            folder.rename(final)
            _fsync(root)
    except CheckpointError:
        discard(root, step)
        if aside.exists() and not final.exists():
            aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return final


def prune(root: Path, keep_last: int, keep_best: int) -> list[Path]:
    """Deletes all checkpoints but the `keep_last` newest and the `keep_best` best by info["score"]; returns those gone.

    Only complete ones (every file there, with its size) count, so one of them always stays. Rank 0 only.
    """
    good = [path for path in _checkpoints(root) if not damage(path, checksums=False)]
    scores = {path: math.nan if (score := info(path).get("score")) is None else score for path in good}
    scored = [path for path in good if math.isfinite(scores[path])]
    ranked = sorted(scored, key=lambda path: scores[path], reverse=True)  # of equals, the newest first
    keep = {*good[: max(keep_last, 1)], *ranked[:keep_best]}
    gone = [path for path in _checkpoints(root) if path not in keep] if keep else []
    for path in gone:
        # Hidden first: a deletion cut short leaves no half of a checkpoint under its name.
        shutil.rmtree(path.rename(root / f".deleted_{path.name}"), ignore_errors=True)
    return gone


# ---- reading ----


def latest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte matches its manifest, and a line for each newer one that does not."""
    warnings = []
    for path in _checkpoints(root):
        found = damage(path, checksums=True)
        if not found:
            return path, warnings
        warnings.append(f"checkpoint {path.name} is damaged and passed over: {found}")
    return None, warnings


def recover(root: Path) -> tuple[Path | None, list[str]]:
    """`latest`, after clearing what an interrupted save has left; rank 0 only, before anything else touches `root`.

    Damaged checkpoints newer than the one returned are renamed to damaged_step_000020, so that the steps trained again
    do not meet them. Raises CheckpointError when there are checkpoints and all are damaged: starting over is the
    user's decision.
    """
    for aside in sorted(root.glob(".replaced_step_*")):
        final = root / aside.name.removeprefix(".replaced_")
        if not final.exists():
            aside.rename(final)
    for leftover in [path for name in ("saving", "replaced", "deleted") for path in root.glob(f".{name}_step_*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    path, warnings = latest(root)
    if path is None and warnings:
        fix = f"move {root} away to start from step 0"
        raise CheckpointError("\n".join([*warnings, f"no good checkpoint is left in {root}; {fix}"]))
    for newer in _checkpoints(root):
        if newer == path:
            break
        shutil.rmtree(root / f"damaged_{newer.name}", ignore_errors=True)
        newer.rename(root / f"damaged_{newer.name}")
    return path, warnings


def damage(path: Path, checksums: bool) -> str:
    """What is wrong with a checkpoint, in words; empty when nothing is. Without `checksums` only sizes are compared."""
    try:
        body = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(body, dict) or body.pop("sha256", None) != _digest_of(body):
            return f"{MANIFEST} was altered"
        if not body["files"]:
            return "it holds no files"
        if path.name != _final(path.parent, body["step"]).name:
            return f"its {MANIFEST} is that of step {body['step']}: renamed or copied"
        for name, entry in body["files"].items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, {entry['bytes']} expected"
        if checksums:
            with ThreadPoolExecutor() as pool:
                digests = pool.map(_sha256, [path / name for name in body["files"]])
                for (name, entry), digest in zip(body["files"].items(), digests, strict=True):
                    if digest != entry["sha256"]:
                        return f"the contents of {name} do not match their checksum"
    except ValueError:  # not JSON, not UTF-8
        return f"{MANIFEST} is not readable"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    return ""


def info(path: Path) -> dict[str, Any]:
    """The `info` that a checkpoint was committed with."""
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))["info"]


def step_of(path: Path) -> int:
    """The step of root/step_000010: 10."""
    match = _STEP.fullmatch(path.name)
    assert match, f"{path} is not a checkpoint"
    return int(match[1])


# ---- the folder of a run ----


def safe_run_dir(output_dir: str | Path, run_name: str) -> Path:
    """output_dir/run_name, for names that cannot lead anywhere else and folders that can be written.

    Raises ValueError for others. Makes nothing.
    """
    if not _RUN_NAME.fullmatch(run_name):
        raise ValueError(
            f"run_name: {run_name!r} is not a folder name of letters, digits and . _ = + , - (128 at most, "
            f"a letter or digit first); for example run_name: band-kl_0.05"
        )
    folder = Path(output_dir) / run_name
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        what = f"a link to {there.readlink()}, which is not there" if there.is_symlink() else "a file"
        raise ValueError(f"output_dir: {there} is {what}, a folder is needed; give another output_dir or move it away")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir: {there} cannot be written (its rights, or a read-only disk); give another one")
    return folder


class RunLock:
    """Makes `run_dir` ours, with its folder `checkpoints`, until `close`. Rank 0 only.

    The lock belongs to the process (not to children it forks) and ends with it, also after SIGKILL. Raises ValueError
    when another process has it, or when something in the folder is not what a run keeps there.
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
                raise ValueError(f"output_dir: {run_dir / name} is a folder, a run keeps a file there; move it away")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.close()
            raise ValueError(
                f"run_name: {run_dir.name!r} is being trained by another process; stop it or choose another name"
            ) from None

    def check(self) -> None:
        """Raise CheckpointError when the folder is not ours any more: deleted, moved, or taken by another launch."""
        try:
            ours = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except OSError:
            ours = False
        if not ours:
            raise CheckpointError(
                f"{self._path.parent} is not this run's any more: deleted or moved while it trained, or not mounted"
            )

    def close(self) -> None:
        self._file.close()


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file that is whole on the disk before it has its name."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    _fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a file and flushes it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# ---- details ----


def _final(root: Path, step: int) -> Path:
    return root / f"step_{step:06d}"


def _checkpoints(root: Path) -> list[Path]:
    """Newest first."""
    found = [p for p in root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def _seal(path: Path) -> dict[str, int | str]:
    """Flushes a file to the disk; its entry in the manifest."""
    _fsync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _fsync(path: Path) -> None:
    """Of a file or a folder; some file systems refuse folders, which is not a failed write."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)
