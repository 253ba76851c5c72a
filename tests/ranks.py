"""Runs a program on ranks that share one import of torch and vLLM: `python tests/ranks.py 2 train.py --config ...`

For tests in which the launcher is not the point: torchrun and each of its ranks would import for themselves, which is
most of the time of a short run. The ranks are processes with the launcher's variables, as torchrun's are.
"""

import os
import runpy
import signal
import socket
import sys
from importlib import import_module


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


def main(processes: int, argv: list[str]) -> int:
    """The exit code: 0, or 1 when a rank failed, which ends the others."""
    # None of these starts a thread, which a fork would lose.
    for module in ("train", "accelerate", "transformers.models.auto.modeling_auto"):
        import_module(module)
    if "train.py" in argv and "hf" not in argv:
        import_module("vllm.entrypoints.llm")
    port, running = str(free_port()), set[int]()
    for rank in range(processes):
        pid = os.fork()
        if pid:
            running.add(pid)
            continue
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    failed = False
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
