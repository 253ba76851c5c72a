"""README and docs: spelling, words, links, commands and quoted code."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from launching import ROOT, TESTS

from configs.schema import Config

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("bandpo", "bench", "configs", "data", "eval", "rewards", "tests", "trainer")
CODE = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))]
CODE = [path for path in CODE if path.name != "test_pages.py"]
# Not the field's terms; the comment has the word to use.
NOWHERE = [
    "anchor",  # old policy
    "sampler",  # rollout engine, rollout log-probs
    "held back|hold back|holds back",  # clipped
    "the road",  # package, code
    "few-sided",  # narrow
    "mended|a line each|within reach",  # fixed; one per line; reachable
]
NOT_IN_PAGES = [
    "told",  # printed, logged; significantly different
    "tells|asks",  # raises, returns, prints, requests
    "anew",  # again; retry, reset, rebuild
    "beside",  # next to, with
    "whatever|nobody",  # name the condition or the actor
    "mend|mended",  # fix
    "mistake|mistakes",  # invalid config or data
    "accident|accidents",  # failure
    "room|road",  # memory, bounds; package
    "so many|made of|as it is",  # N; consists of; unchanged
    r"\.05|\.5",  # 0.05, 0.5
]


def hits(paths: list[Path], words: list[str]) -> list[str]:
    """FILE:LINE: WORD of every whole word that is found."""
    pattern = re.compile(rf"(?<![\w.-])({'|'.join(words)})(?![\w-])", re.IGNORECASE)
    lines = [(path, *row) for path in paths for row in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    return [f"{path.relative_to(ROOT)}:{n}: {m[0]}" for path, n, line in lines for m in pattern.finditer(line)]


def test_banned_words():
    assert hits([*PAGES, *CODE], NOWHERE) == []
    assert hits(PAGES, NOT_IN_PAGES) == []


def test_spelling():
    found = subprocess.run([Path(sys.executable).with_name("codespell")], cwd=ROOT, capture_output=True, text=True)
    assert (found.stdout, found.stderr, found.returncode) == ("", "", 0)


def test_pages_and_figures_that_a_page_names_exist():
    for path, text in [(path, path.read_text(encoding="utf-8")) for path in [*PAGES, *CODE]]:
        missing = [name for name in re.findall(r"\bdocs/\w+\.md\b", text) if not (ROOT / name).is_file()]
        missing += [name for name in re.findall(r"\]\(([^):]+\.\w+)\)", text) if not (path.parent / name).is_file()]
        assert path.suffix == ".py" or not missing, f"{path.name}: {missing}"
        assert not [name for name in missing if name.startswith("docs/")], f"{path.name}: {missing}"
    named = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [path.name for path in (ROOT / "docs" / "figures").iterdir() if f"figures/{path.name}" not in named] == []


def test_modules_that_a_page_names_exist():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"\b(?:bandpo|bench|configs|data|eval|rewards|tests|trainer)/[\w/]+\.py\b", text))
    missing = [name for name in named if not any((ROOT / folder / name).is_file() for folder in (".", "tests"))]
    assert len(named) > 20 and missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_that_a_page_names_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    options = re.findall(r"train\.py[^\n]*", text)
    known = {field.name for field in fields(Config)} | {"config", "help"}
    assert {key for line in options for key in re.findall(r"--(\w+)", line)} <= known
    for module in re.findall(r"python -m ((?:bench|configs|data|eval|rewards)[\w.]*)", text):
        stem = ROOT / module.replace(".", "/")
        assert stem.with_suffix(".py").is_file() or (stem / "__main__.py").is_file(), module
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)) <= {*targets}


def test_the_loss_in_the_readme_is_that_of_train():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = [line.strip() for line in (ROOT / "train.py").read_text(encoding="utf-8").splitlines()]
    places = [code.index(line) for line in block.splitlines()]
    assert len(places) == 6 and places == sorted(places)


def test_options_of_the_quickstart():
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    known = {field.name for field in fields(Config)}
    named = re.findall(r"`(\w+): [^`]*`", text)
    assert len(named) > 10 and set(named) <= known


def test_every_promise_of_the_reliability_page_has_a_test_in_the_file_that_it_names():
    page = (ROOT / "docs" / "reliability.md").read_text().split("## Each fault and its test\n")[1]
    named: dict[str, set[str]] = {}
    for row in re.findall(r"^\| (?!fault)(.+?) \|", page.replace("`", "").replace(r"\|", "|"), re.MULTILINE):
        if row.startswith("**"):
            faults = named.setdefault(row.strip("*"), set())
        else:
            faults.add(row)
    mark = re.compile(r"""^@pytest.mark.promise\(["'](.+)["']\)$""", re.MULTILINE)
    marks = {str(path.relative_to(TESTS)): {*mark.findall(path.read_text())} for path in TESTS.rglob("test_*.py")}
    assert [name for name, faults in named.items() if not faults <= marks[name]] == []
    assert sum(map(len, named.values())) > 50 and set().union(*named.values()) == set().union(*marks.values())
