"""Collectives over the processes of a run, one per GPU.

    ranks.all_reduce_sum({"reward/mean": (sum, count)})    # sums and counts over all ranks, one collective
    ranks.all_reduce_max({"ratio/max": 3.2})               # maximum of each entry
    ranks.gather(rows)                                     # picklable objects of all ranks, in rank order
    ranks.run_on_rank0(read)                               # the result of rank 0, or its error, on every rank

Every method is collective: all ranks must call it, with the same keys.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

Number = int | float | torch.Tensor
Pair = tuple[Number, Number]  # sum, count
USER_ERRORS = (ValueError, OSError)  # invalid keys, data or files
T = TypeVar("T")


class Ranks:
    """Collectives over the processes that Accelerate started."""

    def __init__(self, accelerator: "Accelerator"):
        self.accelerator = accelerator
        self.device = accelerator.device
        self.rank = accelerator.process_index
        self.processes = accelerator.num_processes
        self.is_main = accelerator.is_main_process

    def all_reduce_sum(self, pairs: Mapping[str, Pair]) -> dict[str, tuple[float, float]]:
        """Return (sum, count) of each entry over all ranks, float64, with one collective and one device read."""
        numbers = [number for pair in pairs.values() for number in pair]
        stacked = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=self.device) for n in numbers])
        summed: Any = self.accelerator.reduce(stacked, "sum")
        return dict(zip(pairs, map(tuple, summed.view(-1, 2).tolist()), strict=True))

    def all_reduce_max(self, values: Mapping[str, Number]) -> dict[str, float]:
        """Return the maximum of each entry over all ranks."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values.values()])
        rows: Any = self.accelerator.gather(stacked)
        return dict(zip(values, rows.view(-1, len(values)).amax(0).tolist(), strict=True))

    def gather(self, rows: list[Any]) -> list[Any]:
        """Return the rows of all ranks, in rank order, on every rank."""
        if self.processes == 1:
            return rows
        parts: list[Any] = [[] for _ in range(self.processes)]
        torch.distributed.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def run_on_all_ranks(
        self,
        work: Callable[[], T],
        *,
        catch: tuple[type[Exception], ...] = USER_ERRORS,
        error: type[Exception] = ValueError,
        rank0_only: bool = False,
    ) -> T:
        """Run `work` on every rank, or with `rank0_only` on rank 0 while the others wait and return None.

        If a rank raises an error of `catch`, every rank raises `error` with the message of the first such rank.
        """
        result, message = None, ""
        try:
            result = work() if self.is_main or not rank0_only else None
        except catch as caught:
            message = str(caught) or repr(caught)
        message = next(filter(None, self.gather([message])), "")
        if message:
            raise error(message)
        return cast(T, result)

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank; USER_ERRORS become a ValueError on every rank."""
        from accelerate.utils import broadcast_object_list

        results: list[Any] = [self.run_on_all_ranks(work, rank0_only=True)]
        broadcast_object_list(results)
        return results[0]
