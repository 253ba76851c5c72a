"""A grading process as its owner sees it: start it, send items, learn how it ended. The other end: worker.py.

Why not multiprocessing, or a pool built on it: a process that it starts afresh imports the main script first, here
train.py and with it torch; its limits go by the clock, which a loaded machine stretches; and one that was killed looks
like one that broke.
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

START_S = 60.0  # a fresh worker has this long to import and report; half a second is usual
TICK_S = 0.1  # between two looks whether the process still runs
FROM_OUTSIDE = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
"""Sent by people, schedulers and the kernel's memory killer; an exit or another signal is the item's own doing."""


class WorkerEnded(Exception):
    """No reply. reason: start (no process comes up), killed (from outside), crash (by itself), timeout (the item used
    up its processor time) or stalled (nothing within wait_s: it sleeps, waits for something, or was stopped).
    """

    def __init__(self, reason: str, why: str):
        super().__init__(why)
        self.reason = reason


class Worker:
    """One process running rewards.pool.worker. wait_s: limit on the clock for a reply.

    hello: its first message. Raises WorkerEnded with the reason start, or killed when it is killed before it is ready.
    """

    def __init__(self, grader: str, timeout_s: float, memory_gib: float, wait_s: float):
        self._channel, theirs = Pipe()
        settings = json.dumps([os.getpid(), int(memory_gib * 2**30), timeout_s, grader])
        home = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH", "")) if part)
        self._wait_s, self.items = wait_s, 0
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rewards.pool.worker", settings],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the trainer, which then closes us
            )
        except OSError as error:
            raise WorkerEnded("start", f"no process could be started: {error}") from error
        finally:
            theirs.close()
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
        """The replies to some items (worker.py). Raises WorkerEnded."""
        self.items += len(items)
        with contextlib.suppress(OSError):  # it has ended; `_receive` says how
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
            if ended:  # a process that it started may still hold its end of the channel
                status = self._process.wait()
                killed = "killed" if -status in FROM_OUTSIDE else "crash"
                raise WorkerEnded("timeout" if status == -signal.SIGPROF else killed, f"exit status {status}")
            wait_s -= min(time.monotonic() - begun, TICK_S)  # a longer tick: all of us were stopped, and go on now
        raise WorkerEnded("stalled", "no reply in time")

    def kill(self) -> None:
        """SIGKILL to the process and to all that it started, and reap. Safe to call twice and from another thread."""
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
                os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
