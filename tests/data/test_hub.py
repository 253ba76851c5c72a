"""The hub path: a small HTTP server that answers as the hub does, and no server at all.

Each check runs in a process of its own, because the hub libraries read their environment on import.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlparse

import pyarrow
import pyarrow.parquet
import pytest

REVISION = "0123456789abcdef0123456789abcdef01234567"
README = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
"""


class Hub(ThreadingHTTPServer):
    """Serves the data-set repositories below `root`, all at one revision."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        parts = urlparse(self.path).path.strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            repo = self.server.root / parts[2] / parts[3]
            if not repo.is_dir():
                self._send(404, b"", "RepoNotFound")
            elif parts[4:5] == ["tree"]:
                folder = repo.joinpath(*parts[6:])
                every = folder.rglob("*") if "recursive=true" in self.path.lower() else folder.glob("*")
                entries = sorted(every) if folder.is_dir() else []
                found = [{"path": str(entry.relative_to(repo)), **_entry(entry)} for entry in entries]
                body = found if folder.is_dir() else {"error": "no such folder"}
                self._send(200 if folder.is_dir() else 404, json.dumps(body).encode(), "EntryNotFound")
            else:
                self._send(200, json.dumps({"id": "/".join(parts[2:4]), "sha": REVISION}).encode())
        else:
            file = self.server.root.joinpath(*parts[1:3], *parts[5:])
            content = file.read_bytes() if parts[0] == "datasets" and file.is_file() else None
            self._send(200 if content else 404, content or b"", "EntryNotFound")

    do_HEAD = do_GET

    def _send(self, status: int, body: bytes, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        if status == 404:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(file: Path) -> dict[str, object]:
    if file.is_dir():
        return {"type": "directory", "oid": "0", "size": 0}
    return {"type": "file", "oid": hashlib.sha1(file.read_bytes()).hexdigest(), "size": file.stat().st_size}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a hub that has openai/gsm8k, shortened."""
    repo = tmp_path / "hub" / "openai" / "gsm8k"
    for config, split, n in (("main", "train", 5), ("main", "test", 3), ("socratic", "train", 2)):
        rows = [{"question": f"{config} {split} {i}", "answer": f"so\n#### 1,00{i}"} for i in range(n)]
        (repo / config).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), repo / config / f"{split}-00000-of-00001.parquet")
    (repo / "README.md").write_text(README)
    (tmp_path / "hub" / "org" / "one").mkdir(parents=True)
    rows = [{"prompt": [{"role": "user", "content": f"{i} + 1?"}], "label": i + 1} for i in range(4)]
    (tmp_path / "hub" / "org" / "one" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = Hub(tmp_path / "hub")
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def load(home: Path, endpoint: str, *names: str, offline: bool = False) -> tuple[list[str], str]:
    """What a process prints about each set, with the first problem or the error, and its stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", LOAD, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1], done.stderr


LOAD = """
import sys, data
for name in sys.argv[1:]:
    try:
        read = data.load_problems(name)
        print(*read.lines, *read.problems[:1], sep="\\n", end="\\0")
    except ValueError as error:
        print(type(error).__name__, error, end="\\0")
"""


@pytest.mark.slow
def test_a_set_from_the_hub_then_from_the_cache(tmp_path: Path, hub: str) -> None:
    (online,), _ = load(tmp_path / "home", hub, "gsm8k_train")
    lines = online.splitlines()
    assert lines[0] == f"gsm8k_train: 5 rows -> 5 problems from openai/gsm8k@{REVISION[:8]}"
    assert lines[1].startswith("warning: gsm8k_train: 5 rows, not the 7,473 published")
    assert "problem='main train 0', gold='1000'" in lines[2]

    (cached,), _ = load(tmp_path / "home", hub, "gsm8k_train", offline=True)
    assert cached.splitlines()[0] == "gsm8k_train: 5 rows -> 5 problems from openai/gsm8k@cached"


@pytest.mark.slow
def test_any_set_of_the_hub_by_its_id(tmp_path: Path, hub: str) -> None:
    expected = {
        "openai/gsm8k:main:test": "gsm8k_main_test: 3 rows -> 3 problems",
        "openai/gsm8k:socratic:train": "gsm8k_socratic_train: 2 rows -> 2 problems",
        "org/one": "one: 4 rows -> 4 problems",  # one split
        "openai/gsm8k": "ValueError .*Config name is missing(.|\n)*'main', 'socratic'.*write ORG/NAME:CONFIG:SPLIT",
        "openai/gsm8k:main:dev": r"ValueError .*\(config main, split dev\)(.|\n)*'train', 'test'",
        "openai/gsm8k:other:test": "ValueError .*BuilderConfig 'other' not found",
        "org/none": "ValueError .*cannot read org/none (.|\n)*RepositoryNotFoundError",
    }
    found, _ = load(tmp_path / "home", hub, *expected)
    for text, pattern in zip(found, expected.values(), strict=True):
        assert re.match(pattern, text), text


@pytest.mark.slow
@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_it_says_what_to_fetch_and_does_not_retry(tmp_path: Path, offline: bool) -> None:
    # Port 9 refuses connections, as an unplugged machine does.
    names = {"amc23": "amc23=DIR", "math-ai/amc23:test": "DIR:test"}
    found, stderr = load(tmp_path, "http://127.0.0.1:9", *names, offline=offline)
    assert "Retrying" not in stderr
    for error, (name, local) in zip(found, names.items(), strict=True):
        assert error.startswith(f"HubUnreachable {name}: cannot read math-ai/amc23 (config default, split test)")
        assert "hf download math-ai/amc23 --repo-type dataset --local-dir DIR" in error
        assert f"write   {local}   in place of {name}." in error
