"""A user's mistakes: each one clear line and exit code 2, before any model is loaded."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from launching import ROOT
from transformers import AutoConfig, AutoTokenizer, Qwen2Config

import rewards
import train
from configs import load, load_or_exit
from configs.memory import MODELS, Size
from configs.names import stems
from configs.schema import Config
from rewards import check
from trainer.preflight import check_context, engine_error
from trainer.ranks import Ranks
from trainer.task import load_task


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
    (line,) = refused(capsys, toy_model, tmp_path, "--kl_coeff", 0.1)
    assert "kl_coeff: is not an option; did you mean kl_coef?" in line


def test_all_mistakes_at_once(capsys, toy_model, tmp_path):
    lines = refused(capsys, toy_model, tmp_path, "--lr", -1, "--advantage", "grp_std", "--prompts_per_step", 63)
    assert len(lines) == 3
    assert any("(got 63); use 64" in line for line in lines)


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("eval_data", "[]", "eval_data: is empty; name a set or file, or set eval_every 0"),
        ("train_data", "[]", "train_data: is empty; name a set or file"),
        ("eval_data", "[a/test.jsonl, b/test.jsonl]", "a/test.jsonl and b/test.jsonl would both be test"),
        ("eval_data", "[aime24, /data/aime24.parquet]", "aime24 and /data/aime24.parquet would both be aime24"),
        ("sharding", "ddp", "sharding: ddp is for several processes (got 1); use auto or none"),
        ("seed", 2**32, "seed: must be an integer from 0 and at most 4294967295 (got '4294967296')"),
        ("rule_args.dleta", 0.1, "rule_args: 'dleta' is not a parameter of rule band; its parameters: delta (0.05)"),
        ("rule_args.delta", "wide", "rule_args: delta of rule band is not a number (got 'wide')"),
        ("rule", "bnad", "rule: 'bnad' is not known; use FILE.py:FUNCTION, or one of abc, "),
    ],
)
@pytest.mark.promise("two evaluation files of the same name")
@pytest.mark.promise("eval_data: [], sharding: ddp on one process, seed from 2^32, lr: -1")
def test_a_value_that_cannot_be_meant(capsys, toy_model, tmp_path, key: str, value: object, told: str):
    (line,) = refused(capsys, toy_model, tmp_path, f"--{key}", value)
    assert line.startswith(("config error: ", "error: ")) and told in line


def test_sets_of_the_same_file_name_under_names_of_their_own():
    assert load(Config, ["--eval_data", "[aime24=a/test.jsonl, amc23=b/test.jsonl]"])
    assert load(Config, ["--eval_data", "[]", "--eval_every", "0"])


@pytest.mark.parametrize(
    "given, told",
    [
        ({"WORLD_SIZE": "0"}, "environment: WORLD_SIZE: '0' is not an integer from 1; "),
        ({"RANK": "x"}, "environment: RANK: 'x' is not an integer from 0 and below 1, the WORLD_SIZE; "),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "environment: RANK: '2' is not an integer from 0 and below 2, "),
    ],
)
@pytest.mark.promise("WORLD_SIZE=0, RANK=x")
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


def dry_run_lines(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, *overrides: object) -> list[str]:
    """What `train.py --dry_run` prints for an accepted run."""
    argv = ["--config", "demo_band", "--model", model, "--output_dir", str(tmp_path), *map(str, overrides), "--dry_run"]
    assert train.main(argv) == 0
    return capsys.readouterr().out.splitlines()


def test_a_gold_that_does_not_verify_is_dropped_with_a_line(capsys, toy_model, tmp_path, data):
    with data.open("a") as file:
        file.write(json.dumps({"problem": "1+1+1+1=", "gold": r"\frac{1}{"}) + "\n")
    lines = dry_run_lines(capsys, toy_model, tmp_path, "--train_data", data)
    (line,) = [line for line in lines if "dropped: " in line]
    assert line.startswith("train_data: dropped: good/80: gold ") and r"\\frac{1}{" in line
    assert "train_data: 1 problems dropped, whose gold answer does not verify against itself" in lines


def test_a_gold_of_an_evaluation_set_stays_and_counts_as_unsolved(capsys, toy_model, tmp_path, data):
    """mean@k covers the same problems with every reward, as in published results."""
    rows = [{"problem": "1+1+1+2=", "gold": "5"}, {"problem": "1+1+1+1=", "gold": r"\frac{1}{"}]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = tmp_path / "mine.py"
    reward.write_text("def score(completion, gold):\n    return 1.0\n")
    for words in ([], ["--reward", f"{reward}:score"]):
        cfg = load(Config, ["--config", "demo_band", "--model", toy_model, *words])
        cfg = replace(cfg, train_data=str(data), eval_data=str(tmp_path / "held_out.jsonl"))
        lines: list[str] = []
        task = load_task(cfg, lines.append, Ranks(Accelerator(cpu=True)))
        assert [problem.gold for problem, _ in task.evals["held_out"]] == ["5", r"\frac{1}{"]
        assert "eval_data: 1 problems counted as unsolved, whose gold answer does not verify against itself" in lines


@pytest.mark.promise("a 10 MB gold")
def test_a_long_gold_is_named_in_a_short_line(capsys, toy_model, tmp_path, data):
    with data.open("a") as file:
        file.write(json.dumps({"problem": "1+1+1+1=", "gold": "x" * 10_000_000, "id": "i" * 1000}) + "\n")
    (line,) = [x for x in dry_run_lines(capsys, toy_model, tmp_path, "--train_data", data) if "dropped: " in x]
    assert "(1,005 characters): gold 'xxx" in line and "... (10,000,002 characters): over a size limit" in line
    assert len(line) < 1000


@pytest.mark.promise("a gold whose check times out")
def test_a_gold_that_uses_up_its_limits_is_neither_kept_nor_dropped(capsys, toy_model, tmp_path, data, monkeypatch):
    """A faster machine would have kept it."""
    gold = "+".join(f"\\sqrt{{{n}+x^{{{n}}}}}" for n in range(2, 30))  # a third of a second
    with data.open("a") as file:
        file.write(json.dumps({"problem": "1+1+1+1=", "gold": gold}) + "\n")
    with rewards.Verifier(workers=1, timeout_s=0.1, memory_gib=2.0, grader="math") as hurried:
        monkeypatch.setattr(rewards, "_shared_verifier", lambda process: hurried)
        lines = refused(capsys, toy_model, tmp_path, "--train_data", data)
    assert "1 gold answers are too much for the verifier" in lines[0] and "good/80: gold" in lines[1]
    assert lines[1].endswith(": timeout")


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_golds_of_which_none_verifies(capsys, toy_model, tmp_path, dry: list[str]):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"problem": "1+1=", "gold": r"\frac{1}{"}) + "\n")
    lines = refused(capsys, toy_model, tmp_path, "--train_data", tmp_path / "bad.jsonl", *dry)
    assert "none of 1 gold answers verifies against itself" in lines[0] and "bad/0: gold" in lines[1]


def test_prompts_that_are_too_long(capsys, toy_model, tmp_path, data):
    (line,) = refused(capsys, toy_model, tmp_path, "--train_data", data, "--max_prompt_tokens", 4)
    assert "max_prompt_tokens" in line


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.promise("a copy of training problems as evaluation data")
def test_training_problems_that_are_held_out_too_are_counted(capsys, toy_model, tmp_path, data, dry: list[str]):
    """A copy of the training file under another name; the command ends at a mistake that is looked for later."""
    rows = data.read_text().splitlines()
    (tmp_path / "copy.jsonl").write_text("\n".join([*rows[:30], json.dumps({"problem": "9*9*9*9=", "gold": "1"})]))
    keys = ["--train_data", data, "--prompts_per_step", 64, *dry]
    if not dry:
        (tmp_path / "broken.jsonl").write_text("{")
        keys += ["--eval_data", f"[{tmp_path / 'copy.jsonl'}, toy_eval]", "--max_prompt_tokens", 8]
        cfg = load(Config, ["--config", "demo_band", "--model", toy_model, *map(str, keys)])
        load_task(cfg, print, Ranks(Accelerator(cpu=True)))
    else:
        keys += ["--eval_data", tmp_path / "copy.jsonl", "--model", toy_model, "--output_dir", tmp_path]
        assert train.main(["--config", "demo_band", *map(str, keys)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert line == (
        "warning: 30 of the 31 problems of eval_data copy are in train_data too, such as copy/0: their score "
        "measures memorization"
    )


@pytest.mark.promise("problems with control tokens")
def test_control_tokens_in_problems_are_counted(capsys, toy_model, tmp_path, data):
    with data.open("a") as file:
        file.write(json.dumps({"problem": "1+<|endoftext|>1=", "gold": "2"}) + "\n")
    keys = ["--model", toy_model, "--train_data", data, "--output_dir", tmp_path, "--max_prompt_tokens", 20]
    assert train.main(["--config", "demo_band", *map(str, keys), "--dry_run"]) == 0
    assert "1 problems spell control tokens (<|endoftext|>); they are given as plain text" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, told",
    [
        (rb'{"problem": "1+\ud800=", "gold": "1"}', "row 1: 'utf-8' codec can't encode character '\\ud800'"),
        (b'{"a": ' + b"[" * 100_000, "line 1: not JSON (nested too deeply)"),
        (b'{"problem": "\xff", "gold": "1"}', "line 1: not UTF-8 text"),
        (b'{"a": }', "line 1: not JSON (Expecting value)"),
    ],
)
@pytest.mark.promise("a lone surrogate, JSON nested too deeply, non-UTF-8 text, invalid JSON lines")
def test_a_row_that_cannot_be_read(capsys, toy_model, tmp_path, row: bytes, told: str):
    (tmp_path / "mine.jsonl").write_bytes(row)
    (line,) = refused(capsys, toy_model, tmp_path, "--train_data", tmp_path / "mine.jsonl")
    assert f"mine.jsonl, {told}" in line and len(line) < 400


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize("place, told", [("a_file", "a_file is a file"), ("/proc/nowhere", "[Errno")])
@pytest.mark.promise("output_dir cannot be written, or is a file")
def test_an_output_folder_that_cannot_be_written(capsys, toy_model, tmp_path, place: str, told: str, dry: list[str]):
    (tmp_path / "a_file").touch()
    argv = ["--config", "demo_band", "--model", toy_model, "--output_dir", str(tmp_path / place), *dry]
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"error: output_dir: {tmp_path / place}")
    assert told in line and "another output_dir" in line


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.promise("a response longer than the model's context")
def test_a_response_beyond_the_models_context(capsys, toy_model, tmp_path, dry: list[str]):
    keys = ["--max_prompt_tokens", 12, "--micro_batch_tokens", 2048]
    (line,) = refused(capsys, toy_model, tmp_path, "--max_response_tokens", 501, *keys, *dry)
    assert "max_response_tokens: 501 with max_prompt_tokens 12 makes 513 tokens, the context of" in line
    assert "is 512; lower one of the two" in line


def test_a_context_that_a_factor_lengthens():
    fits = load(Config, ["--max_prompt_tokens", "24", "--max_response_tokens", "1000"])
    config = Qwen2Config(max_position_embeddings=512)
    for kind in ("linear", "dynamic"):
        config.rope_parameters = {"rope_type": kind, "factor": 2.0}
        check_context(fits, config)
    for kind in ("yarn", "default"):  # of yarn the longer context is what the configuration says
        config.rope_parameters = {"rope_type": kind, "factor": 2.0}
        with pytest.raises(ValueError, match="makes 1,024 tokens, the context of .* is 512"):
            check_context(fits, config)


@pytest.mark.promise("a KV cache below one sequence")
def test_a_cache_that_does_not_hold_one_sequence(toy_model, monkeypatch):
    """The toy: 2 layers, 64 numbers of keys and of values a token, float32: 1,024 bytes; 8 + 16 tokens a sequence."""
    if torch.cuda.is_available():
        pytest.skip("a GPU has its memory for a cache")
    size, cfg = Size.of(AutoConfig.from_pretrained(toy_model)), load(Config, ["--config", "demo_band"])

    def machine(free: int) -> None:
        total = free + size.parameters * 4
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total))

    machine(24 * 1024)
    assert engine_error(cfg, size) == ""
    machine(24 * 1024 - 1)
    assert engine_error(cfg, size).startswith("max_response_tokens: one sequence of max_prompt_tokens + ")
    assert engine_error(replace(cfg, engine="hf"), size) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CPU build alone breaks them")
def test_experts_need_the_other_engine_on_a_cpu(toy_model):
    size = replace(Size.of(AutoConfig.from_pretrained(toy_model)), experts=4)
    cfg = load(Config, ["--config", "demo_band", "--engine", "vllm"])
    assert engine_error(cfg, size).startswith("engine: vllm cannot sync the weights of experts on a CPU")
    assert engine_error(replace(cfg, engine="hf"), size) == ""


@pytest.mark.parametrize(
    "reward, told, dry",
    [
        ("reward = 3", "reward is not a function but int", ["--dry_run"]),
        ("def reward(completion, gold): return None", "my_reward.py: TypeError: returned NoneType None as score", []),
        ("def reward(completion, gold): return None", "returned NoneType None as score", ["--dry_run"]),
        ("def reward(completion, gold): return gold['a']", "my_reward.py:1: TypeError: string indices", []),
        ("def reward(completion, gold): exit()", "ended in a crash on a synthetic response to toy_train/0", []),
    ],
)
@pytest.mark.promise("a reward that returns no number or raises, before the start")
def test_a_reward_that_gives_no_number(capsys, toy_model, tmp_path, reward: str, told: str, dry: list[str]):
    (tmp_path / "my_reward.py").write_text(reward + "\n")
    (line,) = refused(capsys, toy_model, tmp_path, "--reward", f"{tmp_path}/my_reward.py:reward", *dry)
    assert told in line


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    "rule, told",
    [
        (b"\n1 / 0\n", "my_rule.py:2: ZeroDivisionError: division by zero"),
        (b"import nothing_of_the_kind\n", "my_rule.py:1: ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        (b"raise SystemExit\n", "my_rule.py:1: SystemExit"),
        (b"def rule(ratio:\n", "my_rule.py: SyntaxError: '(' was never closed (my_rule.py, line 1)"),
        (b"a = 1\nb = '\xff'\n", "codec can't decode byte 0xff in position 0: invalid start byte (my_rule.py, line 2)"),
        (b"def rule(ratio):\n    return ratio @ 'x'\n", "my_rule.py:2: TypeError: unsupported operand"),
        (b"def rule(view):\n    return view\n", "'view' is not an input; write `def rule(ratio, advantages, *, "),
    ],
)
@pytest.mark.promise("a rule whose file is invalid, or that raises in the check")
def test_a_rule_of_the_users_that_raises(capsys, toy_model, tmp_path, rule: bytes, told: str, dry: list[str]):
    (tmp_path / "my_rule.py").write_bytes(rule)
    (line,) = refused(capsys, toy_model, tmp_path, "--rule", f"{tmp_path}/my_rule.py:rule", *dry)
    assert line.startswith("error: rule: ") and told in line


def test_a_reward_is_tried_with_all_that_it_asks_for(capsys, toy_model, tmp_path):
    (tmp_path / "my_reward.py").write_text(
        "def reward(completion, gold, problem, prompt, response_tokens, truncated):\n"
        "    assert completion == '\\\\boxed{' + gold + '}'\n"
        "    assert problem['problem'] == prompt and problem['gold'] == gold\n"
        "    return {'score': 1, 'tokens': response_tokens, 'cut': truncated}\n"
    )
    argv = ["--config", "demo_band", "--model", toy_model, "--reward", f"{tmp_path}/my_reward.py:reward", "--dry_run"]
    assert train.main([*argv, "--output_dir", str(tmp_path)]) == 0


def edited(model: str, folder: Path, file: str, **values: object) -> str:
    """A copy of a model with other values in one of its JSON files."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize(
    "file, values, told",
    [
        ("config.json", {"eos_token_id": "</s>"}, "config.json: Validation error for field 'eos_token_id'"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "generation_config.json: eos_token_id is '</s>'; an id"),
        ("config.json", {"vocab_size": 30}, "embed_tokens.weight has the shape [22, 64] in its file and [30, 64] by"),
        ("config.json", {"hidden_size": 128}, "embed_tokens.weight has the shape [22, 64] in its file and [22, 128]"),
        (
            "config.json",
            {"tie_word_embeddings": False},
            "lacks 1 weights, such as lm_head.weight; download its files again",
        ),
        (
            "config.json",
            {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
            "has 12 weights that config.json does not describe, such as model.layers.1.",
        ),
        ("config.json", {"hidden_act": "none"}, "cannot be loaded (KeyError: 'none')"),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "is quantized (quantization_config in its"),
        ("tokenizer.json", {"added_tokens": 3}, "its tokenizer cannot be read (TypeError: "),
    ],
)
@pytest.mark.promise("a model file without a weight that the model needs")
@pytest.mark.promise("vocab_size or hidden_size that do not fit the weights")
def test_a_model_whose_files_do_not_belong_together(capsys, toy_model, tmp_path, file: str, values: dict, told: str):
    model = edited(toy_model, tmp_path / "model", file, **values)
    (line,) = refused(capsys, model, tmp_path)
    assert told in line and len(line) < 600
    (again,) = refused(capsys, model, tmp_path, "--dry_run")
    assert again == line


