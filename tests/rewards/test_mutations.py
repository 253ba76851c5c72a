"""A right answer made wrong by one change is never paid: generated pairs, each wrong by construction.

Every generator returns (gold, a right answer, the same answer with one change): a sign, a digit, the order, a bracket,
a missing or repeated root, a unit, a name, a link of a chain. The right ones must be paid as well, so that a verifier
that refuses everything fails here too.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from math import comb, factorial, gcd

import pytest

from rewards import Verifier

PAIRS = 2500
Pair = tuple[str, str, str]


def other(rng: random.Random, n: int) -> int:
    """A number one change away from n: its sign, a digit, a digit more, a neighbour."""
    digits = str(abs(n))
    at = rng.randrange(len(digits))
    changed = digits[:at] + rng.choice([digit for digit in "123456789" if digit != digits[at]]) + digits[at + 1 :]
    sign = -1 if n < 0 else 1
    choices = [sign * int(changed), sign * int(digits + rng.choice("0123456789")), n + 1, n - 1, -n]
    return rng.choice([choice for choice in choices if choice != n])


def thousands(n: int) -> str:
    return f"{n:,}".replace(",", "{,}")


def integers(rng: random.Random) -> Pair:
    n = rng.choice([rng.randint(2, 99), rng.randint(1000, 99999), -rng.randint(2, 999)])
    dress = rng.choice(
        ["%s", "%s.", "$%s$", "x=%s", "%s=x", "f(2) = %s", "m+n=%s", "\\text{The answer is }%s", "\\mathbf{%s}", "%s.0",
         "P(X=7)=%s", "S_{10}=%s", "\\frac{dy}{dx}=%s", "x=y=%s", "\n%s", "%s ✅", "\\text{Total} = %s",
         "\\begin{aligned}x&=%s\\end{aligned}"]
    )  # fmt: skip
    write = rng.choice([str, thousands])
    return str(n), dress % write(n), dress % write(other(rng, n))


def sums(rng: random.Random) -> Pair:
    """Chains: a wrong end, a wrong first link, a wrong middle."""
    p, q = rng.randint(2, 60), rng.randint(2, 60)
    n, name = p * q, rng.choice(["", "x=", "A="])
    right = f"{name}{p} \\times {q} = {thousands(n)}"
    wrong = rng.choice([
        f"{name}{p} \\times {q} = {thousands(other(rng, n))}", f"{name}{p} \\times {q + 1} = {thousands(n)}",
        f"{name}{p + 1}\\cdot {q} = {n}", f"{name}{p}\\times {q}={n + 1}={n}", f"{name}{n}={p}\\times {q}={n + 1}",
    ])  # fmt: skip
    return str(n), right, wrong


def factorials(rng: random.Random) -> Pair:
    n, k = rng.randint(4, 9), rng.randint(2, 3)
    if rng.random() < 0.5:
        return str(factorial(n)), f"{n}! = {factorial(n)}", f"{n - 1}! = {factorial(n)}"
    value = comb(n, k)
    return str(value), f"\\binom{{{n}}}{{{k}}} = {value}", f"\\binom{{{n + 1}}}{{{k}}} = {value}"


def fractions(rng: random.Random) -> Pair:
    p, q = rng.randint(1, 40), rng.randint(2, 40)
    p, q = p // gcd(p, q), q // gcd(p, q)
    s, t = rng.choice([(other(rng, p), q), (p, q + 1), (-p, q)])
    dress = rng.choice(
        ["\\frac{%d}{%d}", "%d/%d", "x=\\dfrac{%d}{%d}", "\\mathrm{\\frac{%d}{%d}}", "P(A)=\\tfrac{%d}{%d}"]
    )
    return f"\\frac{{{p}}}{{{q}}}", dress % (p, q), dress % (s, t)


def decimals(rng: random.Random) -> Pair:
    n = rng.randint(101, 9999)
    gold, wrong = n / 100, other(rng, n) / 100
    dress = rng.choice(["%s", "x=%s", "%s\\text{ cm}", "\\$%s"])
    if rng.random() < 0.3:
        return str(gold), f"{n}\\%", rng.choice([f"{other(rng, n)}\\%", f"{n}", f"{gold / 10}\\%"])
    return str(gold), dress % gold, dress % wrong


def equations(rng: random.Random) -> Pair:
    """The value of an unknown against an equation that is still to be solved for it."""
    x, k, c = rng.choice([-7, -3, 2, 5, 12]), rng.randint(2, 9), rng.randint(1, 20)
    echo = rng.choice([
        f"{k}x+{c}={k * x + c}", f"{k}x={k * x}", f"\\frac{{x}}{{{k}}}=\\frac{{{x}}}{{{k}}}", f"x+{c}={x + c}",
        f"{k}(x-{c})={k * (x - c)}", f"x^2={x * x}", f"{x + c}-x={c}", f"x={2 * x}-x", f"x\\neq {x}", f"x\\not={x}",
    ])  # fmt: skip
    return rng.choice([f"x={x}", str(x)]), rng.choice([f"x={x}", f"{x}=x", f"x = {x}.0"]), echo


def points(rng: random.Random) -> Pair:
    x, y = rng.sample(range(-9, 10), 2)
    gold = rng.choice([f"({x},{y})", f"x={x}, y={y}", f"(x,y)=({x},{y})"])
    right = rng.choice([
        f"({x}, {y})", f"x={x},\\ y={y}", f"y={y}, x={x}", f"(x,y)=({x},{y})", f"(y,x)=({y},{x})",
        f"\\begin{{cases}}x={x}\\\\y={y}\\end{{cases}}", f"x={x}\\text{{ and }}y={y}",
    ])  # fmt: skip
    wrong = rng.choice([
        f"({y},{x})", f"y={x}, x={y}", f"(y,x)=({x},{y})", f"({x},{other(rng, y)})", f"x={other(rng, x)}, y={y}",
        f"\\begin{{cases}}y={x}\\\\x={y}\\end{{cases}}", f"\\{{{x},{y}\\}}", f"({x},{y},{y})", f"x={x}",
    ])  # fmt: skip
    return gold, right, wrong


def roots(rng: random.Random) -> Pair:
    values = rng.sample(range(-20, 21), rng.randint(2, 4))
    changed = rng.choice([
        values[1:], [*values, 77], [*values[:-1], values[0]], [*values[:-1], other(rng, values[-1]) + 100],
    ])  # fmt: skip
    shuffled = rng.sample(values, len(values))
    dress = rng.choice([lambda v: ", ".join(map(str, v)), lambda v: "\\{" + ",".join(map(str, v)) + "\\}",
        lambda v: " \\text{ or } ".join(f"x={n}" for n in v), lambda v: "S=\\{" + ", ".join(map(str, v)) + "\\}",
        lambda v: "x\\in\\{" + ",".join(map(str, v)) + "\\}", lambda v: "A\\cap B = \\{" + ",".join(map(str,
            v)) + "\\}"]
    )  # fmt: skip
    return rng.choice(["\\{%s\\}", "%s"]) % ",".join(map(str, values)), dress(shuffled), dress(changed)


def plus_minus(rng: random.Random) -> Pair:
    p, q = rng.randint(1, 9), rng.choice([2, 3, 5, 7])
    gold = rng.choice([f"{p}+\\sqrt{q},{p}-\\sqrt{q}", f"{p}\\pm\\sqrt{q}"])
    wrong = [
        f"{p}+\\sqrt{q}",
        f"{p + 1}\\pm\\sqrt{q}",
        f"-{p}\\pm\\sqrt{q}",
        f"{p}\\pm\\sqrt{{{q + 1}}}",
        f"{p}-\\sqrt{q}",
    ]
    return gold, rng.choice([f"{p}\\pm\\sqrt{q}", f"{p}\\mp\\sqrt{{{q}}}", f"x={p}\\pm\\sqrt{q}"]), rng.choice(wrong)


def intervals(rng: random.Random) -> Pair:
    low = rng.randint(-9, 5)
    high = low + rng.randint(1, 9)
    opening, closing = rng.choice("(["), rng.choice(")]")

    def say(low: int, high: int, opening: str, closing: str) -> str:
        left, right = ("\\le" if mark in "[]" else "<" for mark in (opening, closing))
        over, above = ("\\ge" if mark in "[]" else ">" for mark in (closing, opening))
        turned = f"{high} {over} x {above} {low}"
        return rng.choice([
            f"{opening}{low},{high}{closing}", f"{low} {left} x {right} {high}", turned,
                f"x\\in{opening}{low},{high}{closing}",
            f"\\{{x\\mid {low} {left} x {right} {high}\\}}",
        ])  # fmt: skip

    wrong = rng.choice([
        (low, high, "(" if opening == "[" else "[", closing), (low, high, opening, ")" if closing == "]" else "]"),
        (low - 1, high, opening, closing), (low, high + 1, opening, closing), (-high - 20, -low - 20, opening, closing),
    ])  # fmt: skip
    return f"{opening}{low},{high}{closing}", say(low, high, opening, closing), say(*wrong)


def domains(rng: random.Random) -> Pair:
    p, q = sorted(rng.sample(range(-9, 10), 2))

    def say(p: int, q: int) -> str:
        return rng.choice([
            f"\\mathbb{{R}}\\setminus\\{{{p},{q}\\}}", f"x\\neq {p}\\text{{ and }}x\\neq {q}", 
            f"x\\neq {q}, x\\neq {p}",
            f"(-\\infty,{p})\\cup({p},{q})\\cup({q},\\infty)", f"\\{{x\\in\\mathbb{{R}}\\mid x\\neq {p}, x\\ne {q}\\}}",
        ])  # fmt: skip

    wrong = rng.choice([
        say(p - 1, q), say(p, q + 1), f"\\mathbb{{R}}\\setminus\\{{{p}\\}}", f"x\\neq {q}", "\\mathbb{R}",
        f"(-\\infty,{p}]\\cup({p},{q})\\cup({q},\\infty)", f"(-\\infty,{p})\\cup({q},\\infty)", f"\\{{{p},{q}\\}}",
        f"\\mathbb{{R}}\\setminus[{p},{q}]", f"x={p}, x={q}",
    ])  # fmt: skip
    return say(p, q), say(p, q), wrong


def expressions(rng: random.Random) -> Pair:
    p, q, r = rng.randint(2, 9), rng.randint(1, 9), rng.randint(2, 7)
    gold, right, wrong = rng.choice([
        (f"{p}x^2+{q}x", [f"{q}x+{p}x^2", f"x({p}x+{q})", f"f(x)=x({p}x+{q})"], [f"{p}x^2-{q}x", f"x({q}x+{p})+1"]),
        (f"(x+{p})^2", [f"x^2+{2 * p}x+{p * p}", f"y=x^2+{2 * p}x+{p * p}"], [f"x^2+{2 * p}x-{p * p}",
            f"x^2+{p}x+{p * p}"]),
        (f"{p}\\sqrt{{{r}}}", [f"\\sqrt{{{p * p * r}}}", f"{p}\\sqrt {r}"], [f"\\sqrt{{{p * p * r + 1}}}",
            f"-{p}\\sqrt{{{r}}}"]),
        (f"\\frac{{{p}\\pi}}{{{r}}}", [f"{p}\\pi/{r}", f"\\frac{{{p}}}{{{r}}}\\pi"],
            [f"\\frac{{{p}\\pi}}{{{r + 1}}}", f"{p}/{r}"]),
        (f"{p}-{q}i", [f"-{q}i+{p}", f"z={p}-{q}i"], [f"{p}+{q}i", f"{q}-{p + 1}i", f"{p}-{q}"]),
        (f"e^{{{p}x}}", [f"(e^x)^{{{p}}}", f"y(x)=e^{{{p}x}}"], [f"e^{{{p + 1}x}}", f"e^{{-{p}x}}", f"{p}e^x"]),
        (f"{p}^{{n+1}}", [f"{p}\\cdot {p}^n"], [f"{p}\\cdot {p}^{{n+1}}", f"{p + 1}^{{n+1}}", f"{p}^{{n-1}}"]),
        (f"\\ln {p * r}", [f"\\ln {p}+\\ln {r}"], [f"\\ln {p}-\\ln {r}", f"\\ln {p}\\cdot\\ln {r + 5}"]),
        (f"{p}n!", [f"{p}n(n-1)!", f"{p}\\cdot n!"], [f"{p}n(n-2)!", f"{p}(n+1)!", f"{p + 1}n!"]),
        ("\\binom{n}{2}", ["\\frac{n(n-1)}{2}", "{n\\choose 2}"], ["\\frac{n(n+1)}{2}", "{n\\choose 3}",
            "\\binom{2}{n}"]),
        (f"{p}x^{r}+C", [f"{p}x^{r}+C", f"{p}x^{r}+c"], [f"{p}x^{r}", f"{p}x^{r + 1}+C", f"-{p}x^{r}+C", f"{p}x^{r}C"]),
    ])  # fmt: skip
    return gold, rng.choice(right), rng.choice(wrong)


def lines(rng: random.Random) -> Pair:
    m, c = rng.randint(2, 9), rng.randint(1, 9)
    right = [f"y={m}x+{c}", f"{m}x-y+{c}=0", f"y-{c}={m}x", f"{2 * m}x-2y=-{2 * c}"]
    wrong = [f"y={m}x-{c}", f"{m}x+y+{c}=0", f"y-{c}={m + 1}x", f"x={m}y+{c}", f"{2 * m}x-2y={2 * c}", f"y'={m}x+{c}"]
    return f"y={m}x+{c}", rng.choice(right), rng.choice(wrong)


def derivatives(rng: random.Random) -> Pair:
    k = rng.randint(2, 9)
    names = rng.choice(
        [("f'(x)", "f''(x)", "f(x)"), ("y'", "y''", "y"), ("\\frac{dy}{dx}", "\\frac{d^2y}{dx^2}", "\\frac{dx}{dy}")]
    )
    right = f"{names[0]}={k}x"
    return (
        right,
        rng.choice([right, f"{k}x"]),
        rng.choice([f"{names[1]}={k}x", f"{names[2]}={k}x", f"{names[0]}=-{k}x"]),
    )


def matrices(rng: random.Random) -> Pair:
    p, q, r, s = rng.sample(range(-9, 10), 4)

    def say(rows: list[list[int]], kind: str) -> str:
        end_of_row = rng.choice(["\\\\", "\\\\[4pt]"])
        return f"\\begin{{{kind}}}{end_of_row.join('&'.join(map(str, row)) for row in rows)}\\end{{{kind}}}"

    wrong = rng.choice(
        [[[p, r], [q, s]], [[r, s], [p, q]], [[p, q], [r, other(rng, s)]], [[p, q]], [[p], [q], [r], [s]]]
    )
    name = rng.choice(["", "A^{-1}=", "AB=", "M = "])
    return say([[p, q], [r, s]], "pmatrix"), name + say([[p, q], [r, s]], "bmatrix"), name + say(wrong, "bmatrix")


def units(rng: random.Random) -> Pair:
    n, unit = rng.randint(2, 900), rng.choice(["cm", "kg", "hours", "m^2", "mph"])
    gold = rng.choice([f"{n}", f"{n}\\text{{ {unit}}}"])
    wrong = [
        f"{other(rng, n)}\\text{{ {unit}}}",
        f"{n}\\text{{ {rng.choice(['thousand', 'pairs', 'dozen', 'tenths', 'reciprocals'])}}}",
        f"{n}s",
    ]
    if gold != f"{n}":
        wrong += [f"{n}\\text{{ km}}", f"{other(rng, n)}", f"{n}\\%", f"{n}\\text{{ m}}^3"]
    return gold, f"{n}\\,\\text{{{unit}}}", rng.choice(wrong)


def money(rng: random.Random) -> Pair:
    n = rng.randint(2, 90)
    right = [f"\\${n}", f"\\text{{\\${n}}}", f"\\${n}.00", f"{n}\\text{{ dollars}}", f"$\\${n}$"]
    wrong = [
        f"\\${n}\\text{{K}}",
        f"\\${n + 1}",
        f"{n}\\text{{ cents}}",
        f"\\${n},{n}",
        f"-\\${n}",
        f"\\text{{\\${n}0}}",
        f"\\${n}\\%",
    ]
    return f"\\${n}", rng.choice(right), rng.choice(wrong)


def bases(rng: random.Random) -> Pair:
    base = rng.choice([2, 3, 5, 8])
    digits = "1" + "".join(str(rng.randrange(base)) for _ in range(rng.randint(2, 6)))
    wrong = [
        f"{digits}_{base + 1}",
        f"{digits}0_{base}",
        f"{digits}_x",
        f"{digits}",
        f"{int(digits, base)}",
        f"{digits}_{{-{base}}}",
    ]
    right = [f"{digits}_{{{base}}}", f"{digits}_{{({base})}}", f"{int(digits, base)} = {digits}_{base}"]
    wrong.append(f"{int(digits, base) + 1} = {digits}_{base}")
    return f"{digits}_{base}", rng.choice(right), rng.choice(wrong)


def ratios(rng: random.Random) -> Pair:
    p, q = rng.sample([3, 5, 7, 8], 2)  # not 11, for 10:22 is a time of day
    right = [f"{p}:{q}", f"{2 * p}:{2 * q}", f"{p}\\text{{ to }}{q}", f"\\frac{{{p}}}{{{q}}}", f"a:b={p}:{q}"]
    return (
        f"{p}:{q}",
        rng.choice(right),
        rng.choice([f"{q}:{p}", f"{p + 1}:{q}", f"-{p}:{q}", f"{p}", f"{p}:{q}:1", f"\\frac{{{q}}}{{{p}}}"]),
    )


def residues(rng: random.Random) -> Pair:
    r, m = rng.randint(1, 6), rng.randint(7, 12)
    right = [f"x\\equiv {r}\\ (\\mathrm{{mod}}\\ {m})", f"{r}\\pmod {m}", f"x\\equiv {r + m}\\pmod{{{m}}}"]
    wrong = [
        f"x\\equiv {r}\\pmod{{{m + 1}}}",
        f"x\\equiv {r + 1}\\pmod{{{m}}}",
        f"x\\equiv {r + m}",
        f"x\\equiv -{r}\\pmod{{{2 * m + 1}}}",
    ]
    return f"x\\equiv {r}\\pmod{{{m}}}", rng.choice(right), rng.choice(wrong)


def pieces(rng: random.Random) -> Pair:
    p, q, c = rng.sample(range(2, 12), 3)

    def say(p: int, q: int, c: int, sign: str = "\\ge", rest: str = "<") -> str:
        condition = rng.choice(["", "\\text{if }", "\\text{for }"])
        rows = [f"{p}x&{condition}x{sign} {c}", f"{q}x&{condition}x{rest} {c}"]
        return "\\begin{cases}" + "\\\\".join(rng.sample(rows, 2)) + "\\end{cases}"

    wrong = [say(q, p, c), say(p + 1, q, c), say(p, q, c + 1), say(p, q, c, ">", "\\le"), say(p, -q, c)]
    return say(p, q, c), say(p, q, c), rng.choice(wrong)


def hedges(rng: random.Random) -> Pair:
    """Two values offered for one, whichever comes last."""
    n = rng.randint(2, 99)
    values = rng.sample([n, other(rng, n)], 2)
    frame = rng.choice([
        "%d \\text{ or } %d", "%d, %d", "%d\\text{ otherwise }%d", "%d, \\text{else } %d", "%d}, otherwise \\boxed{%d",
        "%d} or maybe \\boxed{%d", "%d}. Option two: the answer is \\boxed{%d", "%d}; alternatively \\boxed{%d",
        "%d}, else \\boxed{%d", "%d}. Case 2: it is \\boxed{%d", "%d\\text{ (or }%d)", "%d / %d", "%d \\to %d",
            "%d \\mid %d",
    ])  # fmt: skip
    return str(n), str(n), frame % tuple(values)


# ---- what models write around and instead of a value ----


def labels(rng: random.Random) -> Pair:
    """A label above a displayed box announces the box; a value beside the label must agree with it."""
    n = rng.randint(2, 900)
    m = other(rng, n)
    label = rng.choice(["**Final Answer:**", "Answer:", "### Final answer:", "**Answer:**", "Let us box the answer:"])
    opening, closing = rng.choice([("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$"), ("\\begin{align*}", "\\end{align*}")])
    frame = rng.choice(["%s\n\n%s\n\\boxed{%d}\n%s", "%s\n%s\n\\boxed{x = %d}.\n%s\n\n---", "%s %s\n\\boxed{%d}\n%s"])
    wrong = rng.choice([frame % (label, opening, m, closing), f"Answer: {m}\n\\boxed{{{n}}}", f"\\boxed{{{m}}}"])
    return str(n), frame % (label, opening, n, closing), wrong


def sentences_after(rng: random.Random) -> Pair:
    """A box, and a sentence after it that says the same or another value, or only checks it."""
    n = rng.randint(2, 900)
    m = other(rng, n)
    frame = rng.choice([
        "so $\\boxed{%d}$.\nFinal Answer: The final answer is $%d$. I hope it is correct.",
        "\\boxed{%d}\n**Answer:** %d",
        "Thus $\\boxed{%d}$.\n\nFinal answer: the value is %d.", "\\boxed{%d}\nAnswer: There are %d ways.",
    ])  # fmt: skip
    check = f"\\boxed{{{n}}}. We may check our answer: {n}+{m} = {n + m}."
    return str(n), rng.choice([frame % (n, n), check]), frame % rng.choice([(n, m), (m, n)])


def around_the_box(rng: random.Random) -> Pair:
    n = rng.randint(2, 99)
    right = [f"$x = \\boxed{{{n}}}$", f"$9-k=\\boxed{{{n}}}$", f"- \\boxed{{{n}}}", f"$\\boxed{{{n}}}$ cm"]
    wrong = [
        f"$x = -\\boxed{{{n}}}$", f"$3\\boxed{{{n}}}$", f"$\\boxed{{{n}}}^2$", f"$\\boxed{{{n}}}\\pi$",
        f"$\\frac{{\\boxed{{{n}}}}}{{2}}$", f"$\\boxed{{{n}}}/2$", f"$\\sqrt{{\\boxed{{{n}}}}}$",
        f"$\\sqrt2\\boxed{{{n}}}$", f"$2^{{\\boxed{{{n}}}}}$",
    ]  # fmt: skip
    return str(n), rng.choice(right), rng.choice(wrong)


def undone(rng: random.Random) -> Pair:
    p, q = rng.randint(3, 60), rng.randint(3, 60)
    n = p * q
    wrong = [
        f"{p}\\times{q}", f"{p}({q})", f"({p})({q})", f"{p}\\cdot {q}/1", f"\\frac{{{p}\\times{q}}}{{1}}", f"{n - 4}+4",
        f"{n - 2}+\\frac{{6}}{{3}}", f"{n - 3}+\\sqrt9", f"{n + 8}-2^3", f"\\frac{{{p}\\cdot {2 * q}}}{{2}}",
        f"{{{p}}}\\ast {q}", f"\\left({n - 6}+3!\\right)", f"{p}*{q}", f"\\sqrt{{{n}\\cdot {n}}}",
    ]  # fmt: skip
    return str(n), rng.choice([str(n), f"{p}\\times{q}={n}", f"x={n}", f"\\frac{{{n}}}{{1}}"]), rng.choice(wrong)


def relations(rng: random.Random) -> Pair:
    """One side of a relation is not the relation; a name with its value says the value."""
    k, m = rng.sample(range(2, 9), 2)
    gold, right, wrong = rng.choice([
        (f"a+c={k}b", [f"{k}b=a+c", f"a+c-{k}b=0", f"a={k}b-c"], [f"{k}b", "a+c", f"a+c={m}b", f"a-c={k}b"]),
        (f"b^2={k}ac", [f"{k}ac=b^2", f"b^2-{k}ac=0"], [f"{k}ac", f"b^2={m}ac", f"b={k}ac", "b^2"]),
        (f"{k}x+{m}y=0", [f"{2 * k}x+{2 * m}y=0"], ["0", f"{k}x", f"{m}x+{k}y=0", f"{k}x-{m}y=0"]),
        (f"v={k}gh", [f"{k}gh", f"v={k}hg"], [f"{m}gh", f"v^2={k}gh", f"v=-{k}gh", f"{k}g"]),
        (f"\\sqrt{k}={m}.25", [f"\\sqrt{{{k}}}={m}.25"], ["8=9", f"\\pi={m}.25", f"\\sqrt{k}={m}.26", f"{m}.25"]),
    ])  # fmt: skip
    return gold, rng.choice(right), rng.choice(wrong)


def commas(rng: random.Random) -> Pair:
    """A comma and a blank separate; a comma in front of three digits does not."""
    p, q = rng.randint(2, 99), rng.randint(100, 999)
    joined = 1000 * p + q
    if rng.random() < 0.5:
        right = rng.choice([f"{p},{q}", f"{p}{{,}}{q}", f"{p}\\,{q}", f"{p},\\!{q}"])
        return str(joined), right, rng.choice([f"{p}, {q}", f"{p};{q}", f"({p},{q})", f"{p},{q + 1}", f"{p},{q}, 0"])
    right = rng.choice([f"{p}, {q}", f"{q}, {p}", f"\\{{{q}, {p}\\}}", f"{p}\\text{{ and }}{q}"])
    return f"{p}, {q}", right, rng.choice([str(joined), f"{p}{{,}}{q}", f"{p}\\,{q}", str(q), f"{p}, {q + 1}"])


def daily_units(rng: random.Random) -> Pair:
    n = rng.randint(2, 900)
    m = other(rng, n)
    dress = rng.choice([
        "Answer: %d g", "Answer: %dg", "\\boxed{%dweeks}", "\\boxed{%d cups of sugar}", "Answer: $%d/year",
        "\\boxed{\\$%d an hour}", "\\boxed{%d Mb/s}", "\\boxed{%d inches long}", "\\boxed{%d years old}",
        "Answer: %d L",
        "\\boxed{%d\\text{ cm}^{-3}}", "\\boxed{\\$%d each}", "Answer: The class found %d eggs.", "\\boxed{%dkm/h}",
        "Answer: She has %d apples in the basket.", "\\boxed{%d\\text{ ways.}}", "\\boxed{%d\\text{ kJ/mol}}",
    ])  # fmt: skip
    wrong = [
        "\\boxed{%dx}", "\\boxed{%d dozen eggs}", "\\boxed{%d sixths}", "\\boxed{%d half cups}",
        "\\boxed{%d boxes of 12}",
        "\\boxed{%d fewer apples}", "Answer: %d out of 970", "Answer: The class found %d or 5000 eggs.", "\\boxed{%ds}",
        "Answer: The class found at least %d eggs.", "Answer: The class did not find %d eggs.", "\\boxed{%dK}",
    ]  # fmt: skip
    return str(n), dress % n, rng.choice([dress % m, rng.choice(wrong) % n])


def compound_units(rng: random.Random) -> Pair:
    n = rng.randint(2, 900)
    gold, right, wrong = rng.choice([
        ("m/s", ["m s^{-1}", "meters per second", "m*s^{-1}"], ["m s", "s/m", "m/s^2", "km/s", "m/h"]),
        ("m/s^2", ["m s^{-2}", "meters per second squared"], ["m/s", "m^2/s", "m s^2", "m/s^3"]),
        ("cm^3", ["cubic centimeters", "cubic cm"], ["cm^2", "cm", "square cm", "m^3"]),
        ("kW", ["kilowatts"], ["mW", "MW", "W", "kV"]),
        ("miles per hour", ["mph", "mi/h"], ["km/h", "miles per minute", "miles"]),
        ("square feet", ["ft^2", "sq ft"], ["cubic feet", "feet", "square inches"]),
        ("apples", ["apples each"], ["oranges", "dozen apples", "apples per day"]),
    ])  # fmt: skip

    def say(n: int, unit: str) -> str:
        return f"{n}\\text{{ {unit}}}".replace("^{-1}}", "}^{-1}").replace("^{-2}}", "}^{-2}")

    return (
        say(n, gold),
        rng.choice([say(n, rng.choice(right)), str(n)]),
        rng.choice([say(n, rng.choice(wrong)), say(other(rng, n), rng.choice(right)), str(other(rng, n))]),
    )


def percents(rng: random.Random) -> Pair:
    n = rng.randint(2, 99)
    right, wrong = [f"{n}", f"{n}\\%", f"{n}\\text{{ percent}}", f"{n / 100}", f"\\frac{{{n}}}{{100}}"], [
        f"{other(rng, n)}\\%", f"{n}00", f"{n / 10000}", f"{n / 100}\\%", f"\\${n}", f"{n}\\text{{ cm}}",
    ]  # fmt: skip
    return f"{n}\\%", rng.choice(right), rng.choice(wrong)


def spellings(rng: random.Random) -> Pair:
    """Doubled backslashes, and numbers in brackets inside bold text."""
    p, q = rng.sample([2, 3, 5, 7, 11, 13], 2)
    return rng.choice([
        (f"\\frac{{{p}}}{{{q}}}", f"\\\\frac{{{p}}}{{{q}}}", f"\\\\frac{{{q}}}{{{p}}}"),
        (f"{p}\\sqrt{{{q}}}", f"{p}\\\\sqrt{{{q}}}", f"{q}\\\\sqrt{{{p}}}"),
        (f"{p}{q}", f"\\textbf{{(0{p}{q})}}", f"\\textbf{{(0{q}{p})}}"),
        (f"{p}{q}", f"\\text{{({p}{q})}}", f"\\text{{(-{p}{q})}}"),
        (f"e^{{{p}}}+{q}", f"{q}+exp({p})", f"{p}+exp({q})"),
        (f"{p}", f"i={p}", f"i={p}i"),
        (f"({p},{q})or({q},{p})", f"({q},{p}),({p},{q})", f"({q},{p}),({q},{p})"),
        (f"x={p},y={q};x={q},y=1", f"({p},{q}),({q},1)", f"({q},{p}),({q},1)"),
        (f"S_1:S_2={p}:{q}", f"{p}:{q}", f"{q}:{p}"),
        (f"{p}\\text{{ ways.}}", f"{p}", f"{q}"),
        (f"0.{p:02} = {p}\\%", f"0.{p:02}", f"0.{q:02}"),
    ])  # fmt: skip


def symbols(rng: random.Random) -> Pair:
    """Letters that computer algebra takes for constants: E, I, gamma, e with an index, d."""
    p, q = rng.sample(range(2, 9), 2)
    s, t = rng.choice(
        [("E_{1}", "E_{2}"), ("I_1", "I_2"), ("\\gamma", "\\beta"), ("e_1", "e_2"), ("d", "g"), ("E", "I")]
    )
    gold = rng.choice([f"{p}{s}+{q}{t}", f"\\frac{{{p}{s}}}{{{q}{t}}}"])
    right = f"{q}{t}+{p}{s}" if "+" in gold else f"\\frac{{{2 * p}{s}}}{{{2 * q}{t}}}"
    return gold, right, rng.choice([gold.replace(s, "x").replace(t, s), gold.replace(str(p), "9"), f"{p}+{q}"])


def large(rng: random.Random) -> Pair:
    n, k = rng.randint(1100, 2400), rng.randint(2, 5)
    return rng.choice([
        (f"2^{{{n}}}", f"2\\cdot2^{{{n - 1}}}", f"2^{{{n + 1}}}"), (f"2^{{{n}}}-1", f"-1+2^{{{n}}}", f"2^{{{n}}}+1"),
        (f"\\frac{{1}}{{{n}!}}", f"\\frac{{1}}{{{n}!}}", f"\\frac{{1}}{{{n - 1}!}}"),
        (f"{k}^{{{n}}}", f"{k}^{{{n}}}", f"{k + 1}^{{{n}}}"),
    ])  # fmt: skip


DAILY = (
    labels, sentences_after, around_the_box, undone, relations, commas, daily_units, compound_units, percents,
    spellings, symbols, large,
)  # fmt: skip
GENERATORS: tuple[Callable[[random.Random], Pair], ...] = (
    integers, sums, factorials, fractions, decimals, equations, points, roots, plus_minus, intervals, domains,
        expressions,
    lines, derivatives, matrices, units, money, bases, ratios, residues, pieces, hedges,
)  # fmt: skip


def completed(answer: str) -> str:
    return (
        answer if re.search(r"\\boxed\{[^{}]*[^{}\\]\}|Answer:", answer) else f"So the answer is $\\boxed{{{answer}}}$."
    )


@pytest.mark.slow
@pytest.mark.parametrize("generators", [GENERATORS, DAILY], ids=["kinds of values", "daily formats"])
def test_one_change_is_never_paid(generators):
    rng = random.Random(20260103)
    with Verifier(workers=2, timeout_s=5.0, memory_gib=2.0, grader="math") as verifier:
        cases, seen = [], set()
        while len(cases) < PAIRS:
            generator = generators[len(cases) % len(generators)]
            pair = generator(rng)
            if pair in seen and rng.random() < 0.9:
                continue
            seen.add(pair)
            gold, *answers = pair
            tickets = [verifier.submit(completed(answer), gold) for answer in answers]
            cases.append((generator.__name__, *pair, *tickets))
        right = verifier.collect([case[4] for case in cases])
        wrong = verifier.collect([case[5] for case in cases])
    paid = [case[:2] + case[3:4] for case, grade in zip(cases, wrong, strict=True) if grade.correct]
    refused = [case[:3] for case, grade in zip(cases, right, strict=True) if not grade.correct]
    assert not paid, (len(paid), Counter(case[0] for case in paid), paid[:20])
    assert not refused, (len(refused), Counter(case[0] for case in refused), refused[:20])
