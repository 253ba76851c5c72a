"""On-policy distillation: the policy approaches its teacher without any reward, and unfit teachers are refused."""

from pathlib import Path

import pytest
import torch
from launching import metrics, trained_here
from tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import train


def arguments(model: str, teacher: Path, out: Path, *more: object) -> list[str]:
    (out / "none.py").write_text("def score(completion, gold):\n    return 0.0\n")
    words = f"--model {model} --teacher {teacher} --reward {out}/none.py:score --output_dir {out} --run_name run"
    words += " --prompts_per_step 16 --samples_per_prompt 32 --save_every 0 --eval_every 0"
    words += " --wandb disabled --verifier_workers 1"
    return [*words.split(), *map(str, more)]


@pytest.mark.slow
def test_the_policy_approaches_its_teacher(toy_model: str, tmp_path: Path):
    """All rewards are equal, so every gradient comes from the teacher: the start model with noise on its weights."""
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(toy_model).save_pretrained(tmp_path / "teacher")
    keys = ["--max_steps", 12, "--lr", 3e-4, "--temperature", 1.5, "--minibatches", 1, "--epochs", 1]
    trained_here("demo_band", *arguments(toy_model, tmp_path / "teacher", tmp_path, *keys))
    rows = metrics(tmp_path / "run")
    assert all(row["reward/zero_std"] == 1 for row in rows)
    gaps = [row["kl/teacher"] for row in rows]
    assert 0 < sum(gaps[-6:]) / 6 < 0.75 * sum(gaps[:2]) / 2


def test_a_teacher_with_another_tokenizer_is_refused(
    toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = make_model(tmp_path / "teacher", tied=True)
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    with pytest.raises(SystemExit) as ended:
        train.main(["--config", "demo_band", *arguments(toy_model, other, tmp_path)])
    assert ended.value.code == 2
    assert "teacher: its tokenizer differs" in capsys.readouterr().err
