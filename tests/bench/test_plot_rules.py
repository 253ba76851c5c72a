"""Figures and table of docs/rules.md: up to date, and showing what the rules compute."""

import re
from pathlib import Path

import torch
from launching import ROOT

from bandpo.rule import RULES, check_rule, load_rule
from bench.plot_rules import (
    NOT_DRAWN,
    PROBABILITIES,
    RATIOS,
    bounds,
    draw_bounds,
    draw_rules,
    relative_weights,
    with_list,
)

PAGE = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")


def test_the_table_of_rules_is_up_to_date():
    assert with_list(PAGE) == PAGE, "run: python -m bench.plot_rules --list docs/rules.md"
    assert re.findall(r"^\| \*\*`(\w+)`\*\* .*\| .+ w = .+ \| .+ \|$", PAGE, re.MULTILINE) == [*RULES]


def test_the_examples_of_the_page_are_rules(tmp_path: Path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_rule.py").write_text("\n".join(b for b in blocks if "def " in b))
    names = re.findall(r"def (\w+)\(", "".join(blocks))
    kinds = [check_rule(load_rule(f"{tmp_path / 'my_rule.py'}:{name}", {})) for name in names]
    assert (names, kinds) == (["soft_band"], ["weight"])


def test_every_option_and_figure_that_the_page_names_exists():
    for figure in re.findall(r"\]\((figures/[^)]+)\)", PAGE):
        assert (ROOT / "docs" / figure).is_file()
    assert re.findall(r"--rule_args\.(\w+)", PAGE) == ["delta", "width"] and "delta" in RULES["band"].defaults


def test_relative_weights_by_hand():
    ratios = RATIOS[:, None].expand(len(RATIOS), len(PROBABILITIES))
    possible = ratios * PROBABILITIES < 0.99
    up, down = relative_weights(load_rule("fixed", {}), 1.0), relative_weights(load_rule("fixed", {}), -1.0)
    assert torch.equal((up == 1)[possible], (ratios <= 1.2)[possible])
    assert torch.equal((down == 1)[possible], (ratios >= 0.8)[possible])
    wanted = 1 - PROBABILITIES * (ratios - 1) / 12.5
    torch.testing.assert_close(relative_weights(load_rule("drpo", {}), 1.0)[possible], wanted[possible])


def test_bounds_end_where_probabilities_do():
    p = torch.tensor([0.5, 0.99], dtype=torch.float64)
    lower, upper = bounds("fixed", {}, p)
    assert lower.tolist() == [0.8, 0.8] and upper.tolist() == [1.2, 1 / 0.99]


def test_figures_are_written(tmp_path: Path):
    draw_bounds(tmp_path / "bounds.png")
    draw_rules(["band", "drpo"], tmp_path / "new" / "rules.png")
    for path in (tmp_path / "bounds.png", tmp_path / "new" / "rules.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert RULES.keys() > NOT_DRAWN
