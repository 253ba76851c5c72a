"""End of a run: normal exit, SIGTERM or Ctrl-C, death of the launcher, error on one of several ranks.

A signal is recorded when it arrives. `Run.interruptible` acts on it, on all ranks together.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import psutil

LAUNCHED = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}  # set by torchrun; by accelerate launch
SAME_CTRL_C_S = 3.0  # a SIGINT within this time of the first one is the same Ctrl-C, forwarded by the launcher
RANK0_FIRST_S = 10.0  # other ranks wait this long, so that rank 0 prints an error that all ranks raise
ABORT_AFTER_S = 20.0  # time for a failed rank to close its resources


class Interrupted(Exception):
    """Raised after a signal to stop, where work may be abandoned; never inside an update."""


class Signals:
    """Stop signal of this process. `number` is 0 until one arrives."""

    def __init__(self) -> None:
        self.number = 0
        self.parent = os.getppid()

    def raise_if_interrupted(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self.number:
            raise Interrupted

    @property
    def orphaned(self) -> bool:
        """True if the kernel sent the SIGTERM because the launcher died (set_parent_death_signal)."""
        return self.number == signal.SIGTERM and os.getppid() != self.parent

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Record SIGTERM and SIGINT inside the block; a second Ctrl-C raises KeyboardInterrupt.

        One Ctrl-C arrives up to three times: from the terminal, forwarded by the launcher, and as a SIGTERM if it
        ended the launcher.
        """
        first_s = 0.0

        def record(number: int, frame: object) -> None:
            nonlocal first_s
            if not self.number:
                self.number, first_s = number, time.monotonic()
                line = (
                    f"\n{signal.Signals(number).name}: saving a checkpoint and stopping; Ctrl-C again to stop at once\n"
                )
                with contextlib.suppress(OSError):  # Ctrl-C also ends the `tee` that reads this
                    os.write(2, line.encode())  # not print(), which the signal may have interrupted
            elif number == signal.SIGINT and time.monotonic() > first_s + SAME_CTRL_C_S:
                raise KeyboardInterrupt

        before = {number: signal.signal(number, record) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def set_parent_death_signal() -> None:
    """Request a SIGTERM for the death of the launcher (Linux). Exit if the launcher is already dead.

    Does nothing without a launcher: the parent is then a shell, which may end before training does (nohup).
    """
    if sys.platform == "linux" and LAUNCHED & os.environ.keys():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
        if not is_launcher(os.getppid()):  # it died while this process was still importing
            raise SystemExit("the launcher has died: training does not start without it")


def is_launcher(pid: int) -> bool:
    """Return True if a process has loaded torch, as launchers do, or was started by a launcher (a script in between).

    Both are false for the process that adopts an orphan (init, a service manager, a container's first process).
    """
    try:
        maps, environment = Path(f"/proc/{pid}/maps").read_text(), psutil.Process(pid).environ()
    except (OSError, psutil.Error):  # it has ended, or belongs to another user
        return False
    return "libtorch" in maps or bool(LAUNCHED & environment.keys())


@contextmanager
def abort_all_ranks_on_error(processes: int) -> Iterator[None]:
    """End this process within ABORT_AFTER_S after an error, if there are several ranks.

    The launcher then ends the other ranks, which may be waiting for this one in a collective.
    """
    try:
        yield
    finally:
        error = sys.exception()
        if error and processes > 1:

            def abort() -> None:
                traceback.print_exception(error)
                os._exit(1)

            timer = threading.Timer(ABORT_AFTER_S, abort)
            timer.daemon = True
            timer.start()


@contextmanager
def exit_on_error(*kinds: type[Exception], code: int) -> Iterator[None]:
    """End the process with a one-line error instead of a traceback for these errors.

    code: 2 for invalid config or data, 1 for a failure during training. The launcher ends all ranks when one ends. The
    others therefore wait for rank 0, so that an error that all ranks raise is printed once.
    """
    try:
        yield
    except (SystemExit, *kinds) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(RANK0_FIRST_S)
        if isinstance(error, SystemExit):  # printed already
            raise
        if isinstance(error, BrokenPipeError):  # `train.py --dry_run | head`: the exit code of a closed pipe
            os._exit(128 + signal.SIGPIPE)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None


def hard_exit(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and end the process with the exit code that it returns or raises; None is 0.

    Joins threads, runs atexit functions and flushes output. Skips unloading the modules of torch and vLLM, which takes
    1 to 3 s.
    """
    try:
        code = main()
    except SystemExit as ended:
        if isinstance(ended.code, str):  # Python prints it
            raise
        code = ended.code
    # Private: the first two steps of Python's own shutdown (Py_FinalizeEx). There is no public call for them.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
