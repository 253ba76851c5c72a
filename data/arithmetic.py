"""Generated word problems and arithmetic in English, for a small pretrained model: sets arith_train, arith_eval, ...

    arithmetic_problems("arith_train")          # the same problems on every call and machine

A problem is a short story ("Ann has 4 pens. She buys 3 more pens. How many pens does Ann have now?") or a plain
question ("What is 4 + 3?") of one or more steps. Every running value is a whole number from 0. A problem belongs to
the training set or to an evaluation set by a hash of its own text, so no evaluation problem is in the training set.
"""

import random
from dataclasses import dataclass
from functools import cache

from data.problem import Problem

NAMES = {"Ann": "She", "Ben": "He", "Eva": "She", "Leo": "He", "Mia": "She", "Sam": "He", "Tom": "He", "Zoe": "She"}
THINGS = "apples books cards coins eggs marbles pens shells stamps stickers".split()
GAINS = ("buys {n} more {things}", "finds {n} more {things}", "gets {n} more {things}")
LOSSES = ("gives away {n} {things}", "loses {n} {things}", "sells {n} {things}")
GROUPS = "bags boxes jars".split()
QUESTIONS = ("What is {}?", "Calculate {}.", "Find {}.", "How much is {}?")


@dataclass(frozen=True)
class Level:
    """One difficulty: numbers of steps to draw from, range of the first operand, largest factor, share of stories."""

    steps: tuple[int, ...]
    smallest: int
    largest: int
    factor: int
    stories: float


SETS = {  # name -> its difficulty, problems, and whether it is held out
    "arith_train": (Level((1,), 2, 9, 5, 0.4), 512, False),
    "arith_eval": (Level((1,), 2, 9, 5, 0.4), 64, True),
    "arith_hard": (Level((1,), 10, 20, 5, 0.4), 64, True),
}


@cache
def arithmetic_problems(name: str) -> tuple[Problem, ...]:
    """Problems of a generated set; `level` is the number of steps. Raises ValueError for an unknown name."""
    if name not in SETS:
        raise ValueError(f"{name!r} is not a generated set; use one of {', '.join(SETS)}")
    level, count, held_out = SETS[name]
    rng, problems = random.Random(name), {}
    while len(problems) < count:
        steps = rng.choice(level.steps)
        text, value = _draw(rng, level, steps)
        # A function of the text alone: one problem is on the same side in every set.
        if text not in problems and (random.Random(text).random() < 0.1) == held_out:
            problems[text] = Problem(f"{name}/{len(problems)}", text, str(value), name, steps)
    return tuple(problems.values())


def _draw(rng: random.Random, level: Level, steps: int) -> tuple[str, int]:
    """(problem, answer)."""
    first, groups = rng.randint(level.smallest, level.largest), 0
    if rng.random() < 1 / 3:
        groups = rng.randint(2, level.factor)
    value = first * groups if groups else first
    moves = []  # signed changes
    for _ in range(steps - bool(groups)):
        change = rng.randint(2, level.largest)  # "1 pens" is no English
        if value >= change and rng.random() < 0.5:
            change = -change
        moves.append(change)
        value += change
    if not moves and not groups:
        return _draw(rng, level, steps)
    text = _story(rng, first, groups, moves) if rng.random() < level.stories else _question(rng, first, groups, moves)
    return text, value


def _story(rng: random.Random, first: int, groups: int, moves: list[int]) -> str:
    name, things = rng.choice(list(NAMES)), rng.choice(THINGS)
    start = f"{groups} {rng.choice(GROUPS)} with {first} {things} each" if groups else f"{first} {things}"
    sentences = [f"{name} has {start}."]
    for change in moves:
        form = rng.choice(GAINS if change > 0 else LOSSES)
        sentences.append(f"{NAMES[name]} {form.format(n=abs(change), things=things)}.")
    return " ".join([*sentences, f"How many {things} does {name} have{' now' if moves else ''}?"])


def _question(rng: random.Random, first: int, groups: int, moves: list[int]) -> str:
    start = f"{groups} * {first}" if groups else str(first)
    rest = "".join(f" {'+' if change > 0 else '-'} {abs(change)}" for change in moves)
    return rng.choice(QUESTIONS).format(start + rest)
