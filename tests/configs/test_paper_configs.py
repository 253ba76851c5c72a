"""The paper's runs in configs/: their values, what differs between them, the check command, and the user's line."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import ACCELERATE, ONE_PROCESS, ROOT, metrics, trained
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import configs.__main__ as checker
import configs.memory as estimates
import train
from configs import diff, load
from configs.names import config_names
from configs.schema import Config
from trainer.start import sequences_at_once

FOLDER = ROOT / "configs"
MODELS = {
    "qwen3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen7b": "Qwen/Qwen2.5-7B-Instruct",
    "llama8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "qwen1.5b_distill": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "qwen7b_distill": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "llama8b_distill": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}
# What each method changes in the main run: Band (KL), delta 0.05, cap 10, clip_low and clip_high 0.2.
METHODS: dict[str, dict[str, object]] = {
    "band": {},
    "band_tv": {"divergence": "tv"},
    "band_chi2": {"divergence": "chi2"},
    "band_relaxed": {"clip": "band_relaxed", "clip_high": 0.28},
    "grpo": {"clip": "fixed"},
    "clip_higher": {"clip": "fixed", "clip_high": 0.28},
    "dcpo": {"clip": "dcpo", "clip_low": 0.16},
    "noclip": {"clip": "none"},
    "dapo": {
        **{"clip": "fixed", "clip_high": 0.28, "loss_aggregation": "token-mean", "kl_coef": 0.0},
        **{"dynamic_sampling": True, "max_response_tokens": 4096 + 512, "overlong_buffer_tokens": 512},
        **{"weight_decay": 0.1, "lr_warmup_steps": 10, "max_steps": 2040, "max_epochs": 20.0},
    },
}
ALONE = {"dual_clip": None}
TO_SAMPLER = {**ALONE, "old_policy": "sampler"}
METHODS |= {
    **{
        rule: {"rule": rule, **ALONE}
        for rule in ("ripo", "bapo", "abc", "up", "sapo", "gppo", "ce_gppo", "cfpo", "pspo")
    },
    **{rule: {"rule": rule, **ALONE} for rule in ("clip_cov", "kl_cov", "gec", "acpo", "mhpo", "dgpo")},
    **{rule: {"rule": rule, **TO_SAMPLER} for rule in ("dppo_tv", "dppo_kl", "cppo", "drpo", "m2po")},
    "atr": {"rule": "atr", "rule_parameters": {"delta": 0.02}, **ALONE},
    "band_asymmetric": {
        **{"rule": "band_asymmetric", "rule_parameters": {"delta_low": 0.05, "delta_high": 0.1}, **ALONE}
    },
    "cispo": {"surrogate": "cispo", "clip": "fixed", "clip_low": 1.0, "clip_high": 2.0, **ALONE},
    "gspo": {"surrogate": "gspo", "clip": "fixed", "clip_low": 3e-4, "clip_high": 4e-4, **ALONE},
    "maxrl": {"advantage": "maxrl", "clip": "fixed", "reward_wrong": 0.0},
}
NAMES = {"paper", "demo_band", "demo_grpo", "qwen0.5b_band_1gpu", *MODELS}
NAMES |= {f"{model}_{method}" for model in MODELS for method in METHODS}
# The main run, written down from the published scripts apart from the YAML files.
PAPER = {
    **{"train_data": ["dapo_math_17k_processed", "math_train_l3_5"], "eval_data": ["aime24", "aime25", "amc23"]},
    **{"prompt_template": "dapo", "system_prompt": "default", "chat_template": True, "reward": "answer_line"},
    **{"max_prompt_tokens": 1024, "max_response_tokens": 4096, "prompts_per_step": 256, "samples_per_prompt": 16},
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "dynamic_sampling": False, "overlong_buffer_tokens": 0},
    **{"reward_right": 1.0, "reward_wrong": -1.0, "reward_format": 0.0},
    **{"clip": "band", "divergence": "kl", "delta": 0.05, "delta_schedule": "constant", "radius": "constant"},
    **{"ratio_cap": 10.0, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 10.0, "surrogate": "ppo"},
    **{"advantage": "group_std", "loss_aggregation": "seq-mean-token-mean", "kl_coef": 0.001, "kl_estimator": "k3"},
    **{"old_policy": "trainer", "mismatch_correction": "none", "updates_per_step": 4, "epochs_per_step": 1},
    **{"lr": 1e-6, "lr_warmup_steps": 0, "lr_schedule": "constant", "weight_decay": 0.01, "grad_clip": 1.0},
    **{"adam_beta1": 0.9, "adam_beta2": 0.999, "max_steps": 1020, "tensor_parallel": 1, "sharding": "fsdp2"},
    **{"eval_every": 5, "eval_samples": 32, "save_every": 10, "precision": "auto"},
}


def read(name: str) -> Config:
    return load(Config, ["--config", str(FOLDER / f"{name}.yaml")])


def changes(name: str, base: str) -> dict[str, object]:
    """What a run changes of another: key -> value, its name aside (it must be the run's)."""
    cfg = read(name)
    assert cfg.run_name == name
    both = diff(vars(read(base)), cfg)
    return {key: new for key, (_, new) in both.items() if key != "run_name"}


# ---- values ----


def test_the_base_file_is_the_papers_main_run():
    cfg = vars(read("paper"))
    assert {key: cfg[key] for key in PAPER} == PAPER
    assert cfg["model"] == MODELS["qwen3b"]


def test_the_defaults_are_those_of_the_main_run_but_for_the_grader():
    assert diff(vars(Config()), read("paper")) == {"run_name": ("run", "paper"), "reward": ("math", "answer_line")}


def test_every_value_of_the_base_file_names_its_source():
    lines = [line for line in (FOLDER / "paper.yaml").read_text().splitlines() if re.match(r"\w+:", line)]
    unsourced = [line for line in lines if not re.search(r"# \[[SDO]\]", line)]
    assert [line.partition(":")[0] for line in unsourced] == ["run_name", "model"]


@pytest.mark.parametrize("model", MODELS)
def test_a_model_changes_the_model_alone(model: str):
    changed = changes(model, "paper")
    assert read(model).model == MODELS[model]
    assert changed.keys() <= {"model"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_the_same_keys_of_every_model(model: str, method: str):
    assert changes(f"{model}_{method}", model) == METHODS[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_file_holds_the_method_and_nothing_of_a_model(method: str):
    keys = yaml.safe_load((FOLDER / "methods" / f"{method}.yaml").read_text()).keys()
    assert METHODS[method].keys() <= keys and not {"inherit", "model", "run_name"} & keys


def test_the_small_run_keeps_the_papers_objective():
    cfg = read("qwen0.5b_band_1gpu")
    objective = ["clip", "divergence", "delta", "ratio_cap", "dual_clip", "surrogate", "advantage", "loss_aggregation"]
    objective += ["kl_coef", "kl_estimator", "updates_per_step", "epochs_per_step", "lr", "temperature"]
    assert all(getattr(cfg, key) == PAPER[key] for key in objective)
    assert cfg.sharding == "none"


def test_no_file_is_left_over():
    assert set(config_names()) == NAMES


# ---- python -m configs --check ----


@pytest.mark.slow
def test_check_prints_every_file_once_and_its_arithmetic(capsys: pytest.CaptureFixture[str]):
    assert checker.main(["--check"]) == 0
    out = capsys.readouterr().out
    listed = [word.strip(",") for line in out.splitlines() if line.startswith("     ") for word in line.split()]
    assert sorted(listed) == sorted(NAMES)
    # 256 prompts x 16 samples in 4 minibatches of 1,024 sequences, 128 of them on each of 8 ranks.
    assert re.search(r"^ +8 +256 x 16 +4 x 1,024 +128 +1,020 .* 3\.09B", out, re.MULTILINE)
    assert re.search(r"^ +1 +64 x 8 +4 x 128 +128 +232 .* 0\.49B .* 24$", out, re.MULTILINE)


def test_check_ends_with_2_and_the_line_of_the_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wrong, odd, good = tmp_path / "wrong.yaml", tmp_path / "odd.yaml", tmp_path / "good.yaml"
    wrong.write_text("inherit: qwen3b.yaml\ndleta: 0.1\n")
    odd.write_text("inherit: qwen3b.yaml\nprompts_per_step: 100\n")  # 4 minibatches on 8 ranks
    good.write_text("inherit: qwen3b.yaml\n")
    assert checker.main(["--check", str(wrong), str(odd), str(good)]) == 2
    shown = capsys.readouterr()
    assert "good" in shown.out and "wrong" not in shown.out
    assert "wrong.yaml line 2: 'dleta'" in shown.err and "odd.yaml: prompts_per_step: 100" in shown.err
    assert "use 128" in shown.err
    assert checker.main(["--check", str(good)]) == 0


def test_check_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "x")  # of a launch that this is not
    assert checker.load_on("qwen3b_band", 8)[1].processes == 8
    assert (os.environ["WORLD_SIZE"], os.environ["RANK"]) == ("3", "x")


@pytest.mark.parametrize("processes", ["0", "-1", "x"])
def test_check_wants_a_number_of_processes(processes: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        checker.main(["--check", "qwen3b_band", f"--processes={processes}"])
    assert stopped.value.code == 2
    assert f"--processes: '{processes}' is not a whole number from 1" in capsys.readouterr().err


@pytest.mark.slow
def test_list_shows_methods_by_models_and_what_every_file_is(capsys: pytest.CaptureFixture[str]):
    assert checker.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == sorted(MODELS)
    table = dict(line.split(maxsplit=1) for line in lines[3 : 3 + len(METHODS)])
    assert table.keys() == METHODS.keys()
    assert table["band"].split() == ["48", "48", "24", "24", "48", "48"]  # the cards of docs/configs.md
    told = {line.split()[0]: line for line in lines[3 + len(METHODS) :] if line}
    assert {*MODELS, *METHODS, "paper", "demo_band", "demo_grpo", "qwen0.5b_band_1gpu"} <= told.keys()
    assert told["band"].endswith("Band, KL divergence: the paper's method")


@pytest.mark.parametrize("name", estimates.MODELS)
def test_sizes_against_the_models_that_transformers_builds(name: str):
    size = estimates.MODELS[name]
    kind = LlamaConfig if "llama" in name.lower() else Qwen2Config
    config = kind(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=size.tied,
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    assert size.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-3)


def test_memory_worked_by_hand():
    """Qwen2.5-3B on 8 GPUs: 3.0857 B parameters, a layer of 77.07 M, embedding (tied) 311.2 M."""
    memory = estimates.estimate(read("qwen3b"), estimates.MODELS[MODELS["qwen3b"]], 8)
    assert memory.states * 2**30 == pytest.approx(12 * 3.0857e9 / 8, rel=1e-3)
    update = 12 * 3.0857e9 / 8 + 4 * 3.0857e9 / 8  # states and gradients
    update += 2 * 2 * (2 * 77.07e6 + 311.2e6)  # gathered in bfloat16, and gradients
    update += 2 * 16384 * 2048 * 36 + 2 * 16384 * (12 * 2048 + 2 * 256 + 4 * 11008)  # activations
    update += 8 * 1024 * 151936 + 8 * 151936 * 2048  # logits, head
    assert memory.update * 2**30 == pytest.approx(update, rel=1e-3)
    assert memory.beside_engine * 2**30 == pytest.approx(12 * 3.0857e9 / 8 + 6 * 151936 * 2048, rel=1e-3)
    assert memory.engine_least * 2**30 == pytest.approx(2 * 3.0857e9 + 16 * 5120 * 4 * 256 * 36, rel=1e-3)


def test_sequences_at_once_worked_by_hand():
    """Qwen2.5-3B: 6.171 GB in bfloat16, 36,864 bytes of keys and values a token, 2,560 tokens to half the longest."""
    cfg, size = read("qwen3b"), estimates.MODELS[MODELS["qwen3b"]]

    def at_once(wanted: int, gib: float | None, **changed: object) -> int:
        changed_cfg = dataclasses.replace(cfg, **changed)  # type: ignore[arg-type]
        device = None if gib is None else gib * 2**30
        return sequences_at_once(changed_cfg, size, wanted=wanted, bytes_per_number=2, device_bytes=device)

    room = (0.6 * 80 * 2**30 - 6.1714e9) / (36_864 * 2_560)  # 480.7
    assert at_once(10**6, 80) == int(room) == 480
    assert at_once(512, 80) == 480 and at_once(64, 80) == 64  # no more than a rank asks for
    assert at_once(10**6, 80, tensor_parallel=2) == 1024 and at_once(10**6, 80, engine="hf") == 256  # the most
    assert at_once(512, None, engine_cpu_cache_gib=1.0) == int(2**30 / (36_864 * 2_560)) == 11
    assert at_once(512, 8) == 1  # no room at all: the engine says so when it starts


def test_memory_follows_what_is_cut_and_what_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "8")

    def memory(*overrides: str) -> estimates.Memory:
        argv = ["--config", str(FOLDER / "qwen3b.yaml"), *overrides]
        return estimates.estimate(load(Config, argv), estimates.MODELS[MODELS["qwen3b"]], 8)

    base = memory()
    assert memory("--sharding", "ddp").states == pytest.approx(8 * base.states)
    assert memory("--reference_offload=false").states == pytest.approx(base.states * 16 / 12)
    assert memory("--reference_offload=false", "--kl_coef=0").states == base.states
    assert memory("--gradient_checkpointing=false").update > base.update + 30
    assert memory("--micro_batch_tokens=8192").update < base.update < memory("--precision=float32").update
    assert memory("--sharding", "ddp").card == 141  # 36.6 GiB beside an engine of 0.6 * 80 GiB do not fit into 80
    assert memory("--engine_memory_share=0.2").card == 48  # the engine's 8.6 GiB are more than 0.2 * 40 GiB
    assert memory("--micro_batch_tokens=1000000").card is None


def test_the_page_of_runs_names_every_model_with_its_card_and_every_method():
    page = (ROOT / "docs" / "configs.md").read_text()
    cards = dict(re.findall(r"^\| `(\S+)` \|.* (\d+) GiB \|$", page, re.MULTILINE))
    assert cards.keys() == {*MODELS, "qwen0.5b_band_1gpu"}
    for name, card in cards.items():
        for run in [name, *(f"{name}_{method}" for method in METHODS if name in MODELS)]:
            cfg = read(run)
            memory = estimates.estimate(cfg, estimates.MODELS[cfg.model], 1 if cfg.sharding == "none" else 8)
            assert memory.card == int(card), run
    assert set(METHODS) <= set(re.findall(r"`(\w+)`", page.partition("| method |")[2]))


# ---- the user's line ----

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ +-*/=()[]{}<>.,:;?!_\\$\"'\n"
CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 60 thousand parameters, one token a character, a chat template that writes a system turn, and a
    head with more rows than the tokenizer, as Qwen2.5 has."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("chat_model")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32: vLLM's CPU kernels take no smaller ones
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=special.index("<|im_end|>"),
        pad_token_id=special.index("<|endoftext|>"),
    )
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Local files of training and evaluation problems."""
    folder = tmp_path_factory.mktemp("sums")
    for name, first, rows in (("sums", 0, 40), ("held_out", 100, 4)):
        lines = [json.dumps({"problem": f"{i} + 7", "answer": str(i + 7)}) for i in range(first, first + rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder / "sums.jsonl", folder / "held_out.jsonl"


@pytest.mark.slow
def test_the_users_line_trains_a_local_model_on_local_data(chat_model: Path, sums: tuple[Path, Path], tmp_path: Path):
    """Sharded, vLLM, reference policy, chat template: what eight GPUs run, smaller."""
    grader = tmp_path / "grader.py"  # a random model never answers right; this one rewards it half the time
    grader.write_text("def score(completion, gold):\n    return sum(map(str.isalpha, completion)) % 2\n")
    overrides = {
        **{"model": chat_model, "train_data": sums[0], "eval_data": sums[1], "output_dir": tmp_path / "runs"},
        **{"reward": f"{grader}:score", "max_steps": 2, "prompts_per_step": 8, "samples_per_prompt": 4},
        **{"max_prompt_tokens": 512, "max_response_tokens": 16, "micro_batch_tokens": 2048, "eval_samples": 2},
        **{"engine_max_sequences": 32, "verifier_workers": 1, "wandb": "disabled"},
    }
    trained("qwen3b_band.yaml", *(word for key, value in overrides.items() for word in (f"--{key}", value)))

    run = tmp_path / "runs" / "qwen3b_band"
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all("eval/held_out/mean@2" in rows[step] for step in (0, 2))
    for row in rows[1:]:
        assert row["mismatch/max"] < 1e-3  # the engine samples from the policy that is trained
        assert 4 < row["train/entropy"] < math.log(len(CHARACTERS) + 3)  # rows beyond the tokenizer hold no mass
        assert row["optim/grad_norm"] > 0 and row["optim/lr"] == 1e-6 and row["train/delta"] == 0.05
        assert -1 < row["reward/mean"] < 1 and row["ratio/max"] > 1
        assert 1 <= row["response/length_mean"] <= 16
        assert 0 <= row["band/lower_mean"] < 1 < row["band/upper_mean"] <= 10
    # Nothing but the overrides differs from the file.
    used = yaml.safe_load((run / "config.yaml").read_text())
    assert diff(used, read("qwen3b_band")).keys() == overrides.keys()
    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_000002" / "policy")


NO_HUB = {
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HUB_OFFLINE": "0",
    "OMP_NUM_THREADS": "1",
}  # a port nobody listens on


def refusal(tmp_path: Path, launcher: list[str], *overrides: object) -> tuple[int, list[str]]:
    """(exit code, error lines) of a launch without a hub; a hub that is waited for would exceed the time limit."""
    line = [*launcher, "train.py", "--config", "qwen3b_band.yaml", "--output_dir", str(tmp_path / "runs")]
    environment = {**os.environ, **NO_HUB, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [*line, *map(str, overrides)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert not (tmp_path / "runs").exists()
    errors = done.stderr[done.stderr.find("error: ") :]
    return done.returncode, errors.splitlines()


@pytest.mark.slow
def test_without_the_hub_the_users_line_says_how_to_get_the_model(tmp_path: Path):
    code, lines = refusal(tmp_path, [ACCELERATE, "launch", "--quiet", *ONE_PROCESS])
    assert code != 0  # Accelerate's launcher turns every failure into 1
    assert len(lines) == 1
    assert "Qwen/Qwen2.5-3B-Instruct could not be fetched" in lines[0] and "--model DIR" in lines[0]


SHORT = ["--max_prompt_tokens", "512", "--max_response_tokens", "16"]  # within the context of the model made here


@pytest.mark.slow
def test_without_the_hub_a_local_model_leads_to_the_data(tmp_path: Path, chat_model: Path):
    code, lines = refusal(tmp_path, [sys.executable], "--model", chat_model, *SHORT)
    text = "\n".join(lines)
    assert code == 2 and "open-r1/DAPO-Math-17k-Processed" in lines[0]
    assert "python -m data.fetch dapo_math_17k_processed --out DIR" in text
    assert "dapo_math_17k_processed=DIR/dapo_math_17k_processed.parquet" in text


def test_without_the_hub_local_training_data_leads_to_the_evaluation_sets(
    tmp_path: Path, chat_model: Path, sums: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    argv = ["--config", "qwen3b_band.yaml", "--model", str(chat_model), "--train_data", str(sums[0]), *SHORT]
    with pytest.raises(SystemExit) as stopped:
        train.main([*argv, "--prompts_per_step", "8", "--output_dir", str(tmp_path / "runs")])
    error = capsys.readouterr().err.partition("error: ")[2]
    assert stopped.value.code == 2 and not (tmp_path / "runs").exists()
    assert "HuggingFaceH4/aime_2024" in error and "aime24=DIR/aime24.parquet" in error
