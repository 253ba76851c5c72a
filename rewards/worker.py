"""One grading process: reads items from a socket, answers each, and dies with its parent.

    python -m rewards.worker '{"parent": 123, "memory_bytes": 2147483648, "timeout_s": 3.0, "grader": "math"}'


File descriptor 0 is the socket. One JSON object a line, ASCII, so that any string travels, lone surrogates included.
    first line out      {"ready": true} or {"ready": false, "why": "..."}
    in                  {"call": "compare" | "check" | "own", "args": [...]}
    out                 {"value": ..., "reason": "..."}

Started by process.py alone. The kernel ends this process with SIGPROF when an item has used up its processor time,
also inside C code; the parent looks at the clock, for an item that only waits. The module is started by name with
a plain interpreter and imports neither torch nor the trainer, so a respawn costs half a second (multiprocessing's spawn
would run the main script again in every worker, torch and vllm included).
"""

import contextlib
import ctypes
import importlib.util
import json
import logging
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger("rewards.worker")

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    settings = json.loads(sys.argv[1])
    _die_with(settings["parent"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"], settings["memory_bytes"]))
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a grader prints goes to stderr
    lines = channel.makefile("rwb")
    try:
        calls = _own_calls(settings["grader"]) if ":" in settings["grader"] else _math_calls()
    except Exception as error:
        logger.exception("the grader cannot be loaded")
        _send(lines, {"ready": False, "why": f"{type(error).__name__}: {error}"})
        return
    _send(lines, {"ready": True})
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for line in lines:
        item = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, settings["timeout_s"])
        try:
            answer = calls[item["call"]](*item["args"])
        except MemoryError:
            return _send(lines, {"value": None, "reason": "crash"})  # what is left of the heap is not worth keeping
        except Exception:
            logger.exception("the grader raised")
            answer = {"value": None, "reason": "crash"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(lines, answer)


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent's thread that started us ends; leave at once when it already has."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the closed socket ends an idle worker
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def _send(lines: Any, message: dict[str, Any]) -> None:
    lines.write(json.dumps(message).encode("ascii") + b"\n")
    lines.flush()


def _math_calls() -> dict[str, Callable[..., dict[str, Any]]]:
    from . import compare, golds, symbolic

    logging.disable(logging.CRITICAL)  # math-verify and sympy would log the model's whole text when they cannot read it
    symbolic.equal_expressions("\\sqrt{2}+x^{2}", "x^{2}+\\sqrt{2}")  # builds the grammar now, not on an item's time
    leaf = compare.Leaf(symbolic.equal_expressions)

    def judge(answers: list[str], gold: str) -> dict[str, Any]:
        verdict, reason = compare.compare(answers, gold, leaf)
        return {"value": bool(verdict), "reason": reason}

    def check(gold: str) -> dict[str, Any]:
        return {"value": golds.trouble_with(gold, leaf), "reason": "match"}

    return {"compare": judge, "check": check}


def _own_calls(grader: str) -> dict[str, Callable[..., dict[str, Any]]]:
    path, _, name = grader.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).resolve().parent))  # so that the file may import its neighbours
    spec.loader.exec_module(module)
    function = getattr(module, name)

    def own(completion: str, gold: str) -> dict[str, Any]:
        score = function(completion, gold)
        if not isinstance(score, (bool, int, float)) or not math.isfinite(score):
            said = f"{type(score).__name__} {str(score)[:80]!r}"
            raise TypeError(f"{grader} returned {said}; a bool or a finite float is needed")
        return {"value": float(score), "reason": "match" if score > 0 else "mismatch"}

    return {"own": own}


if __name__ == "__main__":
    main()
