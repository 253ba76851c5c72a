"""One grading process: reads items from a socket, answers each, and dies with its parent.

    python -m rewards.pool.worker '{"parent": 123, "memory_bytes": 2147483648, "timeout_s": 3.0, "grader": "math"}'

File descriptor 0 is the socket. One JSON object a line, ASCII, so that any string travels, lone surrogates included.
    first line out      {"ready": true, "asked": {...}} or {"ready": false, "why": "..."}; asked: own.Asked
    in                  {"call": "compare" | "check" | "own", "args": [...]}
    out                 {"value": ..., "reason": "..."}, of a user's function also "parts" or "error"

Started by process.py alone. The kernel ends this process with SIGPROF when an item has used up its processor time,
also inside C code; the parent looks at the clock, for an item that only waits. The module is started by name with
a plain interpreter and imports neither torch nor the trainer, so a respawn costs half a second (multiprocessing's spawn
would run the main script again in every worker, torch and vllm included).
"""

import contextlib
import ctypes
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from .own import load, told

logger = logging.getLogger("rewards.pool.worker")

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    settings = json.loads(sys.argv[1])
    _die_with(settings["parent"])
    path, own, _ = settings["grader"].rpartition(":")
    if own:
        _take_along()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"], settings["memory_bytes"]))
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a grader prints goes to stderr
    lines = channel.makefile("rwb")
    try:
        reward = load(settings["grader"]) if own else None
        calls = {"own": reward.grade} if reward else _math_calls()
    except Exception as error:  # a user's file may raise anything
        logger.debug("not loaded", exc_info=True)
        _send(lines, {"ready": False, "why": told(error, path)})
        return
    _send(lines, {"ready": True, "asked": reward.asked._asdict() if reward else {}})
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for line in lines:
        item = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, settings["timeout_s"])
        try:
            answer = calls[item["call"]](*item["args"])
        except MemoryError:
            return _send(lines, {"value": None, "reason": "crash"})  # what is left of the heap is not worth keeping
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(lines, answer)


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent's thread that started us ends; leave at once when it already has."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the closed socket ends an idle worker
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def _take_along() -> None:
    """Leave a process behind that kills our group once we have ended, however we did: what a user's reward has started
    must not outlive a trainer that was killed. It is nobody's child, since that code may wait for its own.
    """
    if not hasattr(os, "pidfd_open"):  # not Linux: the group ends with a worker that its owner ends
        return
    ours = os.pidfd_open(os.getpid())
    if os.fork() == 0:
        if os.fork() == 0:
            os.closerange(0, ours)  # the socket, above all
            select.select([ours], [], [])  # readable when we have ended
            os.killpg(0, signal.SIGKILL)
        os._exit(0)
    os.wait()
    os.close(ours)


def _send(lines: Any, message: dict[str, Any]) -> None:
    lines.write(json.dumps(message).encode("ascii") + b"\n")
    lines.flush()


def _math_calls() -> dict[str, Callable[..., dict[str, Any]]]:
    from ..math import compare, golds, symbolic

    logging.disable(logging.CRITICAL)  # math-verify and sympy would log the model's whole text when they cannot read it
    symbolic.equal_expressions("\\sqrt{2}+x^{2}", "x^{2}+\\sqrt{2}")  # builds the grammar now, not on an item's time
    leaf = compare.Leaf(symbolic.equal_expressions)

    def judge(answers: list[str], gold: str) -> dict[str, Any]:
        verdict, reason = compare.compare(answers, gold, leaf)
        return {"value": bool(verdict), "reason": reason}

    def check(gold: str) -> dict[str, Any]:
        return {"value": golds.trouble_with(gold, leaf), "reason": "match"}

    return {"compare": judge, "check": check}


if __name__ == "__main__":
    main()
