"""User-defined reward, `FILE.py:FUNCTION`, loaded and called inside a worker.

Arguments are passed by name (`NAMES`). A function with the parameter `completions` is a batch reward: it takes lists
and returns a list. Both kinds may be `async def`. A result is a number, or a dict of numbers in which `score` is the
reward.
"""

import asyncio
import importlib.util
import inspect
import logging
import math
import numbers
import reprlib
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

MAX_THREADS = 256  # for asyncio.to_thread; its default, a few per core, is fewer than the concurrent calls

NAMES = {
    **{name: f"{name}s" for name in ("completion", "gold", "answer", "problem", "row", "prompt")},
    "response_tokens": "response_tokens",
    "truncated": "truncated",
    "completion_with_special_tokens": "completions_with_special_tokens",
}
"""Parameter of a reward -> parameter of a batch reward. `answer` is the gold, `row` the row of the dataset."""


class OwnReward(NamedTuple):
    """Loaded reward function. parameters: name in NAMES -> the function's parameter."""

    function: Callable[..., Any]
    path: str
    parameters: dict[str, inspect.Parameter]
    is_batch: bool
    runner: asyncio.Runner

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    def grade(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return one reply per item: value, reason and parts, or the error.

        Only batch and async rewards receive several items.
        """
        calls: list[dict[str, Any]] = items
        if self.is_batch:
            calls = [{self.parameters[name].name: [item[name] for item in items] for name in items[0]}]
        try:
            if self.is_async:
                returned = self.runner.run(_gather([self.function(**call) for call in calls]))
            else:
                returned = [self.function(**call) for call in calls]
            scores = [scores_of(each) for each in (returned[0] if self.is_batch else returned)]
            if len(scores) != len(items):
                raise TypeError(f"returned {len(scores)} scores for {len(items)} completions")
        except MemoryError:
            raise
        except (Exception, asyncio.CancelledError) as error:  # a user's function may raise anything
            logger.debug("the reward raised", exc_info=True)
            which = "the completion" if len(items) == 1 else f"one of {len(items)} completions, the first"
            begins = f"{which} begins {str(items[0].get('completion', ''))[:80]!r}"
            return [{"reason": "error", "error": f"{describe(error, self.path)}; {begins}"}] * len(items)
        values = [parts.pop("score") for parts in scores]
        return [
            {"value": value, "reason": "match" if value > 0 else "mismatch", "parts": parts}
            for value, parts in zip(values, scores, strict=True)
        ]


async def _gather(calls: list[Any]) -> list[Any]:
    return await asyncio.gather(*calls)


def load(grader: str) -> OwnReward:
    """Load the function of "path/to/file.py:function".

    Raises any exception of the file, ImportError for a file that is not Python, AttributeError for a missing name,
    TypeError for an object that is not a function or has parameters that are not in NAMES.
    """
    path, _, name = grader.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).resolve().parent))  # so that the file can import modules from its folder
    spec.loader.exec_module(module)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is not a function but {type(function).__name__}")
    parameters = inspect.signature(function).parameters.values()
    is_batch = any(part.name.startswith("completions") for part in parameters)
    known = {NAMES[key] if is_batch else key: key for key in NAMES}
    given = {known[part.name]: part for part in parameters if part.name in known}
    unknown = [
        part.name
        for part in parameters
        if part.kind in (part.POSITIONAL_ONLY, part.VAR_POSITIONAL)
        or (part.name not in known and part.default is part.empty and part.kind is not part.VAR_KEYWORD)
    ]
    if "answer" in given and ("gold" in given or "completion" not in given):  # may mean the response
        unknown.append("answer")
    if unknown or not given:
        raise TypeError(
            f"{name} has unknown or ambiguous parameters (got {', '.join(unknown) or 'none that is known'}); use "
            f"{', '.join(NAMES)}, or for lists {', '.join(NAMES.values())}; other parameters need a default"
        )
    runner = asyncio.Runner()
    runner.get_loop().set_default_executor(ThreadPoolExecutor(MAX_THREADS))
    return OwnReward(function, path, given, is_batch, runner)


def scores_of(returned: object) -> dict[str, float]:
    """Convert the result of a reward to numbers by name, including `score`. Raises TypeError for invalid results."""
    scores = returned if isinstance(returned, Mapping) else {"score": returned}
    if "score" not in scores or not all(isinstance(name, str) for name in scores):
        raise TypeError(f"returned {_short_repr(returned)}; a dict needs names, and 'score' among them")
    floats = {}
    for name, value in scores.items():
        floats[name] = _number(value)
        if not math.isfinite(floats[name]):
            what = f"{type(value).__name__} {_short_repr(value)}"
            raise TypeError(f"returned {what} as {name}; a finite number, or a dict of them with 'score', is needed")
    return floats


def _number(value: Any) -> float:
    """Convert a bool, int, float, Fraction, or scalar of numpy or torch to a float; NaN for other types."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    try:
        return float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        return math.inf


def _short_repr(value: object) -> str:
    """Return a shortened repr. Python raises ValueError for an integer of more than 4,300 digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "(too long to be shown)"


def describe(error: BaseException, path: str) -> str:
    """Format an error with its line in the user's file, if there is one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = f":{frames[-1].lineno}" if frames else ""
    return f"{path}{line}: {type(error).__name__}: {error}".removeprefix(": ")
