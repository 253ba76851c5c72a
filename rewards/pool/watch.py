"""A warning in the log when a verdict that should be rare becomes frequent: a bug, or an exploit."""

import logging
from collections import Counter
from collections.abc import Sequence

from ..math.grade import Grade

logger = logging.getLogger(__name__)

WARN_SHARE, WARN_ITEMS = 0.02, 200  # warn when such a share of at least so many grades ...
WATCHED = ("timeout", "crash", "guard", "no_answer")  # ... is one of these and more than doubled


class Watch:
    """One warning per window of grades and reason whose share has more than doubled since the window before."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._shares: dict[str, float] = {}

    def see(self, grades: Sequence[Grade]) -> None:
        self._counts.update(grade.reason for grade in grades)
        total = self._counts.total()
        if total < WARN_ITEMS:
            return
        shares = {reason: self._counts[reason] / total for reason in WATCHED}
        for reason, share in shares.items():
            before = self._shares.get(reason, 1.0 if reason == "no_answer" else 0.0)
            if share > max(WARN_SHARE, 2 * before):
                logger.warning("verifier: %s was the verdict on %.1f %% of %d answers", reason, 100 * share, total)
        self._shares = shares
        self._counts.clear()
