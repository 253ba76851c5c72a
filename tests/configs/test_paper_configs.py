"""The paper's runs in configs/: their values, what differs between them, memory, and the user's line."""

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

import configs.memory as estimates
import train
from bandpo import rule
from bandpo.rule import check_rule, load_rule
from configs import diff, load, names
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
SCRIPTS = {"delta": 0.05, "divergence": "kl", "ratio_cap": 10.0}  # the Band of the published scripts
GRPO = {"rule": "fixed", "rule_args": {"low": 0.2, "high": 0.2}}
HIGHER = {"rule": "fixed", "rule_args": {"low": 0.2, "high": 0.28}}
# What each method changes in the main run, which is Band (KL), delta 0.05, cap 10.
METHODS: dict[str, dict[str, object]] = {
    "band": {},
    "band_tv": {"rule_args": {**SCRIPTS, "divergence": "tv"}},
    "band_chi2": {"rule_args": {**SCRIPTS, "divergence": "chi2"}},
    "band_relaxed": {"rule": "band_relaxed", "rule_args": {**SCRIPTS, "low": 0.2, "high": 0.28}},
    "grpo": GRPO,
    "clip_higher": HIGHER,
    "dcpo": {"rule": "dcpo", "rule_args": {"low": 0.16, "high": 0.2, "ratio_cap": 10.0}},
    "noclip": {"rule": "none", "rule_args": {}},
    "dapo": {
        **{**HIGHER, "loss_aggregation": "token-mean", "kl_coef": 0.0, "dynamic_sampling": 10},
        **{"max_response_tokens": 4096 + 512, "overlong_buffer_tokens": 512},
        **{"weight_decay": 0.1, "lr_warmup_steps": 10, "max_steps": 2040},
    },
    "maxrl": {"advantage": "maxrl", **GRPO, "reward_incorrect": 0.0},
}
RULES = "abc acpo band_asymmetric bapo ce_gppo cispo clip_cov dgpo gppo gspo kl_cov ripo sapo up".split()
METHODS |= {rule: {"rule": rule, "rule_args": {}, "dual_clip": None} for rule in RULES}
METHODS |= {
    rule: {"rule": rule, "rule_args": {}, "dual_clip": None, "old_policy": "rollout"}
    for rule in ("dppo_tv", "dppo_kl", "cppo", "drpo", "m2po")
}
NAMES = {"paper", "demo_band", "demo_grpo", "demo_llm_band", "demo_llm_grpo", "qwen0.5b_band_1gpu", *MODELS}
NAMES |= {f"{model}_{method}" for model in MODELS for method in METHODS}
# The main run, written down from the published scripts apart from the YAML files.
PAPER = {
    **{"train_data": ["dapo_math_17k_processed", "math_train_l3_5"], "eval_data": ["aime24", "aime25", "amc23"]},
    **{"prompt_template": "dapo", "system_prompt": "default", "chat_template": True, "reward": "answer_line"},
    **{"max_prompt_tokens": 1024, "max_response_tokens": 4096, "prompts_per_step": 256, "samples_per_prompt": 16},
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "dynamic_sampling": 0, "overlong_buffer_tokens": 0},
    **{"reward_correct": 1.0, "reward_incorrect": -1.0, "rule": "band", "rule_args": SCRIPTS, "dual_clip": 10.0},
    **{"advantage": "group_std", "loss_aggregation": "seq-mean-token-mean", "kl_coef": 0.001, "entropy_coef": 0.0},
    **{"old_policy": "trainer", "tis": "none", "minibatches": 4, "epochs": 1, "off_policy_steps": 0},
    **{"lr": 1e-6, "lr_warmup_steps": 0, "lr_schedule": "constant", "weight_decay": 0.01, "grad_clip": 1.0},
    **{"adam_betas": [0.9, 0.999], "max_steps": 1020, "tensor_parallel": 1, "sharding": "fsdp2"},
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
    """And but for what has the same effect: the rule's parameters are its defaults, fsdp2 is `auto` at this size."""
    assert diff(vars(Config()), read("paper")) == {
        "run_name": ("run", "paper"),
        "reward": ("math", "answer_line"),
        "rule_args": ({}, SCRIPTS),
        "sharding": ("auto", "fsdp2"),
    }
    assert load_rule("band", {}).arguments == SCRIPTS
    assert estimates.sharding_of(Config(), estimates.MODELS[MODELS["qwen3b"]], 8) == "fsdp2"


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


@pytest.mark.parametrize("method", [method for method in METHODS if method not in RULES])
def test_a_methods_file_holds_the_method_and_nothing_of_a_model(method: str):
    keys = yaml.safe_load((FOLDER / "methods" / f"{method}.yaml").read_text()).keys()
    assert METHODS[method].keys() - {"rule_args"} <= keys and not {"inherit", "model", "run_name"} & keys


def test_every_rule_is_a_method_or_needs_no_file_to_be_one():
    """So MODEL_RULE resolves for every rule of the registry."""
    load_rule("band", {})  # fills the registry
    rules, files = set(rule.RULES), set(names.stems("methods"))
    assert set(names.RULES) == rules - files - {"fixed", "none"}
    assert {read(f"qwen3b_{method}").rule for method in ("grpo", "noclip")} == {"fixed", "none"}
    for name in names.RULES:
        cfg = read(f"qwen3b_{name}")
        check_rule(load_rule(cfg.rule, cfg.rule_args))
        assert (cfg.rule, cfg.dual_clip) == (name, None)


