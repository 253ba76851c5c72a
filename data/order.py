"""Order of training problems: pure functions of (seed, position), so that a resumed run has the same order."""

from collections.abc import Collection
from hashlib import sha256


def epoch_order(n: int, *, seed: int, epoch: int) -> list[int]:
    """Return a permutation of range(n) for this epoch, sorted by a hash: it does not depend on library versions."""
    return sorted(range(n), key=lambda index: sha256(f"{seed}/{epoch}/{index}".encode()).digest())


def epoch_length(n: int, per_step: int) -> int:
    """Return the number of problems per epoch: a multiple of `per_step`.

    The paper's runs do the same (26,2xx problems, 256 per step: 102 steps). The remaining problems are dropped. They
    differ between epochs because the order does. Raises ValueError for n < per_step.
    """
    if not 0 < per_step <= n:
        raise ValueError(f"prompts_per_step {per_step} must be 1..{n}, the number of training problems; lower it")
    return n // per_step * per_step


def next_problems(
    position: int, count: int, *, n: int, per_step: int, seed: int, taken: Collection[int]
) -> tuple[list[int], int]:
    """Return the next `count` distinct problems from `position` in the sequence of epochs, and the position after them.

    taken: problems that are already in the batch. They are skipped if enough others exist. Without `taken`, step k has
    the problems from position k * per_step.
    """
    epoch = epoch_length(n, per_step)
    assert count <= n, f"{count} different problems of {n}"
    order: list[int] = []
    chosen: dict[int, None] = {}
    passed_over = set(taken) if len(set(taken)) + count <= n else set()
    while len(chosen) < count:
        number, place = divmod(position, epoch)
        if not order or place == 0:
            order = epoch_order(n, seed=seed, epoch=number)
        if order[place] not in passed_over:
            chosen.setdefault(order[place])
        position += 1
    return list(chosen), position
