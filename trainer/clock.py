"""Where the time goes: the parts of the start, the phases of a step; and the memory in use at their ends."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


class Clock:
    """Seconds since the process began: part by part until the first step, phase by phase after."""

    def __init__(self) -> None:
        self.last_s = psutil.Process().create_time()
        self.parts: dict[str, float] = {}  # of the start-up
        self.times: dict[str, float] = {}  # of the phases since the last `take`
        self.peak_gib = 0.0  # of memory in use at the end of a phase

    def done(self, part: str) -> None:
        """Counts the time since the previous part of the start-up to this one."""
        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last_s
        self.last_s = now

    def start_up(self) -> str:
        """The parts of the start-up in words."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"start-up: {sum(self.parts.values()):.1f} s ({parts})"

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Times a phase as time/<name>_s, GPU work included."""
        start_s = time.perf_counter()
        yield
        torch.get_device_module(device).synchronize()
        key = f"time/{name}_s"
        self.times[key] = self.times.get(key, 0.0) + time.perf_counter() - start_s
        self.peak_gib = max(self.peak_gib, memory_in_use_gib(device))

    def take(self) -> dict[str, float]:
        """Phase times since the last call (this rank's)."""
        times, self.times = self.times, {}
        return times


def memory_in_use_gib(device: torch.device) -> float:
    """What a GPU holds now, of whatever program: the trainer's tensors, the engine's, the libraries' own. On a CPU the
    largest resident size of this process so far."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30
