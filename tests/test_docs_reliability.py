"""docs/reliability.md: each row of "Each fault and its test" is the `promise` of a test, and each promise is a row."""

import re

from launching import ROOT, TESTS


def test_every_promise_of_the_page_has_a_test():
    page = (ROOT / "docs" / "reliability.md").read_text()
    section = page.split("## Each fault and its test\n")[1].split("\n## ")[0]
    faults = re.findall(r"^\| (?!\*\*|fault)(.+?) \|", section.replace("`", "").replace(r"\|", "|"), re.MULTILINE)
    tests = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    marks = re.findall(r"""^@pytest.mark.promise\(["'](.+)["']\)$""", tests, re.MULTILINE)
    assert len(faults) > 50 and set(faults) == set(marks)
