"""Data at the start of a run: prompt formats that the reward reads, the row for the reward."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from configs import load
from configs.schema import Config
from data import PromptBuilder
from data.toy import make_tokenizer
from rewards import math_reward
from trainer.task import Model, read_data

QUESTION = 'Ann has 4 pens and buys 15. Let\'s think step by step and output the final answer after "####".'


def read(tmp_path: Path, rows: list[dict[str, Any]], *argv: str) -> tuple[list[Any], list[str]]:
    """(training rows, printed lines) of a run on these rows without a chat template."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ["--train_data", str(path), "--eval_every", "0", "--prompts_per_step", "4", "--chat_template", "false"]
    cfg, lines = load(Config, [*keys, *argv]), []
    tokenizer = make_tokenizer()
    builder = PromptBuilder(tokenizer, template=cfg.prompt_template, system_prompt="default", chat_template=False)
    model = Model(tokenizer, (), builder, GPT2Config())
    return read_data(cfg, model, lines.append, None)[0], lines


def gsm8k(n: int) -> list[dict[str, Any]]:
    """Rows as verl writes them."""
    turns = [[{"role": "user", "content": f"{i}. {QUESTION}"}] for i in range(n)]
    about = {"reward_model": {"ground_truth": "19"}, "extra_info": {"split": "train"}}
    return [{"prompt": prompt, **about} for prompt in turns]


@pytest.mark.parametrize("template", ["boxed", "boxed_verl", "r1", "r1_zero", "few_shot", "plain"])
def test_a_format_that_answer_line_does_not_read_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(ValueError, match=rf"reward: answer_line reads .*\(got prompt_template {template}\); use"):
        read(tmp_path, gsm8k(4), "--reward", "answer_line", "--prompt_template", template)


def test_formats_that_are_read(tmp_path: Path) -> None:
    rows, lines = read(tmp_path, gsm8k(4), "--reward", "answer_line")
    assert len(rows) == 4
    assert any("4 problems ask for an answer format themselves" in line for line in lines)
    for template in ("plain", "r1_zero"):
        assert len(read(tmp_path, gsm8k(4), "--prompt_template", template)[0]) == 4
    for response in (" ... </think> <answer> 19 </answer>", "4 + 15 = 19\n#### 19", "Answer: 19", r"\boxed{19}"):
        assert math_reward(response, "19").correct, response


def test_a_reward_of_the_users_receives_the_row(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(completion, gold, problem): return len(problem['row']['prompt'])")
    rows, _ = read(tmp_path, gsm8k(4), "--reward", f"{tmp_path / 'mine.py'}:reward")
    assert [problem.row for problem, _ in rows] == gsm8k(4)
    assert [problem.row for problem, _ in read(tmp_path, gsm8k(4))[0]] == [{}] * 4
