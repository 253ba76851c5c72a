"""A grading process as its owner sees it: start it, ask it, learn how it ended. The other end: worker.py.

Who ended a process is told by how it ended. A signal that people, schedulers and the kernel's memory killer send
(`FROM_OUTSIDE`) says nothing about the item in hand; an exit or a fault (a segmentation fault, an abort) is the item's.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_S = 60.0  # a fresh worker has this long to import and report; half a second is usual
END_S = 5.0  # a process whose socket is closed has this long to end
FROM_OUTSIDE = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))


class WorkerDied(Exception):
    """The worker ended by its own doing, or could not start."""


class WorkerKilled(Exception):
    """The worker was ended from outside."""


class Worker:
    """One process running rewards.worker, spoken to over a socket.

    Raises WorkerDied when it does not start, WorkerKilled when it is killed before it has.
    """

    def __init__(self, grader: str, memory_gib: float):
        ours, theirs = socket.socketpair()
        settings = {"parent": os.getpid(), "memory_bytes": int(memory_gib * 2**30), "grader": grader}
        home = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH", "")) if part)
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        self.items, self._socket, self._buffer = 0, ours, b""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rewards.worker", json.dumps(settings)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the trainer, which then closes us
            )
        except OSError as error:
            ours.close()
            raise WorkerDied(f"no process could be started: {error}") from error
        finally:
            theirs.close()
        self.pid = self._process.pid
        try:
            hello = self._receive(time.monotonic() + START_S)
        except (TimeoutError, WorkerDied) as error:
            self.kill()
            raise WorkerDied("the worker process did not come up; its last words are on stderr") from error
        except WorkerKilled:
            self.kill()
            raise
        if not hello["ready"]:
            self.kill()
            raise WorkerDied(hello["why"])

    def ask(self, call: str, args: list[Any], timeout_s: float) -> dict[str, Any]:
        """The reply to one item. Raises TimeoutError at the deadline; WorkerDied, WorkerKilled when it ends before."""
        message = json.dumps({"call": call, "args": args}).encode("ascii") + b"\n"
        deadline = time.monotonic() + timeout_s
        self.items += 1
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(message)
        except OSError as error:
            raise error if isinstance(error, TimeoutError) else self._death() from None
        reply = self._receive(deadline)
        if reply["reason"] == "crash":  # its last words
            raise WorkerDied
        return reply

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            try:
                self._socket.settimeout(left)
                chunk = self._socket.recv(65536)
            except OSError as error:
                raise error if isinstance(error, TimeoutError) else self._death() from None
            if not chunk:
                raise self._death()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _death(self) -> Exception:
        """What ended the process, whose socket is closed."""
        end = time.monotonic() + END_S
        while (status := self._process.poll()) is None and time.monotonic() < end:
            time.sleep(0.01)
        return WorkerKilled() if status is not None and -status in FROM_OUTSIDE else WorkerDied(f"status {status}")

    def kill(self) -> None:
        """SIGKILL and reap. Safe to call twice and from another thread."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._socket.close()
