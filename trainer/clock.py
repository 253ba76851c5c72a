"""Phase timing, memory use, and faster imports of large libraries.

with clock.phase("rollout", device): ...                    # adds to time/rollout_s
with gc_paused(): import transformers
"""

import gc
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}  # time/<name>_s -> seconds since the last `take`
        self.peak_gib = 0.0  # highest memory use at the end of any phase

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Time a phase as time/<name>_s, GPU work included."""
        start_s = time.perf_counter()
        yield
        torch.get_device_module(device).synchronize()
        key = f"time/{name}_s"
        self.times[key] = self.times.get(key, 0.0) + time.perf_counter() - start_s
        self.peak_gib = max(self.peak_gib, memory_in_use_gib(device))

    def take(self) -> dict[str, float]:
        """Return this rank's phase times since the last call, and reset them."""
        times, self.times = self.times, {}
        return times


def memory_in_use_gib(device: torch.device) -> float:
    """Return memory use in GiB. GPU: current, over all processes. CPU: peak resident set size of this process."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


@contextmanager
def gc_paused() -> Iterator[None]:
    """Collect garbage less often inside the block.

    Imports create no garbage, and collections would take 1/6 of their time.
    """
    usual = gc.get_threshold()
    gc.set_threshold(100_000)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
