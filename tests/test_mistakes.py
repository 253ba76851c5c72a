"""A user's mistakes: each one clear line and exit code 2, before any model is loaded."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

import train
from configs import load, load_or_exit
from configs.memory import MODELS
from configs.names import stems
from configs.schema import Config
from rewards import check

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eighty good problems in the plain schema."""
    path = tmp_path / "good.jsonl"
    path.write_text(
        "".join(json.dumps({"problem": f"{i % 10}+{i // 10}+1-0=", "gold": str(i)}) + "\n" for i in range(80))
    )
    return path


def refused(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, *overrides: object) -> list[str]:
    """The lines that `train.py` prints to stderr when it refuses; a loaded model would have started a run folder."""
    argv = ["--config", "demo_band", "--model", model, "--output_dir", str(tmp_path / "runs"), *map(str, overrides)]
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    assert stopped.value.code == 2
    assert not (tmp_path / "runs").exists()
    return capsys.readouterr().err.strip().splitlines()


def test_a_typo_names_the_nearest_key(capsys, toy_model, tmp_path):
    (line,) = refused(capsys, toy_model, tmp_path, "--dleta", 0.1)
    assert "dleta" in line and "delta" in line


def test_all_mistakes_at_once(capsys, toy_model, tmp_path):
    lines = refused(capsys, toy_model, tmp_path, "--delta", -1, "--clip", "bnad", "--prompts_per_step", 63)
    assert len(lines) == 3
    assert any("prompts_per_step: 63" in line and "use 64" in line for line in lines)


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("eval_data", "[]", "eval_data: names no set to evaluate on; name one, or set eval_every 0"),
        ("train_data", "[]", "train_data: names no set"),
        ("eval_data", "[a/test.jsonl, b/test.jsonl]", "a/test.jsonl and b/test.jsonl would both be test"),
        ("eval_data", "[aime24, /data/aime24.parquet]", "aime24 and /data/aime24.parquet would both be aime24"),
        ("sharding", "ddp", "sharding: ddp is for several processes, one was launched; use none"),
        ("seed", 2**32, "seed: '4294967296' is not a whole number from 0 and up to 4294967295"),
        ("delta", "1e300", "delta: '1e300' is not a number above 0 and up to 1000"),
        ("delta_final", "1e300", "delta_final: '1e300' is not a number above 0 and up to 1000"),
    ],
)
def test_a_value_that_cannot_be_meant(capsys, toy_model, tmp_path, key: str, value: object, told: str):
    (line,) = refused(capsys, toy_model, tmp_path, f"--{key}", value)
    assert line.startswith("config error: ") and told in line


def test_sets_of_the_same_file_name_under_names_of_their_own():
    assert load(Config, ["--eval_data", "[aime24=a/test.jsonl, amc23=b/test.jsonl]"])
    assert load(Config, ["--eval_data", "[]", "--eval_every", "0"])


