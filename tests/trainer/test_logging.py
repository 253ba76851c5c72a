"""logging.py: the JSON record, the console, and the real wandb client: offline, refused, mute, resumed, killed."""

import contextlib
import fcntl
import gzip
import json
import math
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT, wandb_records

from trainer import logging
from trainer.checkpoint import CheckpointError, RunLock
from trainer.logging import LogError, Tracker, console_line, restore_rows

KEY = "k" * 40

METRICS = {
    "train/entropy": 0.5,
    "reward/mean": 0.25,
    "clip/up": 0.01,
    "clip/up/p<0.2": 0.1,
    "clip/down": 0.002,
    "optim/lr": 1e-6,
    "eval/aime24/mean@32": 0.125,
    "eval/aime24/pass@32": 0.5,
}
GLANCE = {
    "at_a_glance/train_entropy",
    "at_a_glance/reward_mean",
    "at_a_glance/clip_up",
    "at_a_glance/clip_up_p<0.2",
    "at_a_glance/clip_down",
    "at_a_glance/eval_aime24_mean@32",
}


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[RunLock]:
    it = RunLock(tmp_path)
    yield it
    it.close()


def tracker(run_dir: Path, lock: RunLock | None, rows: bytes = b"") -> Tracker:
    return Tracker(run_dir, {}, mode="disabled", project="p", run_id=None, max_steps=10, lock=lock, rows=rows)


# ---- the record and the console ----


@pytest.mark.promise("NaN and infinities in metrics.jsonl")
def test_a_step_is_a_row_to_the_last_bit_and_a_line_on_the_console(tmp_path, lock, capsys):
    it = tracker(tmp_path, lock)
    it.log(0, {"x": 0.1 + 0.2, "y": math.inf, "z": math.nan})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1  # there before the run ends
    it.log(1, METRICS)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert it.rows() == text.encode() and "NaN" not in text and "Infinity" not in text  # which are no JSON
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows == [{"step": 0, "x": 0.30000000000000004, "y": None, "z": None}, {"step": 1, **METRICS}]
    assert capsys.readouterr().out.splitlines() == [
        "step  0/10",
        "step  1/10 | reward 0.250 | entropy 0.500 | clip up 1.0% | clip down 0.2% | lr 1e-06 | aime24 mean@32 0.125",
    ]


def test_the_console_line_tells_the_time_left():
    assert console_line(3, 100, {"time/step_s": 59.6 / 97}) == "step   3/100 | eta 1m00s"
    assert console_line(3, 100, {"time/step_s": 75.0}) == "step   3/100 | eta 2h01m"
    assert console_line(3, 100, {"optim/grad_norm": math.nan}) == "step   3/100 | grad nan"


