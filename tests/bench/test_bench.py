"""Figures and list of docs/rules.md are up to date; the timing of a step counts what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT

from bandpo.rule import RULES, check_rule, load_rule
from bench.plot_rules import (
    FIRST,
    LAST,
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


def test_the_list_of_rules_is_up_to_date():
    assert with_list(PAGE) == PAGE, "run: python -m bench.plot_rules --list docs/rules.md"
    items = [" ".join(item.split()) for item in PAGE.partition(FIRST)[2].partition(LAST)[0].split("\n- ")]
    names = [re.match(r"(?:- )?\*\*`(\w+)`\*\*.*: .+ w = .+\. \[.+\]$", item) for item in items]
    assert [name and name[1] for name in names] == [*RULES]


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


@pytest.mark.slow
def test_a_step_of_fixed_lengths_has_the_tokens_it_says(tmp_path: Path):
    words = "--size 1m --prompts 4 --samples 2 --tokens 32 --prompt_tokens 20 --steps 1 --engine hf".split()
    line = [sys.executable, "-m", "bench.step", *words, "--model", str(tmp_path / "model")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tokens_per_step"] == 4 * 2 * 32 and result["real_token_share"] == 1
    assert 0 < result["outside_share"] < 1
    assert 0 < result["backward_s"] < result["update_s"] and 0 < result["forward_s"]
    # Four updates of one prompt with two responses, which share it.
    shared, own = 20, 31
    flop = 6 * result["parameters"] * 4 * (shared + 2 * own)
    assert result["update_tflops"] * result["update_s"] * 1e12 == pytest.approx(flop, rel=0.05)
