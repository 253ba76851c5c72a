"""docs/reliability.md: each row of "Each fault and its test" names tests, and they are there."""

import re

from launching import ROOT, TESTS


def test_every_test_that_the_page_names_is_there():
    page = (ROOT / "docs" / "reliability.md").read_text()
    section = page.split("## Each fault and its test\n")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines()[2:] if row.startswith("| ") and not row.startswith(("| **", "| fault"))]
    named = [re.findall(r"`([\w/]+\.py)::(test_\w+)`", row) for row in rows]
    assert len(rows) > 50 and all(named)
    for file, name in {each for row in named for each in row}:
        assert f"\ndef {name}(" in (TESTS / file).read_text(), f"{file}::{name}"
