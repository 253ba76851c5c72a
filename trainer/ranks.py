"""The processes of a run, one a GPU: which of them this one is, and collectives over all of them.

    ranks.add({"reward/mean": (sum, count)})    # sums and counts of all ranks, one collective
    ranks.largest({"ratio/max": 3.2})           # of each entry
    ranks.gather(rows)                          # picklable objects of all ranks, in their order
    ranks.on_first(read)                        # what one rank reads, or what is wrong with it, for all

All of it is collective: every rank calls it, with the same keys.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

Number = int | float | torch.Tensor
Pair = tuple[Number, Number]  # sum, count
MISTAKES = (ValueError, OSError)  # of a user, in keys or files
T = TypeVar("T")


class Ranks:
    """What Accelerate started."""

    def __init__(self, accelerator: "Accelerator"):
        self.accelerator = accelerator
        self.device = accelerator.device
        self.rank = accelerator.process_index
        self.processes = accelerator.num_processes
        self.is_main = accelerator.is_main_process

    def add(self, pairs: Mapping[str, Pair]) -> dict[str, tuple[float, float]]:
        """(sum, count) of each entry, added over all ranks in float64; one collective, one read from the device."""
        numbers = [number for pair in pairs.values() for number in pair]
        stacked = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=self.device) for n in numbers])
        added: Any = self.accelerator.reduce(stacked, "sum")
        return dict(zip(pairs, map(tuple, added.view(-1, 2).tolist()), strict=True))

    def largest(self, values: Mapping[str, Number]) -> dict[str, float]:
        """Maximum of each entry over all ranks."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values.values()])
        rows: Any = self.accelerator.gather(stacked)
        return dict(zip(values, rows.view(-1, len(values)).amax(0).tolist(), strict=True))

    def gather(self, rows: list[Any]) -> list[Any]:
        """The rows of all ranks, in the order of ranks, on every rank."""
        if self.processes == 1:
            return rows
        parts: list[Any] = [[] for _ in range(self.processes)]
        torch.distributed.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def on_each(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank; a user's mistake (MISTAKES) that any rank meets is a ValueError on all."""
        found, told = None, ""
        try:
            found = work()
        except MISTAKES as error:
            told = str(error) or repr(error)
        told = next(filter(None, self.gather([told])), "")
        if told:
            raise ValueError(told)
        return cast(T, found)

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank; a mistake that it meets there is a ValueError on all."""
        from accelerate.utils import broadcast_object_list

        found: list[Any] = [None, ""]
        if self.is_main:
            try:
                found = [work(), ""]
            except MISTAKES as error:
                found = [None, str(error) or repr(error)]
        broadcast_object_list(found)
        if found[1]:
            raise ValueError(found[1])
        return found[0]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()
