"""How a process ends."""

import subprocess
import sys

import pytest
from launching import ROOT

SCRIPT = """
import atexit, sys, threading, time
from trainer.stopping import hard_exit

class Late:
    def __del__(self):
        print("taken apart", flush=True)

kept = Late()
atexit.register(print, "atexit")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()

def main():
    print("main")
    {end}

hard_exit(main)
"""


@pytest.mark.parametrize(
    "end, code", [("return 3", 3), ("return None", 0), ("raise SystemExit(2)", 2), ("raise SystemExit", 0)]
)
def test_a_process_ends_at_once_with_all_that_an_end_owes(end: str, code: int):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "main\nthread\natexit\n", "")


def test_ctrl_c_that_also_ends_the_reader_of_stderr_is_recorded():
    """`train.py 2>&1 | tee log`: the handler's line goes into a closed pipe."""
    body = """
import os, signal
from trainer.stopping import Signals
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(reader), os.close(writer)
signals = Signals()
with signals.handled():
    os.kill(os.getpid(), signal.SIGINT)
print(signals.number)
"""
    done = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n")


@pytest.mark.parametrize("end, told", [("1 / 0", "ZeroDivisionError"), ("sys.exit('a reason')", "a reason")])
def test_an_end_that_python_has_to_tell_of_is_its_own(end: str, told: str):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and told in done.stderr and done.stdout == "main\nthread\natexit\ntaken apart\n"
