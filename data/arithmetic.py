"""Generated word problems and arithmetic in English, for a small pretrained model: sets arith_train, arith_eval, ...

    arithmetic_problems("arith_train")          # the same problems on every call and machine

A problem is a short story ("Ann has 4 pens. She buys 3 more pens. How many pens does Ann have now?") or a plain
question ("What is 4 + 3?") with one operation. The answer is a non-negative integer. A hash of its text assigns a
problem to the training set or to the evaluation sets, so no evaluation problem is in the training set.
"""

import random
from functools import cache

from data.problem import Problem

NAMES = {"Ann": "She", "Ben": "He", "Eva": "She", "Leo": "He", "Mia": "She", "Sam": "He", "Tom": "He", "Zoe": "She"}
THINGS = "apples books cards coins eggs marbles pens shells stamps stickers".split()
QUESTIONS = ("What is {}?", "Calculate {}.", "Find {}.", "How much is {}?")
CHANGE = "{name} has {a} {things}. {who} {word} {b} {things}. How many {things} does {name} have now?"
GROUPS = "{name} has {b} {word} with {a} {things} each. How many {things} does {name} have?"
STORIES = {  # operation -> story, and words to choose from
    "+": (CHANGE.replace("{b}", "{b} more"), ("buys", "finds", "gets")),
    "-": (CHANGE, ("gives away", "loses", "sells")),
    "*": (GROUPS, ("bags", "boxes", "jars")),
}
STORY_SHARE, LARGEST_FACTOR = 0.4, 5
SETS = {  # name -> smallest first operand, largest operand, number of problems, whether they are held out
    "arith_train": (2, 9, 512, False),
    "arith_eval": (2, 9, 64, True),
    "arith_hard": (6, 12, 64, True),
}


@cache
def arithmetic_problems(name: str) -> tuple[Problem, ...]:
    """Generate the problems of a set. Raises ValueError for an unknown name."""
    if name not in SETS:
        raise ValueError(f"{name!r} is not a generated set; use one of {', '.join(SETS)}")
    smallest, largest, count, held_out = SETS[name]
    rng, problems = random.Random(name), {}
    while len(problems) < count:
        text, answer = _draw(rng, smallest, largest)
        # A function of the text only: a problem is held out in all sets or in none.
        if text not in problems and (random.Random(text).random() < 0.1) == held_out:
            problems[text] = Problem(f"{name}/{len(problems)}", text, str(answer), name, None)
    return tuple(problems.values())


def _draw(rng: random.Random, smallest: int, largest: int) -> tuple[str, int]:
    """Draw a random problem; return (problem, answer)."""
    sign = rng.choice("+-*")
    a, b = rng.randint(smallest, largest), rng.randint(2, LARGEST_FACTOR if sign == "*" else largest)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    answer = {"+": a + b, "-": a - b, "*": a * b}[sign]
    if rng.random() >= STORY_SHARE:
        return rng.choice(QUESTIONS).format(f"{a} {sign} {b}"), answer
    (story, words), name = STORIES[sign], rng.choice(list(NAMES))
    return story.format(a=a, b=b, name=name, who=NAMES[name], word=rng.choice(words), things=rng.choice(THINGS)), answer
