"""How a run ends: by itself, by SIGTERM or Ctrl-C, by the death of a launcher, by an error on one of several ranks.

A signal is noted at once and heeded where work may be abandoned: `Run.may_stop`, which lets all ranks leave together.
"""

import atexit
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
SAME_CTRL_C_S = 3.0  # a second one within this time is the first, passed on
FIRST_WORDS_S = 10.0  # the other ranks wait this long for rank 0 to tell a mistake
LAST_WORDS_S = 20.0  # a rank that failed has this long to close what it opened


class Stopped(Exception):
    """A signal asked the run to stop; raised where work may be abandoned, never inside an update."""


class Signals:
    """Which signal asked this process to stop; 0: none has."""

    def __init__(self) -> None:
        self.number = 0
        self.parent = os.getppid()

    def check(self) -> None:
        """Raise Stopped when one has."""
        if self.number:
            raise Stopped

    @property
    def orphaned(self) -> bool:
        """Whether the SIGTERM came from the kernel, since the launcher died (die_with_launcher)."""
        return self.number == signal.SIGTERM and os.getppid() != self.parent

    @contextmanager
    def noted(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C inside the block are noted here; a later Ctrl-C stops at once.

        One Ctrl-C arrives up to three times: from the terminal, passed on by the launcher, and as a SIGTERM when the
        launcher has died of it.
        """
        noted_s = 0.0

        def note(number: int, frame: object) -> None:
            nonlocal noted_s
            if not self.number:
                self.number, noted_s = number, time.monotonic()
                name = signal.Signals(number).name
                line = f"\n{name}: saving a checkpoint and stopping; Ctrl-C again to stop at once\n"
                os.write(2, line.encode())  # print() may be what was interrupted
            elif number == signal.SIGINT and time.monotonic() > noted_s + SAME_CTRL_C_S:
                raise KeyboardInterrupt

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def die_with_launcher() -> None:
    """Ask the kernel (Linux) for a SIGTERM when the launcher dies; exit when it already has. No trainer is left alone.

    Started without a launcher, the parent is a shell, which may well end before the training does (nohup).
    """
    if sys.platform == "linux" and LAUNCHED & os.environ.keys():
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if not is_launcher(os.getppid()):  # it died while this process was still importing
            raise SystemExit("the launcher is gone: nothing is started without it")


def is_launcher(pid: int) -> bool:
    """Whether a process has torch loaded, as launchers have, or was itself started by one (a script between).

    Whoever adopts an orphan (init, a service manager, a container's first process) is neither.
    """
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text() or bool(
            LAUNCHED & psutil.Process(pid).environ().keys()
        )
    except (OSError, psutil.Error):  # gone, or somebody else's
        return False


@contextmanager
def ending_all_ranks(processes: int) -> Iterator[None]:
    """An error on one of several ranks ends this process soon, whatever its last words wait for.

    The launcher ends the others when one process ends, and they may be waiting for this one in a collective.
    """
    try:
        yield
    finally:
        error = sys.exception()
        if error and processes > 1:

            def leave() -> None:
                traceback.print_exception(error)
                os._exit(1)

            timer = threading.Timer(LAST_WORDS_S, leave)
            timer.daemon = True
            timer.start()


@contextmanager
def one_clear_line(*kinds: type[Exception], code: int) -> Iterator[None]:
    """These errors inside the block end the process with one line and no traceback.

    `code` is 2 for a user's mistake, 1 for an accident of training.

    Launchers end all processes when one ends, so rank 0 goes first: a mistake that all ranks meet is told once.
    """
    rank = os.environ.get("RANK", "0") != "0"
    try:
        yield
    except SystemExit:  # already told by rank 0
        time.sleep(FIRST_WORDS_S * rank)
        raise
    except kinds as error:
        time.sleep(FIRST_WORDS_S * rank)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """End the process at once, with the code that `main` returns or exits with; None is 0.

    All that an end owes is done: threads are waited for, atexit functions run, what was printed is written. Python
    would then take apart every module of torch and vLLM, which takes one to three seconds and is of no use to anybody.
    """
    try:
        code = main()
    except SystemExit as ended:
        if isinstance(ended.code, str):  # Python prints it
            raise
        code = ended.code
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]  (with the next line, how Python begins its end)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