@pytest.mark.parametrize("method", METHODS)
def test_the_rule_of_a_method_takes_its_parameters_and_nothing_is_without_effect(method: str):
    cfg = read(f"qwen3b_{method}")
    check_rule(load_rule(cfg.rule, cfg.rule_args))
    assert cfg.warnings() == []


def test_the_small_run_keeps_the_papers_objective():
    cfg = read("qwen0.5b_band_1gpu")
    objective = ["rule", "rule_args", "dual_clip", "advantage", "loss_aggregation", "kl_coef"]
    objective += ["minibatches", "epochs", "lr", "temperature", "old_policy", "tis"]
    assert all(getattr(cfg, key) == PAPER[key] for key in objective)
    assert cfg.sharding == "none"


def test_no_file_is_left_over():
    assert set(config_names()) == NAMES


# ---- python -m configs, memory ----


def test_the_list_names_every_model_method_and_file():
    done = subprocess.run([sys.executable, "-m", "configs"], cwd=ROOT, capture_output=True, text=True, check=True)
    words = {word.strip(",") for line in done.stdout.splitlines()[1:] for word in line.split()}
    assert {*MODELS, *METHODS, "paper", "demo_band", "demo_grpo", "qwen0.5b_band_1gpu"} <= words
    assert "  band               Band, KL divergence: the paper's method\n" in done.stdout


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
    """Qwen2.5-3B: 36,864 bytes of keys and values per token in bfloat16, 2,560 tokens are half the longest sequence."""
    cfg, size = read("qwen3b"), estimates.MODELS[MODELS["qwen3b"]]

    def at_once(wanted: int, cache_bytes: float, **changed: Any) -> int:
        changed_cfg = dataclasses.replace(cfg, **changed)
        return sequences_at_once(changed_cfg, size, wanted=wanted, cache_bytes=cache_bytes, precision="bfloat16")

    room = 0.6 * 80 * 2**30 - 6.1714e9
    assert at_once(10**6, room) == int(room / (36_864 * 2_560)) == 480
    assert at_once(512, room) == 480 and at_once(64, room) == 64  # at most what a rank wants
    assert at_once(10**6, 3 * room) == 1024 and at_once(10**6, 3 * room, engine="hf") == 256  # the most
    assert at_once(512, -1.0) == 1  # no room at all: the engine says so when it starts


def test_memory_follows_what_is_cut_and_what_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "8")

    def memory(*overrides: str) -> estimates.Memory:
        argv = ["--config", str(FOLDER / "qwen3b.yaml"), *overrides]
        return estimates.estimate(load(Config, argv), estimates.MODELS[MODELS["qwen3b"]], 8)

    base = memory()
    assert memory("--sharding", "ddp").states == pytest.approx(8 * base.states)
    assert memory("--sharding", "auto") == base  # above a billion parameters
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
        **{"vllm.max_num_seqs": 32, "verifier_workers": 1, "wandb": "disabled"},
    }
    trained("qwen3b_band.yaml", *(word for key, value in overrides.items() for word in (f"--{key}", value)))

    run = tmp_path / "runs" / "qwen3b_band"
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all("eval/held_out/mean@2" in rows[step] for step in (0, 2))
    for row in rows[1:]:
        assert row["rollout/logprob_diff_max"] < 1e-3  # the engine samples from the policy that is trained
        assert 4 < row["train/entropy"] < math.log(len(CHARACTERS) + 3)  # rows beyond the tokenizer hold no mass
        assert row["optim/grad_norm"] > 0 and row["optim/lr"] == 1e-6 and row["train/delta"] == 0.05
        assert -1 < row["reward/mean"] < 1 and row["ratio/max"] > 1
        assert 1 <= row["response/length_mean"] <= 16
        assert 0 <= row["band/lower_mean"] < 1 < row["band/upper_mean"] <= 10
    # Nothing but the overrides differs from the file.
    used = yaml.safe_load((run / "config.yaml").read_text())
    assert diff(used, read("qwen3b_band")).keys() == {key.partition(".")[0] for key in overrides}
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
    assert "hf download open-r1/DAPO-Math-17k-Processed --repo-type dataset --local-dir DIR" in text
    assert "write   dapo_math_17k_processed=DIR   in place" in text


def test_without_the_hub_local_training_data_leads_to_the_evaluation_sets(
    tmp_path: Path, chat_model: Path, sums: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    argv = ["--config", "qwen3b_band.yaml", "--model", str(chat_model), "--train_data", str(sums[0]), *SHORT]
    with pytest.raises(SystemExit) as stopped:
        train.main([*argv, "--prompts_per_step", "8", "--output_dir", str(tmp_path / "runs")])
    error = capsys.readouterr().err.partition("error: ")[2]
    assert stopped.value.code == 2 and not (tmp_path / "runs").exists()
    assert "HuggingFaceH4/aime_2024" in error and "aime24=DIR   in place" in error
