"""Handle of one grading process: start it, send items, and determine how it ended. worker.py runs in the process.

multiprocessing and its pools are not used, for three reasons. A spawned process imports the main script first, here
train.py and torch. Time limits are wall-clock time, which depends on the load. A killed process cannot be distinguished
from a crashed one.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

START_S = 60.0  # time limit for a new worker to import and send its first message; 0.5 s is usual
TICK_S = 0.1  # interval between checks that the process is running
FROM_OUTSIDE = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
"""Signals sent by users, schedulers and the kernel's OOM killer. The item causes an exit or any other signal."""


class WorkerEnded(Exception):
    """Raised if a worker ends without a reply.

    reason: start (it does not start), killed (by a signal from outside), crash (by itself), timeout (the item exceeded
    its CPU time) or stalled (no reply within wait_s: it sleeps, waits or was stopped).
    """

    def __init__(self, reason: str, why: str):
        super().__init__(why)
        self.reason = reason


class Worker:
    """One process running rewards.pool.worker. wait_s: wall-clock limit for a reply.

    hello: its first message. Raises WorkerEnded with the reason start, or killed if it is killed before it is ready.
    """

    def __init__(self, grader: str, timeout_s: float, memory_gib: float, wait_s: float):
        settings = json.dumps([os.getpid(), int(memory_gib * 2**30), timeout_s, grader])
        home = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH", "")) if part)
        self._wait_s, self.items = wait_s, 0
        try:
            self._channel, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "rewards.pool.worker", settings],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C reaches only the trainer, which then closes this worker
                )
        except OSError as error:
            raise WorkerEnded("start", f"no process could be started: {error}") from error
        self.pid, self._killed = self._process.pid, False
        try:
            self.hello: dict[str, Any] = self._receive(START_S)
        except WorkerEnded as end:
            self.kill()
            why = f"the process did not come up ({end}); its last words are on stderr"
            raise WorkerEnded("killed" if end.reason == "killed" else "start", why) from end
        if "why" in self.hello:
            self.kill()
            raise WorkerEnded("start", self.hello["why"])

    def ask(self, call: str, items: list[Any]) -> list[dict[str, Any]]:
        """Send items and return their replies (worker.py). Raises WorkerEnded if the process ends."""
        self.items += len(items)
        with contextlib.suppress(OSError):  # it has ended; `_receive` determines how
            self._channel.send((call, items))
        replies = self._receive(self._wait_s)
        if replies is None:
            raise WorkerEnded("crash", "out of memory")
        return replies

    def _receive(self, wait_s: float) -> Any:
        while wait_s > 0:
            begun, ended = time.monotonic(), self._process.poll() is not None
            try:
                if self._channel.poll(0 if ended else min(TICK_S, wait_s)):
                    return self._channel.recv()
            except (EOFError, OSError):
                ended = True
            if ended:  # a child process may still hold its end of the channel
                status = self._process.wait()
                killed = "killed" if -status in FROM_OUTSIDE else "crash"
                raise WorkerEnded("timeout" if status == -signal.SIGPROF else killed, f"exit status {status}")
            wait_s -= min(time.monotonic() - begun, TICK_S)  # a longer tick means that all processes were suspended
        raise WorkerEnded("stalled", "no reply in time")

    def kill(self) -> None:
        """Send SIGKILL to the process and its children, and reap it. Idempotent and thread-safe."""
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError, PermissionError):  # the group has ended
                os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