@pytest.mark.parametrize(
    "given, told",
    [
        ({"WORLD_SIZE": "0"}, "environment: WORLD_SIZE: '0' is not a whole number from 1; "),
        ({"RANK": "x"}, "environment: RANK: 'x' is not a whole number from 0 and below 1, the WORLD_SIZE; "),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "environment: RANK: '2' is not a whole number from 0 and below 2, "),
    ],
)
def test_variables_that_no_launcher_sets(capsys, monkeypatch, given: dict[str, str], told: str):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        load_or_exit(Config, ["--config", "qwen3b_band"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"config error: {told}")


def test_a_missing_file(capsys, toy_model, tmp_path):
    (line,) = refused(capsys, toy_model, tmp_path, "--train_data", tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl" in line


def test_an_empty_set(capsys, toy_model, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    lines = refused(capsys, toy_model, tmp_path, "--train_data", tmp_path / "empty.jsonl")
    assert len(lines) == 1 and "empty.jsonl" in lines[0]


def test_too_few_problems(capsys, toy_model, tmp_path, data):
    (line,) = refused(capsys, toy_model, tmp_path, "--train_data", data, "--prompts_per_step", 128)
    assert "prompts_per_step: 128" in line and "80" in line


def test_too_few_problems_in_a_dry_run(capsys, toy_model, tmp_path, data):
    (line,) = refused(capsys, toy_model, tmp_path, "--train_data", data, "--prompts_per_step", 128, "--dry_run")
    assert "prompts_per_step: 128" in line and "80" in line


def test_a_gold_that_does_not_verify(capsys, toy_model, tmp_path, data):
    with data.open("a") as file:
        file.write(json.dumps({"problem": "1+1+1+1=", "gold": r"\frac{1}{"}) + "\n")
    lines = refused(capsys, toy_model, tmp_path, "--train_data", data, "--bad_gold", "refuse")
    assert "1 of 81 gold answers" in lines[0] and r"\frac{1}{" in "".join(lines)


def test_prompts_that_are_too_long(capsys, toy_model, tmp_path, data):
    (line,) = refused(capsys, toy_model, tmp_path, "--train_data", data, "--max_prompt_tokens", 4)
    assert "max_prompt_tokens" in line


def test_a_model_that_is_not_there(capsys, tmp_path):
    (line,) = refused(capsys, "Qwen/Qwen2.5-3B-Instruct", tmp_path)
    assert "Qwen/Qwen2.5-3B-Instruct" in line and "--model DIR" in line


def test_an_unknown_set_lists_the_known(capsys, toy_model, tmp_path):
    text = "\n".join(refused(capsys, toy_model, tmp_path, "--eval_data", "aime99"))
    assert "aime99" in text and "aime24" in text


def test_a_run_name_cannot_leave_the_output_folder(capsys, toy_model, tmp_path):
    text = "\n".join(refused(capsys, toy_model, tmp_path, "--run_name", "../elsewhere"))
    assert "run_name" in text


def test_a_dry_run_prints_everything_and_loads_nothing(capsys, toy_model, tmp_path):
    argv = ["--config", "demo_band", "--model", toy_model, "--output_dir", str(tmp_path / "runs"), "--dry_run"]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert "64 prompts x 16 samples = 1,024 sequences" in out and "delta: 0.05" in out
    assert "problems, generated" in out and "memory:  a rank holds" in out and "not looked at" not in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [*stems(""), *stems("models")])  # a method needs nothing from outside
def test_a_dry_run_needs_neither_model_nor_hub(capsys, tmp_path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)  # where no demo has left its model
    assert train.main(["--config", name, "--output_dir", str(tmp_path / "runs"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    told = [line.partition("within reach: ")[2] for line in out.splitlines() if line.startswith("not looked at")]
    sets = [line.split(":")[0] for line in told]
    cfg = load(Config, ["--config", name])
    from_hub = [] if "toy_train" in cfg.train_data else [("train_data", cfg.train_data), ("eval_data", cfg.eval_data)]
    assert sets == [
        f"model {cfg.model}",
        *(f"{key} {name}" for key, names in from_hub for name in ([names] if isinstance(names, str) else names)),
    ]
    assert "in all:  " in out and f"run_name: {cfg.run_name}" in out
    assert ("memory:  a rank holds about" in out) == (cfg.model in MODELS)


def test_a_dry_run_finds_mistakes_beside_what_is_out_of_reach(capsys, tmp_path, data):
    """The hub's model and evaluation sets are out of reach; the training file, which is not, has a broken gold."""
    with data.open("a") as file:
        file.write(json.dumps({"problem": "1+1+1+1=", "gold": r"\frac{1}{"}) + "\n")
    model, keys = "Qwen/Qwen2.5-3B-Instruct", ["--reward", "math", "--bad_gold", "refuse", "--dry_run"]
    lines = refused(capsys, model, tmp_path, "--eval_data", "aime24", "--train_data", data, *keys)
    assert "1 of 81 gold answers" in lines[0]


@pytest.mark.parametrize(
    "key, value, package",
    [("attention", "flash_attention_3", "flash_attn_interface"), ("logprob_kernel", "liger", "liger_kernel")],
)
def test_a_kernel_that_is_not_installed(capsys, toy_model, tmp_path, key: str, value: str, package: str):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    (line,) = refused(capsys, toy_model, tmp_path, f"--{key}", value)
    assert f"{key}: {value} needs the package {package}" in line and "install it" in line


@pytest.mark.parametrize(
    "text, options, told",
    [
        ("[" * 100_000, [], "line 1: not JSON (nested too deeply)"),
        ("{", [], "line 1: not JSON (Expecting property name"),
        ("[1]", [], "line 1: not an object"),
        ('{"completion": 1, "gold": "1", "expected": true}', [], "line 1: completion and gold are texts"),
        ('{"completion": "1", "gold": "1", "expected": "false"}', [], "expected is true or false"),
        ("", ["--workers", "0"], "workers=0"),
        ("", ["--grader", "maths"], "grader='maths': allowed are"),
    ],
)
def test_labelled_answers_that_cannot_be_graded(capsys, tmp_path, text: str, options: list[str], told: str):
    (tmp_path / "cases.jsonl").write_text(text)
    assert check.main([str(tmp_path / "cases.jsonl"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line


def test_installing_beside_an_old_driver_is_refused_at_once(tmp_path):
    """A CUDA build of torch that sees no GPU would train on the CPU without a word."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 550.54.15\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = ["make", "install", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and not (tmp_path / "venv").exists()
    assert "NVIDIA driver 550.54.15 is too old" in done.stdout and "install 580 or later" in done.stdout
