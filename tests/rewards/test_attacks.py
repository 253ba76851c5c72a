r"""Answers that were once paid, or nearly so, though they say something else, each beside one that is to be paid."""

import pytest

from rewards import Verifier


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=1, timeout_s=5.0, memory_gib=2.0, grader="math") as shared:
        yield shared


@pytest.mark.parametrize(
    ("gold", "wrong", "right"),
    [
        ("42", ["x\\not=42", "x \\not = 42", "x≠42", "\\not 42", "x=\\not42", "\\lnot(x=42)", "\\cancel{42}"], "x=42"),
        ("42", ["\\text{not }=42", "\\text{cannot be}=42", "\\text{isnt}=42", "\\text{non-}x=42", "\\text{except}=42",
                "\\text{half of it}=42", "\\text{twice the area}=42", "\\text{double}=42"], "\\text{the area}=42"),
        ("42", ["x*x=42", "xx=42", "x\\cdot x=42", "x^2=42", "x+x=42"], "xy=42"),
        ("(1,2)", ["y=1,x=2", "(y,x)=(1,2)", "(y;x)=(1;2)", "y=1\\text{ and }x=2"], "(y;x)=(2;1)"),
        ("(1,2)", ["\\beta=1,\\alpha=2", "(\\beta,\\alpha)=(1,2)"], "\\beta=2,\\alpha=1"),
        ("(1,2)", ["(k,h)=(1,2)", "(f,e)=(1,2)", "(j,i)=(1,2)", "(h,g)=(1,2)"], "k=2,h=1"),
        ("(1,2)", ["x_2=1,x_1=2", "(b,a)=(1,2)"], "(m,b)=(1,2)"),  # no neighbours: as they stand
        ("1011_2", ["1011_x", "1011_{x}", "1011_{\\text{x}}", "1011_{22}", "1011"], "1011_{(2)}"),
        ("42", ["42\\text{ sixteenths}", "42\\text{ billionths}", "42\\text{ reciprocals}", "42 pairs"],
         "42\\text{ students}"),
        ("42", ["42 six sevenths", "42 twenty cats", "42 two cats", "42 thirty seconds"], "42 seconds"),
        ("42", ["42 tuples", "42 quintuples", "42 octuples", "42 quartets", "42 lakhs", "42 grosses"], "42 cats"),
    ],
)  # fmt: skip
@pytest.mark.promise("false positives of earlier versions")
def test_what_says_something_else_is_not_paid(gold, wrong, right, verifier):
    paid = [answer for answer in [*wrong, right] if verifier.grade(f"so $\\boxed{{{answer}}}$", gold).correct]
    assert paid == [right]