def test_a_token_beyond_the_embedding(capsys, toy_model, tmp_path):
    """An added token in the chat template whose row the embedding lacks."""
    model = shutil.copytree(toy_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<begin>"], special_tokens=True)
    tokenizer.chat_template = "<begin>{{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(model)
    for dry in ([], ["--dry_run"]):
        (line,) = refused(capsys, str(model), tmp_path, "--chat_template", "true", "--max_prompt_tokens", 16, *dry)
        assert (
            "have the token '<begin>' with the id 22, and the embedding of" in line and "has 22 rows; resize it" in line
        )


@pytest.mark.slow
def test_variables_of_a_launcher_that_is_gone(tmp_path, toy_model):
    """Some clusters leave them in the environment."""
    argv = ["--config", "demo_band", "--model", toy_model, "--output_dir", str(tmp_path), "--sharding", "ddp"]
    for left in ({}, {"LOCAL_RANK": "0"}):
        environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0", **left}
        line = [sys.executable, "train.py", *argv]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "bytes_left, told",
    [
        (None, "cannot be loaded (OSError: Error no file named model.safetensors, or pytorch_model.bin"),
        (0, "cannot be loaded (SafetensorError: Error while deserializing header"),
        (100, "cannot be loaded (SafetensorError: Error while deserializing header"),
        (-1, "cannot be loaded (SafetensorError: Error while deserializing header"),
    ],
)
@pytest.mark.promise("weights missing or truncated")
def test_weights_that_are_not_whole(capsys, toy_model, tmp_path, bytes_left: int | None, told: str):
    weights = Path(edited(toy_model, tmp_path / "model", "config.json")) / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink() if bytes_left is None else weights.write_bytes(content[:bytes_left])
    (line,) = refused(capsys, str(tmp_path / "model"), tmp_path, "--dry_run")
    assert told in line


