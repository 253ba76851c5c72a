"""train.py with one fault put in: what a user would meet, provoked.

    [torchrun --nproc_per_node 2] tests/failing_script.py FAULT --config ... [--key value ...]

raise       rank 1 raises in the optimize phase
kill        rank 1 is killed there
sigterm_PHASE  SIGTERM on entering that phase of the second step
"""

import os
import signal
import sys
import time
from contextlib import contextmanager
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

import train
from trainer import run


def die(*phase: Any, update=train.update_policy) -> train.Stats:
    if int(os.environ["RANK"]) == 0 and fault == "kill":
        return update(*phase)
    if int(os.environ["RANK"]) == 0:
        time.sleep(3600)  # stands for a collective that waits for the dead rank, as NCCL's do
    print(f"FAULT AT {time.time()}", flush=True)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("the GPU fell off the bus")


@contextmanager
def signalling(self: run.Run, name: str, phase=run.Run.phase):
    if fault == f"sigterm_{name}" and self.step == 1 and not self.signals.number:
        signal.raise_signal(signal.SIGTERM)
    with phase(self, name):
        yield


fault = sys.argv[1]
if fault.startswith("sigterm_"):
    run.Run.phase = signalling  # type: ignore[method-assign]
elif fault in ("raise", "kill"):
    train.update_policy = die
else:
    raise SystemExit(f"no such fault: {fault}")

if __name__ == "__main__":
    sys.exit(record(train.main)(sys.argv[2:]))