def test_samples_are_one_json_row_per_line(tmp_path, lock, capsys):
    it = tracker(tmp_path, lock)
    rows = [
        {"problem": "1+1=?\n", "answer": "é", "correct": True},
        {"problem": "x" * 300, "answer": None, "correct": False},
    ]
    it.samples(10, rows)
    it.samples(20, rows)
    it.samples(30, [])
    lines = (tmp_path / "samples" / "step_000010.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert not (tmp_path / "samples" / "step_000030.jsonl").exists()
    assert capsys.readouterr().out == "    problem: 1+1=? | answer: é | correct: True\n"  # once per minute


def test_what_a_model_wrote_does_not_reach_the_terminal_raw(tmp_path, lock, capsys):
    it = tracker(tmp_path, lock)
    it.samples(1, [{"answer": "\x1b[2Jgone \ud800", "token_ids": [1]}])
    assert capsys.readouterr().out == "    answer: \N{REPLACEMENT CHARACTER}[2Jgone \N{REPLACEMENT CHARACTER}\n"
    text = (tmp_path / "samples" / "step_000001.jsonl").read_bytes()
    assert b"[2Jgone" in text and b"\\ud800" in text


def test_a_full_disk_delays_the_lines_of_metrics_and_loses_none(tmp_path, lock, capsys):
    it = tracker(tmp_path, lock)
    it.log(0, {"x": 0.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(it.rows()) + 5, hard))  # room for half a line
    try:
        it.log(1, {"x": 1.0})
        it.log(2, {"x": 2.0})
        it.samples(2, [{"text": "y" * 1000}])
        with pytest.raises(LogError, match="metrics.jsonl lacks rows that could not be written .File too large."):
            it.complete()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out = capsys.readouterr().out
    assert out.count("warning: metrics.jsonl is behind (File too large)") == 2
    assert "warning: samples/step_000002.jsonl is incomplete" in out
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "x": 0.0}\n{"ste'
    it.complete()
    assert steps_of(tmp_path / "metrics.jsonl") == [0, 1, 2]


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def editor_saves(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes())
    (path.parent / "new").rename(path)


CHANGES = {
    "saved by an editor": editor_saves,  # another file of the same content: nothing to restore
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_text(""),
    "a line added": lambda path: path.open("a").write("noise\n"),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.promise("metrics.jsonl replaced, emptied or deleted while the run writes")
def test_metrics_that_others_touched_while_the_run_wrote_them_are_written_anew(tmp_path, lock, capsys, how, last):
    it = tracker(tmp_path, lock)
    it.log(0, {})
    it.log(1, {})
    CHANGES[how](tmp_path / "metrics.jsonl")
    it.complete() if last else it.log(2, {})
    it.log(3, {})  # into the file of that name
    assert steps_of(tmp_path / "metrics.jsonl") == ([0, 1, 3] if last else [0, 1, 2, 3])
    said = capsys.readouterr().out
    warning = "warning: metrics.jsonl was changed or deleted by another program; restored with all"
    assert said.count(warning) == (how != "saved by an editor")


@pytest.mark.promise("the run's folder deleted, moved or taken over while it trains")
def test_a_run_whose_folder_is_gone_ends(tmp_path, lock):
    it = tracker(tmp_path, lock)
    (tmp_path / ".lock").unlink()
    for asked in (lambda: it.log(0, {}), it.rows, it.complete):
        with pytest.raises(CheckpointError, match="no longer belongs to this run"):
            asked()


# ---- at a resume ----

KEPT = b'{"step": 0}\n{"step": 1}\n{"step": 2}\n'
FOUND = {
    # content of the file, of a checkpoint with the rows 0 to 2 -> the line about it; None: no line
    KEPT: None,
    KEPT + b'{"step": 3}\n{"step": 4}\n{"st': "metrics.jsonl: 3 lines after the checkpoint dropped; their steps are",
    KEPT + b'{"step": 3}': "metrics.jsonl: 1 lines after the checkpoint dropped; their steps are trained again",
    b'{"step": 0}\n{"step": 2}\n{"step": 3}\n': "(missing, altered or doubled: step 1);",
    b'{"step": 0}\n{"step": 1}\n{"step": 1}\n{"step": 2}\n': "(missing, altered or doubled: step 1);",
    b'{"step": 0}\n{"step": 1}\n{"ste': "(missing, altered or doubled: step 2);",
    b'{"step": 1}\n{"step": 0}\n{"step": 2}\n': "(other lines or order);",
    b"": "(missing, altered or doubled: step 0, 1, 2); restored from the checkpoint",
}


@pytest.mark.parametrize("found", FOUND)
@pytest.mark.promise("rows of metrics.jsonl missing, duplicated, truncated or altered at a resume")
def test_a_resumed_log_has_the_rows_of_the_checkpoint_and_tells_what_was_not_so(tmp_path, lock, found):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(found)
    inode = path.stat().st_ino
    lines = restore_rows(path, KEPT)
    it = tracker(tmp_path, lock, KEPT)
    assert path.read_bytes() == it.rows() == KEPT
    assert len(lines) == (FOUND[found] is not None) and all(FOUND[found] in line for line in lines)
    assert (path.stat().st_ino == inode) == (found == KEPT)  # not rewritten for nothing
    aside = tmp_path / "metrics_found.jsonl"
    assert aside.exists() == bool(found and not found.startswith(KEPT))
    assert not aside.exists() or aside.read_bytes() == found
    it.log(3, {})
    assert steps_of(path) == [0, 1, 2, 3]


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    it = tracker(tmp_path / "run", None)
    it.log(0, METRICS)
    it.samples(0, [{"a": 1}])
    it.histogram("h", np.ones(1))
    it.artifact([tmp_path], "a")
    it.info("hello")
    with it.progress(3, "optimize", "micro-batches") as bar:
        bar.update()
    it.finish()
    assert capsys.readouterr() == ("", "") and not (tmp_path / "run").exists()


BARS = """
from pathlib import Path
from trainer.checkpoint import RunLock
from trainer.logging import Tracker
keys = dict(project="p", run_id=None, max_steps=10, lock=RunLock(Path({0!r})), rows=b"")
it = Tracker(Path({0!r}), {{}}, mode="disabled", **keys)
with it.progress(3, "optimize", "micro-batches") as bar:
    for _ in range(3):
        it.info("a line")
        bar.update()
with it.progress(5, "rollout", "sequences") as bar:
    bar.update(5)
"""


def test_bars_are_drawn_on_a_terminal_only_and_lines_stay_whole(tmp_path):
    command = [sys.executable, "-c", BARS.format(str(tmp_path))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert (done.stdout, done.stderr) == ("a line\n" * 3, "")

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, text=True, env=env, check=True)
    drawn = os.read(master, 100_000).decode()
    os.close(slave)
    os.close(master)
    assert done.stdout == "a line\n" * 3
    assert "optimize" in drawn and "micro-batches" in drawn and "rollout" in drawn and "0/5" in drawn


def test_environment_has_this_launch_and_the_earlier_ones(tmp_path):
    assert logging.write_environment(tmp_path) == logging.write_environment(tmp_path) == []
    now = json.loads((tmp_path / "environment.json").read_text())
    assert len(now["earlier_launches"]) == 1 and "earlier_launches" not in now["earlier_launches"][0]
    assert now["command"][1:] == sys.argv and now["python"].startswith("3.")
    assert now["packages"]["torch"] and now["packages"]["wandb"]
    assert now["hardware"]["cores"] >= 1 and now["hardware"]["memory_gib"] > 0.1
    assert isinstance(now["hardware"]["gpus"], list)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert now["git"]["commit"] == (head.strip() or None)


def test_a_launch_with_other_threads_or_packages_than_the_one_before_is_told(tmp_path, monkeypatch):
    """A run goes on to the last bit only where these are the same."""
    logging.write_environment(tmp_path)
    then = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: then + 1)
    monkeypatch.setattr(logging, "PACKAGES", logging.PACKAGES - {"wandb"})
    (line,) = logging.write_environment(tmp_path)
    assert f"threads {then} then, {then + 1} now" in line and line.endswith(" then, None now")
    (tmp_path / "environment.json").write_text('{"earlier_launches": [], "hardware": 3}')
    assert logging.write_environment(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{garbage", "[1]", "{}", '{"earlier_launches": null}'])
@pytest.mark.promise("environment.json empty, or not a JSON object")
def test_an_environment_that_cannot_be_read_is_set_aside(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    (line,) = logging.write_environment(tmp_path)
    assert "environment.json cannot be read, saved as environment_found.json" in line
    assert (tmp_path / "environment_found.json").read_text() == text
    assert json.loads((tmp_path / "environment.json").read_text())["earlier_launches"] == []
    assert logging.write_environment(tmp_path) == []


# ---- wandb, in a process of its own as in a run ----

RUN = """
import json, os, signal, socket, sys, time
from pathlib import Path
import numpy as np
from trainer import logging
from trainer.checkpoint import RunLock
from trainer.logging import Tracker
run_dir, mode, run_id, first, last, event = sys.argv[1:]
config = {"delta": 0.05, "eval_data": ["a", "b"]}
path, lock = Path(run_dir, "metrics.jsonl"), RunLock(Path(run_dir))
rows = path.read_bytes() if path.exists() else b""
keys = dict(project="bandpo", run_id=run_id or None, max_steps=9, lock=lock, rows=rows)
import wandb  # not counted
began = time.monotonic()
it = Tracker(Path(run_dir), config, mode=mode, **keys)
print("started after", time.monotonic() - began)
if event in ("kill", "drip"):
    it._wandb._started.wait(60)
for step in range(int(first), int(last)):
    it.histogram("histogram/ratio", np.array([0.5, 1.0, 1.0, np.inf, np.nan]))
    it.histogram("histogram/empty", np.array([np.nan]))
    if step == int(last) - 1:
        it.samples(step, [{"problem": "1+1", "correct": True}, {"problem": None, "correct": "no"}])
    it.log(step, json.loads(os.environ["METRICS"]))
    if event == "kill" and step == 1:
        for line in os.popen("ps -A -o pid,ppid,comm"):
            pid, parent, name = line.split(maxsplit=2)
            if parent == str(os.getpid()) and name.startswith("wandb-core"):
                os.kill(int(pid), signal.SIGKILL)
if event == "drip":
    host, port = os.environ["WANDB_BASE_URL"].removeprefix("http://").split(":")
    asked = socket.create_connection((host, int(port)))
    asked.sendall(b"POST /drip HTTP/1.1\\r\\n\\r\\n")
    asked.recv(1)
    logging.FINISH_TIMEOUT_S = logging.SERVICE_TIMEOUT_S = 1.0
it.histogram("histogram/ratio", np.ones(1))  # of a step whose evaluation is interrupted: its row is not sent
Path(run_dir, "table.md").write_text("| a |")
it.artifact([Path(run_dir, "table.md")], "comparison")
began = time.monotonic()
try:
    if event == "crash":
        raise KeyError("a bug")
finally:
    it.finish()
print("finished after", time.monotonic() - began)
print("id", it.run_id)
"""


def run(
    run_dir: Path, mode: str, run_id: str = "", first: int = 0, last: int = 3, event: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """A short run with the settings of `env` and none of the user's own. A hang fails by its timeout."""
    run_dir.mkdir(exist_ok=True)
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("WANDB") and "proxy" not in key.lower()
    }
    clean |= {"HOME": str(run_dir), "NETRC": str(run_dir / "netrc"), "PYTHONPATH": str(ROOT)}
    clean |= {"METRICS": json.dumps(METRICS), **env}
    command = [sys.executable, "-c", RUN, str(run_dir), mode, run_id, str(first), str(last), event]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False, timeout=120, cwd=run_dir)
    assert done.returncode == int(event == "crash"), done.stderr
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(last))  # whatever happens to wandb
    return done


def line_of_wandb(done: subprocess.CompletedProcess[str]) -> str:
    """The first line about wandb; on a busy machine the first steps may be printed before it."""
    return next(line for line in done.stdout.splitlines() if line.startswith("wandb: "))


def history(path: Path) -> list[dict[str, Any]]:
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def offline_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_an_offline_run_holds_everything_and_its_resumption_the_same_id(tmp_path):
    done = run(tmp_path, "offline")
    run_id = re.search(r"^id (\w+)$", done.stdout, re.M)
    assert run_id
    line = line_of_wandb(done)
    assert (
        line == f"wandb: offline, as configured; to upload later: wandb sync {tmp_path}/wandb/offline-run-*-{run_id[1]}"
    )

    (file,) = offline_files(tmp_path)
    assert file.parent.match(f"offline-run-*-{run_id[1]}")  # what the line names
    rows = history(file)
    assert [row["_step"] for row in rows] == [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert {key: row[key] for key in METRICS} == METRICS
        assert {key for key in row if key.startswith("at_a_glance/")} == GLANCE
        assert sum(row["histogram/ratio.values"]) == 3 and "histogram/empty.values" not in row
    assert rows[2]["samples.nrows"] == 2 and "samples.nrows" not in rows[1]
    every = list(wandb_records(file))
    (started,) = (r.run for r in every if r.WhichOneof("record_type") == "run")
    assert (started.run_id, started.project, started.display_name) == (run_id[1], "bandpo", tmp_path.name)
    assert {
        item.key: json.loads(item.value_json) for item in started.config.update if not item.key.startswith("_")
    } == {
        "delta": 0.05,
        "eval_data": ["a", "b"],
    }
    axes = [r.metric for r in every if r.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in axes]
    assert "comparison" in [record.artifact.name for record in every]
    assert [record.exit.exit_code for record in every if record.WhichOneof("record_type") == "exit"] == [0]

    run(tmp_path, "offline", run_id=run_id[1], first=3, last=5)
    _, second = offline_files(tmp_path)
    assert [row["step"] for row in history(second)] == [3, 4]
    assert run_id[1] in second.name


@pytest.mark.slow
def test_disabled_leaves_no_trace(tmp_path):
    done = run(tmp_path, "disabled")
    assert "wandb" not in done.stdout and not (tmp_path / "wandb").exists()
    done = run(tmp_path / "other", "auto", WANDB_MODE="disabled")
    assert "wandb" not in done.stdout and not offline_files(tmp_path / "other")


@pytest.mark.slow
def test_wandb_s_own_offline_setting_is_followed(tmp_path):
    server = Server(resumed=None, refuses=False)
    done = run(tmp_path, "auto", WANDB_MODE="offline", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert "wandb: offline, as set by WANDB_MODE or `wandb offline`; to upload later" in done.stdout
    assert server.requests == 0  # telemetry included


@pytest.mark.slow
def test_a_closed_port_is_offline_at_once(tmp_path):
    done = run(tmp_path, "auto", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    line = line_of_wandb(done)
    assert line.startswith("wandb: offline, 127.0.0.1 does not answer (") and "wandb sync" in line
    assert len(history(offline_files(tmp_path)[0])) == 3


@pytest.mark.slow
def test_a_server_that_accepts_and_says_nothing_is_offline(tmp_path):
    with create_server(("127.0.0.1", 0), backlog=16) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        done = run(tmp_path, "auto", WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    assert "offline, 127.0.0.1 does not answer (timed out" in done.stdout
    assert len(history(offline_files(tmp_path)[0])) == 3


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"WANDB_BASE_URL": "garbage"}, {"WANDB_MODE": "nonsense"}])
def test_settings_that_wandb_refuses_switch_it_off_with_a_line(tmp_path, setting):
    done = run(tmp_path, "auto", **setting)
    line = line_of_wandb(done)
    assert line.startswith("wandb: off (1 validation error for Settings")
    assert line.endswith("; metrics.jsonl has everything")


class Server(ThreadingHTTPServer):
    """As much of the W&B server as its client needs to believe in it; notes what it was sent."""

    def __init__(self, resumed: dict[str, Any] | None, refuses: bool):
        super().__init__(("127.0.0.1", 0), Handler)
        self.resumed, self.refuses = resumed, refuses
        self.upserts: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.requests = 0
        self.drips = False
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.server.requests += 1
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.drips |= self.path == "/drip"
        if self.server.drips:  # a byte every 0.3 s: no byte is late, the answer is
            with contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 9000\r\n\r\n" + b" " * 9000:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.3)
            return
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        answer: Any = {}
        if self.path == "/graphql":
            question = json.loads(body)
            name = re.search(r"(?:query|mutation) (\w+)", question["query"])
            answer = {"data": self.graphql(name[1] if name else "", question.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            files = json.loads(body).get("files") or {}
            self.server.rows += [json.loads(row) for row in files.get("wandb-history.jsonl", {}).get("content", [])]
        text = json.dumps(answer).encode()
        self.send_response(401 if self.server.refuses and self.path == "/graphql" else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_GET = do_POST

    def graphql(self, name: str, variables: dict[str, Any]) -> Any:
        project = {"id": "p", "name": "bandpo", "entity": {"id": "e", "name": "me"}}
        match name:
            case "Viewer":
                return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
            case "RunResumeStatus":
                return {"model": {**project, "bucket": self.server.resumed}}
            case "UpsertBucket":
                self.server.upserts.append(variables)
                bucket = {"id": "B", "name": variables["name"], "displayName": "x", "project": project}
                return {"upsertBucket": {"bucket": bucket, "inserted": self.server.resumed is None}}
            case "CreateRunFiles":
                return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": []}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                sequence = {"id": "s", "latestArtifact": {"id": "A", "versionIndex": 0}}
                artifact = {"id": "A", "state": "COMMITTED", "artifactSequence": sequence}
                return {"createArtifact": {"artifact": artifact}}
        return {}


@pytest.mark.slow
def test_an_online_run_is_continued_by_its_resumption_and_no_step_is_sent_twice(tmp_path):
    server = Server(resumed=None, refuses=False)
    done = run(tmp_path, "auto", run_id="abcd1234", last=3, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert f"wandb: {server.url}/me/bandpo/runs/abcd1234" in done.stdout
    assert [row["step"] for row in server.rows] == [row["_step"] for row in server.rows] == [0, 1, 2]
    assert server.rows[0]["at_a_glance/reward_mean"] == 0.25
    assert not offline_files(tmp_path)

    # Killed after step 2, resumed from a checkpoint of step 0: steps 1 and 2 are trained again, not sent again.
    status = {
        "id": "B",
        "name": "abcd1234",
        "historyLineCount": 3,
        "eventsLineCount": 0,
        "logLineCount": 0,
        "historyTail": json.dumps([json.dumps({"_step": 2})]),
        "eventsTail": "[]",
        "summaryMetrics": '{"_step": 2}',
        "config": "{}",
        "wandbConfig": '{"t": {}}',
        "tags": [],
    }
    server = Server(resumed=status, refuses=False)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    again = run(tmp_path, "auto", "abcd1234", 1, 5, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert [row["step"] for row in server.rows] == [3, 4]
    assert server.upserts[0]["id"] == "B" and server.upserts[0]["name"] == "abcd1234"
    assert "monotonically" not in again.stderr


@pytest.mark.slow
def test_a_server_that_refuses_the_key_is_offline(tmp_path):
    server = Server(resumed=None, refuses=True)
    done = run(tmp_path, "auto", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert "wandb: offline, " in done.stdout and "401" in done.stdout and "wandb sync" in done.stdout
    assert "does not answer" not in done.stdout
    assert len(history(offline_files(tmp_path)[0])) == 3


@pytest.mark.slow
@pytest.mark.promise("a slow wandb server")
def test_a_server_whose_answers_drip_holds_up_neither_start_nor_end(tmp_path):
    server = Server(resumed=None, refuses=False)
    server.drips = True
    done = run(tmp_path / "start", "auto", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    (waited_s, took_s) = re.findall("(?:started|finished) after (.*)", done.stdout)
    assert float(waited_s) < logging.START_TIMEOUT_S + 2
    assert float(took_s) < logging.FINISH_TIMEOUT_S + 3 * logging.SERVICE_TIMEOUT_S

    server = Server(resumed=None, refuses=False)
    done = run(tmp_path / "end", "auto", event="drip", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert f"wandb: {server.url}" in done.stdout and "wandb: not all was uploaded within 1 s" in done.stdout
    (took_s,) = re.findall("finished after (.*)", done.stdout)
    assert float(took_s) < 6  # twice more SERVICE_TIMEOUT_S, 1 s here


@pytest.mark.slow
def test_no_key_or_a_broken_one_is_offline_without_a_question(tmp_path):
    server = Server(resumed=None, refuses=False)
    done = run(tmp_path, "auto", WANDB_BASE_URL=server.url)
    assert "wandb: offline, no API key for 127.0.0.1 (wandb login)" in done.stdout
    assert server.requests == 1  # ours, whether somebody is there; an offline run leaves the network alone
    done = run(tmp_path / "other", "auto", WANDB_BASE_URL=server.url, WANDB_API_KEY="short")
    assert "wandb: offline, WANDB_API_KEY invalid" in done.stdout


@pytest.mark.slow
def test_a_run_outlives_the_process_of_wandb(tmp_path):
    done = run(tmp_path, "offline", last=6, event="kill")
    assert "wandb: stopped by the error below; training goes on, metrics.jsonl has everything" in done.stdout


@pytest.mark.slow
def test_a_run_that_ends_by_an_exception_is_marked_failed(tmp_path):
    run(tmp_path, "offline", event="crash")
    every = list(wandb_records(offline_files(tmp_path)[0]))
    assert [record.exit.exit_code for record in every if record.WhichOneof("record_type") == "exit"] == [1]
