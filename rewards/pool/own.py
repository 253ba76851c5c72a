"""A reward of the user's: `FILE.py:FUNCTION`, loaded and called inside a worker.

The function asks for what it needs by the names of its parameters: `completion`, `gold`, and any of `ABOUT`; two
strings under other names are the completion and the gold, in this order. It returns a number, or a dict of numbers of
which `score` is the reward. Whatever else it does is an error that names its file and line.
"""

import importlib.util
import inspect
import logging
import math
import numbers
import reprlib
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

TEXTS = ("completion", "gold")
ABOUT = ("problem", "prompt", "response_tokens", "truncated")
"""What a reward may ask for beside the two texts, if the caller of `Verifier.submit` gives it: the row of the problem
(a dict), the text of the prompt, the length of the response in tokens (an int), whether it was cut at its limit."""


class OwnReward(NamedTuple):
    """A loaded function, the file it is from, and what it asks for."""

    function: Callable[..., object]
    path: str
    asked: "Asked"

    def grade(self, completion: str, gold: str, about: dict[str, object]) -> dict[str, Any]:
        """The reply of a worker: value, reason and parts, or an error in words. Raises MemoryError."""
        texts = {"completion": completion, "gold": gold}
        try:
            if self.asked.texts is None:
                said = self.function(completion, gold, **about)
            else:
                said = self.function(**{name: texts[name] for name in self.asked.texts}, **about)
            parts = scores_of(said)
        except MemoryError:
            raise
        except Exception as error:  # a user's function may raise anything
            logger.debug("the reward raised", exc_info=True)
            where = f"{told(error, self.path)}; the completion begins {completion[:80]!r}"
            return {"value": None, "reason": "error", "error": where}
        score = parts.pop("score")
        return {"value": score, "reason": "match" if score > 0 else "mismatch", "parts": parts}


def load(grader: str) -> OwnReward:
    """The function of "path/to/file.py:function".

    Raises what the file raises, ImportError for a file that is no Python, AttributeError for a name that is not in it,
    TypeError for something that is no function or asks for what nobody gives.
    """
    path, _, name = grader.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).resolve().parent))  # so that the file may import its neighbours
    spec.loader.exec_module(module)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is not a function but {type(function).__name__}")
    return OwnReward(function, path, asked_by(function))


class Asked(NamedTuple):
    """What a function asks for by name: of TEXTS (None: the two by position), of ABOUT without and with a default."""

    texts: tuple[str, ...] | None
    required: tuple[str, ...]
    optional: tuple[str, ...]


def asked_by(function: Callable[..., object]) -> Asked:
    """Read off the parameters. Raises TypeError for one without a default that is neither a text nor in ABOUT."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C
        return Asked(None, (), ())
    parts = [part for part in signature.parameters.values() if part.kind not in (part.VAR_POSITIONAL, part.VAR_KEYWORD)]
    strange = [part.name for part in parts if part.default is part.empty and part.name not in TEXTS + ABOUT]
    pair = [part.name for part in parts if part.kind is not part.KEYWORD_ONLY][:2]
    fits = [name == text or name not in TEXTS + ABOUT for name, text in zip(pair, TEXTS, strict=False)] == [True, True]
    by_position = not parts or (fits and not set(pair).isdisjoint(strange))  # f(*texts), f(answer, solution)
    if by_position:
        parts, strange = parts[2:], [name for name in strange if name not in pair]
    if strange:
        raise TypeError(
            f"{signature} asks for {', '.join(strange)}, which is not known here; known are "
            f"{', '.join(TEXTS + ABOUT)}, and a parameter of your own needs a default"
        )
    names = {part.name: part.default is part.empty for part in parts}
    return Asked(
        None if by_position else tuple(name for name in TEXTS if name in names),
        tuple(name for name in ABOUT if names.get(name) is True),
        tuple(name for name in ABOUT if names.get(name) is False),
    )


def scores_of(said: object) -> dict[str, float]:
    """The numbers that a reward returned, `score` among them. Raises TypeError for anything else."""
    scores = said if isinstance(said, Mapping) else {"score": said}
    if "score" not in scores or not all(isinstance(name, str) for name in scores):
        raise TypeError(f"returned {_shown(said)}; a dict needs names, and 'score' among them")
    found = {name: _number(value) for name, value in scores.items()}
    for name, value in found.items():
        if value is None:
            what = f"{type(scores[name]).__name__} {_shown(scores[name])}"
            raise TypeError(f"returned {what} as {name}; a finite number, or a dict of them with 'score', is needed")
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    """A bool, an int, a float, a Fraction, or a scalar of numpy or torch as a float; None for anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _shown(value: object) -> str:
    """A value, shortened; Python refuses to write out a whole number of more than 4,300 digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "(too long to be shown)"


def told(error: BaseException, path: str) -> str:
    """An error with the line of the user's file that it came from, where there is one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = f":{frames[-1].lineno}" if frames else ""
    return f"{path}{line}: {type(error).__name__}: {error}".removeprefix(": ")
