"""The order of training: pure functions of (seed, position), so that a resumed run sees what the unbroken one would."""

from collections.abc import Collection
from hashlib import sha256


def epoch_order(n: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n) for this epoch. Sorted by a hash, so no library version can change it."""
    return sorted(range(n), key=lambda index: sha256(f"{seed}/{epoch}/{index}".encode()).digest())


def epoch_length(n: int, per_step: int) -> int:
    """Problems of an epoch: whole steps of `per_step`, as in the paper's runs (26,2xx problems, 256 a step: 102 steps).

    What is left over is dropped, another part each epoch because the order changes.
    Raises ValueError when n < per_step, which would make an epoch of no steps.
    """
    if not 0 < per_step <= n:
        raise ValueError(f"prompts_per_step {per_step} must be 1..{n}, the number of training problems; lower it")
    return n // per_step * per_step


def next_problems(
    position: int, count: int, *, n: int, per_step: int, seed: int, taken: Collection[int]
) -> tuple[list[int], int]:
    """(`count` problems from `position` of the endless row of epochs on, the position after them).

    Those in `taken`, which are in the batch already, are passed over, as long as there are others; no problem comes
    twice. Without them the problems of step k are those from position k * per_step on.
    """
    epoch = epoch_length(n, per_step)
    assert count <= n, f"{count} different problems of {n}"
    order: list[int] = []
    found: dict[int, None] = {}
    passed_over = set(taken) if len(set(taken)) + count <= n else set()
    while len(found) < count:
        number, place = divmod(position, epoch)
        if not order or place == 0:
            order = epoch_order(n, seed=seed, epoch=number)
        if order[place] not in passed_over:
            found.setdefault(order[place])
        position += 1
    return list(found), position
