"""The strict rule to the letter: hand-made pairs, each with the step of the rule that decides it."""

import pytest

from rewards import Grade, Verifier, answer_line_reward

PAIRS = [  # completion, gold, paid, the reason
    # Finding the answer: the last "Answer:" of the last 300 characters, to the end of its line.
    ("Answer: 42", "42", True, "the plain form"),
    ("ANSWER : 42", "42", True, "any case, a blank before the colon"),
    ("Answer:\n42", "42", True, "white space after the colon includes a line's end"),
    ("Answer: 42\nDone.", "42", True, "the answer ends with its line"),
    ("Answer: 41\nAnswer: 42", "42", True, "the last label counts"),
    ("Answer: 42\nAnswer: 41", "42", False, "the last label counts"),
    ("The answer: 42", "42", True, "the label may stand in a sentence"),
    ("\\boxed{42}", "42", False, "a box without a label is no answer"),
    ("The answer is 42", "42", False, "no label"),
    ("Answer: 42" + " " * 300, "42", False, "the label is further back than 300 characters"),
    ("x" * 290 + "Answer: 42", "42", True, "the label is within the last 300 characters"),
    ("**Answer:** 42", "42", False, "stars after the label stay in the answer"),
    ("**Answer: 42**", "42", False, "stars at the end stay in the answer"),
    ("Answer: $$", "", False, "an empty gold is never matched, on purpose"),
    # Everything up to the last "=" goes.
    ("Answer: x = 34", "34", True, "what stands before = goes"),
    ("Answer: 17=42", "42", True, "even if it is false"),
    ("Answer: 42=17", "42", False, "what stands after = is judged"),
    ("Answer: 34", "x = 34", True, "the same on the gold"),
    ("Answer: y=2x+3", "2x+3", True, "a named expression"),
    # Words, blanks and marks that are dropped or replaced.
    ("Answer: 34 units", "34", True, "units is dropped"),
    ("Answer: 42 dollars", "42", True, "dollars is dropped"),
    ("Answer: \\$42", "42", True, "an escaped dollar sign is dropped"),
    ("Answer: 42 apples", "42", False, "apples is no dropped word"),
    ("Answer: 5 square feet", "5", True, "square and feet are dropped"),
    ("Answer: 5\\text{ m}", "5", True, "\\text{m} becomes \\text{}, which is dropped"),
    ("Answer: 5\\text{ cm}^2", "5", True, "cm, then \\text{}^2"),
    ("Answer: 5\\text{ s}", "5", True, "\\text{s} is dropped"),
    ("Answer: 5 ft", "5", False, "ft is no dropped word"),
    ("Answer: 5 minutes", "5", True, "minutes is dropped whole"),
    ("Answer: 60^\\circ", "60", True, "the degree sign is dropped"),
    ("Answer: 60^{\\circ}", "60", True, "and in braces"),
    ("Answer: 60°", "60", False, "the Unicode sign is not"),
    ("Answer: 1\\mbox{ and }2", "1,2", True, "mbox reads as text, and becomes a comma"),
    ("Answer: 1\\text{ and }2", "1,2", True, "and becomes a comma"),
    ("Answer: an apple", "apple", True, "the article goes"),
    ("Answer: (1, 2)", "(1,2)", True, "blanks go"),
    ("Answer: 1\\ 000", "1000", True, "an escaped blank goes"),
    ("Answer: 10{,}000", "10000", True, "{,} goes"),
    ("Answer: 10,\\!000", "10000", True, ",\\! goes"),
    ("Answer: 10\\,000", "10000", False, "\\, stays"),
    ('Answer: "yes"', "yes", True, "quotation marks go"),
    ("Answer: 1,2,\\ldots", "1,2", True, "dots go, then commas between digits"),
    # The first $...$, then text, textbf, overline, each up to its first closing brace.
    ("Answer: $42$", "42", True, "what stands between the first two dollar signs"),
    ("Answer: $42$.", "42", True, "what follows the dollar sign goes"),
    ("Answer: so $42$ or $43$", "42", True, "the first pair of dollar signs counts"),
    ("Answer: $42.$", "42", True, "a full stop before a dollar sign goes"),
    ("Answer: 42.", "42", False, "a full stop elsewhere stays"),
    ("Answer: \\(42\\)", "42", False, "\\( stays"),
    ("Answer: \\text{even}", "even", True, "text is unwrapped"),
    ("Answer: \\textbf{(A)}", "(A)", True, "textbf is unwrapped"),
    ("Answer: 0.\\overline{3}", "0.3", True, "overline is unwrapped"),
    ("Answer: \\mathbf{3}", "3", False, "mathbf is not"),
    ("Answer: \\text{\\textbf{A}}", "A", True, "text ends at the first brace, textbf then at the one left"),
    ("Answer: \\overline{\\frac{1}{2}}", "\\frac{1}{2}", False, "overline ends at the first brace: \\frac{1{2}}"),
    # Then the box, to the last closing brace.
    ("Answer: \\boxed{42}", "42", True, "a box is unwrapped"),
    ("Answer: $\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}", True, "to its last brace"),
    ("Answer: $\\boxed{-\\frac{5}{3}}$", "-\\frac{5}{3}", True, "to its last brace"),
    ("Answer: \\boxed{\\text{even}}", "even", True, "text first, then the box"),
    ("Answer: \\boxed{\\textbf{(B)}}", "(B)", True, "textbf first, then the box"),
    ("Answer: \\boxed{0.\\overline{3}}", "0.3", True, "overline first, then the box"),
    ("Answer: $\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}$", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True,
     "braces inside the box"),
    ("Answer: \\boxed{1} and \\boxed{2}", "1", False, "to the last brace of the line"),
    ("Answer: \\boxed{x^{2}}", "x^{2}", True, "braces inside the box"),
    ("Answer: \\boxed{42", "42", False, "no closing brace"),
    # Short fractions and roots, commas of numbers, and equality of strings.
    ("Answer: \\frac12", "\\frac{1}{2}", True, "a fraction of two tokens gets its braces"),
    ("Answer: \\sqrt3", "\\sqrt{3}", True, "a root of one token gets its braces"),
    ("Answer: \\frac1{72}", "\\frac{1}{72}", False, "the token after 1 is taken to be {"),
    ("Answer: \\dfrac{1}{2}", "\\frac{1}{2}", False, "dfrac is another string"),
    ("Answer: 1,000", "1000", True, "commas of a whole number go"),
    ("Answer: 4,2", "42", True, "wherever they stand"),
    ("Answer: 1,000.5", "1000.5", False, "not those of a decimal"),
    ("Answer: .5", "1/2", False, "strings, not values"),
    ("Answer: 42.0", "42", False, "strings, not values"),
    ("Answer: 25", "025", False, "strings, not values"),
    ("Answer: 3/4", "\\frac{3}{4}", False, "strings, not values"),
    ("Answer: -5", "5", False, "another value"),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "gold", "paid", "reason"), PAIRS)
def test_strict_rule_to_the_letter(completion, gold, paid, reason):
    assert answer_line_reward(completion, gold).correct is paid, reason


def test_strict_rule_reasons():
    assert answer_line_reward("42", "42").reason == "no_answer"
    assert answer_line_reward("Answer: 41", "42") == Grade(False, "41", "mismatch")
    with Verifier(workers=1, timeout_s=1.0, memory_gib=1.0, grader="answer_line") as strict:
        assert strict.grade("Answer: $42$.", "42") == Grade(True, "42", "match")