@pytest.mark.promise("weights missing or truncated")
def test_a_shard_that_is_not_there(capsys, toy_model, tmp_path):
    model = Path(edited(toy_model, tmp_path / "model", "config.json"))
    (model / "model.safetensors").rename(model / "one.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (line,) = refused(capsys, str(model), tmp_path, "--dry_run")
    assert "two.safetensors" in line and "cannot be loaded (FileNotFoundError: " in line
    index.write_text("{}")
    (line,) = refused(capsys, str(model), tmp_path, "--dry_run")
    assert "cannot be loaded (KeyError: " in line


def test_a_model_that_is_not_there(capsys, tmp_path):
    (line,) = refused(capsys, "Qwen/Qwen2.5-3B-Instruct", tmp_path)
    assert "Qwen/Qwen2.5-3B-Instruct" in line and "--model DIR" in line


def test_an_adapter_is_no_model(capsys, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (line,) = refused(capsys, str(tmp_path), tmp_path)
    assert "has no config.json; merge this adapter into its base model" in line


@pytest.mark.slow
def test_a_closed_pipe_is_no_mistake():
    done = subprocess.run(
        f"{sys.executable} train.py --config demo_band --dry_run | true; exit ${{PIPESTATUS[0]}}",
        cwd=ROOT,
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (141, "")


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
    assert "problems, generated" in out and "memory:  a rank holds" in out and "not checked" not in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [*stems(""), *stems("models")])  # a method needs nothing from outside
def test_a_dry_run_needs_neither_model_nor_hub(capsys, tmp_path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)  # where no demo has left its model
    assert train.main(["--config", name, "--output_dir", str(tmp_path / "runs"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    told = [line.partition("not reachable: ")[2] for line in out.splitlines() if line.startswith("not checked")]
    sets = [line.split(":")[0] for line in told]
    cfg = load(Config, ["--config", name])
    generated = any(name in cfg.train_data for name in ("toy_train", "arith_train"))
    from_hub = [] if generated else [("train_data", cfg.train_data), ("eval_data", cfg.eval_data)]
    assert sets == [
        f"model {cfg.model}",
        *(f"{key} {name}" for key, names in from_hub for name in ([names] if isinstance(names, str) else names)),
    ]
    assert "in all:  " in out and f"run_name: {cfg.run_name}" in out
    assert ("memory:  a rank holds about" in out) == (cfg.model in MODELS)


def test_a_dry_run_finds_mistakes_beside_what_is_out_of_reach(capsys, tmp_path, data):
    """The hub's model and evaluation sets are out of reach; the training file, which is not, is too small."""
    keys = ["--eval_data", "aime24", "--train_data", data, "--prompts_per_step", 128, "--dry_run"]
    (line,) = refused(capsys, "Qwen/Qwen2.5-3B-Instruct", tmp_path, *keys)
    assert "prompts_per_step: 128 is more than the 80 usable problems" in line


def test_a_kernel_that_is_not_installed(capsys, toy_model, tmp_path):
    package = "flash_attn_interface"
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    keys = ["--attention", "flash_attention_3", "--precision", "bfloat16"]
    (line,) = refused(capsys, toy_model, tmp_path, *keys)
    assert f"attention: flash_attention_3 needs the package {package}" in line and "install it" in line


@pytest.mark.parametrize(
    "text, options, told",
    [
        ("[" * 100_000, [], "line 1: not JSON (maximum recursion depth exceeded"),
        ("{", [], "line 1: not JSON (Expecting property name"),
        ("[1]", [], "line 1: completion and gold must be texts, and expected a bool"),
        ('{"completion": 1, "gold": "1", "expected": true}', [], "line 1: completion and gold must be texts"),
        ('{"completion": "1", "gold": "1", "expected": "false"}', [], "line 1: completion and gold must be texts"),
        ("", ["--workers", "0"], "workers: must be above 0"),
        ("", ["--grader", "maths"], "grader='maths': allowed are"),
        ('{"completion": "1", "gold": "1", "expected": true}', ["--grader", "{folder}/mine.py:long"], "long"),
    ],
)
def test_labelled_answers_that_cannot_be_graded(capsys, tmp_path, text: str, options: list[str], told: str):
    (tmp_path / "cases.jsonl").write_text(text)
    (tmp_path / "mine.py").write_text("def long(completion, gold, response_tokens):\n    return response_tokens\n")
    options = [option.replace("{folder}", str(tmp_path)) for option in options]
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
    assert "driver: too old for CUDA 13 (got 550.54.15); install 580 or later" in done.stdout
