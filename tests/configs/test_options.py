"""Every option of training: who reads it, and which settings of the others leave it without effect."""

import ast
import functools
import inspect
from dataclasses import fields

import pytest
import torch
from launching import ROOT

from bandpo.rule import RULES, load_rule, synthetic_batch
from configs import ConfigError, help_text, load
from configs.load import option_list
from configs.schema import FIXED_VLLM_ARGUMENTS, OWN_VLLM_ARGUMENTS, RULES_AT_RATIO_1, Config, Plan
from trainer import rollout
from trainer.rollout import EngineOptions, engine_arguments

# Options that have an effect in every accepted combination.
ALWAYS = """
run_name output_dir seed deterministic max_steps dry_run wandb model precision attention gradient_checkpointing sharding
trust_remote_code train_data prompt_column answer_column
prompt_template chat_template max_prompt_tokens lora_rank stop teacher engine prompts_per_step samples_per_prompt
max_response_tokens temperature top_p top_k dynamic_sampling off_policy_steps engine_memory_share reward reward_correct
reward_incorrect overlong_buffer_tokens verifier_workers verifier_timeout_s rule_args advantage loss_aggregation
mask_truncated kl_coef entropy_coef old_policy tis minibatches epochs micro_batch_tokens lr lr_warmup_steps weight_decay
adam_betas grad_clip eval_every save_every keep_last
""".split()
# Option -> a setting that the other options leave without effect, and one next to it in which it has an effect.
# The first is refused or warned about by name; the second is accepted, and no line names the option.
CONDITIONAL: dict[str, list[tuple[str, str]]] = {
    "rule": [
        ("--rule fixed --minibatches 1", "--rule fixed --minibatches 2"),
        ("--rule fixed --minibatches 1 --off_policy_steps 2", "--rule fixed --minibatches 1 --epochs 2"),
        ("--rule up --minibatches 1", "--rule none --minibatches 1"),
        ("--rule gspo --minibatches 1", "--rule clip_cov --minibatches 1"),
        ("--rule band --minibatches 1", "--rule band --minibatches 1 --old_policy rollout"),
        ("--rule band --minibatches 1", "--rule mine.py:rule --minibatches 1"),
    ],
    "dual_clip": [
        ("--dual_clip 3 --minibatches 1", "--dual_clip 3"),
        ("--dual_clip 3 --minibatches 1 --rule none", "--dual_clip null --minibatches 1 --rule none"),
        ("--dual_clip 3 --rule abc", "--dual_clip 3 --rule abc --rule_args.high_loss 9"),
        ("--dual_clip 3 --rule abc", "--dual_clip null --rule abc"),
    ],
    "tis_cap": [("--tis_cap 3", "--tis_cap 3 --tis token_truncate")],
    "tis_floor": [
        ("--tis_floor 0.5", "--tis_floor 0.5 --tis token_mask"),
        ("--tis_floor 0.5 --tis sequence_truncate", "--tis_floor 0.5 --tis sequence_mask"),
    ],
    "tis": [("--tis token_mask --old_policy rollout", "--tis token_mask")],
    "max_rollout_kl": [
        ("--max_rollout_kl 1 --off_policy_steps 1 --old_policy rollout", "--max_rollout_kl 1"),
    ],
    "reward_concurrency": [("--reward_concurrency 4", "--reward_concurrency 4 --reward mine.py:score")],
    "reward_timeout_s": [
        ("--reward_timeout_s 4 --reward answer_line", "--reward_timeout_s 4 --reward mine.py:score"),
    ],
    "vllm": [("--vllm.enforce_eager true --engine hf", "--vllm.enforce_eager true")],
    "tensor_parallel": [("--tensor_parallel 2 --engine hf", "--tensor_parallel 2")],
    "system_prompt": [
        ("--system_prompt none --chat_template false", "--system_prompt none"),
        ("--system_prompt none --chat_template false", "--system_prompt Think --chat_template false"),
    ],
    "chat_template_kwargs": [
        ("--chat_template_kwargs.enable_thinking false --chat_template false", "--chat_template_kwargs.a true"),
    ],
    "lora_alpha": [("--lora_alpha 8", "--lora_alpha 8 --lora_rank 4")],
    "lora_targets": [("--lora_targets q_proj", "--lora_targets q_proj --lora_rank 4")],
    "teacher_coef": [("--teacher_coef 2", "--teacher_coef 2 --teacher DIR")],
    "lr_schedule": [
        ("--lr_schedule linear --lr_warmup_steps 9 --max_steps 10", "--lr_schedule linear --max_steps 2"),
        ("--lr_schedule cosine --lr_warmup_steps 10 --max_steps 10", "--lr_warmup_steps 10 --max_steps 10"),
    ],
    "samples_logged": [("--samples_logged 200", "--samples_logged 128")],
    "eval_data": [("--eval_data toy_eval --eval_every 0", "--eval_data toy_eval")],
    "eval_samples": [("--eval_samples 4 --eval_every 0", "--eval_samples 4")],
    "keep_best": [
        ("--keep_best 3 --eval_every 0", "--keep_best 3"),
        ("--keep_best 3 --eval_every 4 --save_every 10", "--keep_best 3 --eval_every 10 --save_every 5"),
        ("--keep_best 3 --eval_every 4 --save_every 10", "--keep_best 0 --eval_every 5"),
    ],
}
OPTIONS = [f.name for f in fields(Config)]


def lines(argv: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said about a configuration on two processes: conflicts, else warnings."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    try:
        return load(Config, argv.split()).warnings()
    except ConfigError as error:
        return error.problems


def about(option: str, found: list[str]) -> list[str]:
    return [line for line in found if option in line.partition(": ")[0].split(", ")]


def test_every_option_is_in_the_table():
    assert set(ALWAYS) | set(CONDITIONAL) == set(OPTIONS) and len(OPTIONS) <= 78


@pytest.mark.parametrize("option, inert, live", [(o, *pair) for o, pairs in CONDITIONAL.items() for pair in pairs])
def test_an_option_without_effect_is_named_and_one_with_an_effect_is_not(monkeypatch, option, inert, live):
    assert len(about(option, lines(inert, monkeypatch))) == 1
    assert about(option, lines(live, monkeypatch)) == []


def test_defaults_are_accepted_without_a_word(monkeypatch):
    for argv in ("", "--eval_every 0", "--prompts_per_step 8", "--save_every 7", "--max_steps 1", "--kl_coef 0"):
        assert lines(argv, monkeypatch) == []


@functools.cache
def options_read() -> set[str]:
    """The attributes that the trainer, the evaluation and the memory estimate read of `cfg` or `run.cfg`."""
    files = [ROOT / "train.py", ROOT / "configs" / "memory.py", *(ROOT / "trainer").glob("*.py")]
    nodes = [node for path in [*files, ROOT / "eval" / "evaluate.py"] for node in ast.walk(ast.parse(path.read_text()))]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if ast.unparse(node.value).rpartition(".")[2] == "cfg"}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_read_by_the_trainer(option: str):
    if option == "minibatches":  # by the batch arithmetic
        assert "cfg.minibatches" in inspect.getsource(Plan)
    else:
        assert option in options_read()


# ---- conflicts ----

CONFLICTS = [
    (
        "--prompts_per_step 250",
        "prompts_per_step: does not divide into 4 minibatches on 2 processes (got 250); use 256",
    ),
    ("--micro_batch_tokens 5119", "micro_batch_tokens: does not hold one sequence"),
    ("--sharding none", "sharding: none is for one process (got 2); use auto, ddp or fsdp2"),
    ("--tensor_parallel 3", "tensor_parallel: does not divide 2 processes (got 3); use a divisor"),
    ("--attention flash_attention_2 --precision float32", "attention: flash_attention_2 computes in bfloat16 only"),
    ("--attention flash_attention_3 --deterministic", "attention: flash_attention_3 is not known to be deterministic"),
    ("--tensor_parallel 2 --deterministic", "tensor_parallel: an engine of several ranks is not known to be "),
    ("--train_data []", "train_data: is empty; name a set or file"),
    ("--eval_data []", "eval_data: is empty; name a set or file, or set eval_every 0"),
    ("--dynamic_sampling 1 --tensor_parallel 2", "dynamic_sampling: ranks that share an engine cannot refill"),
    ("--reward_correct -1", "reward_correct: is not above reward_incorrect (got -1.0 and -1.0); raise it"),
    ("--overlong_buffer_tokens 4096", "overlong_buffer_tokens: is not below max_response_tokens (got 4096 and 4096)"),
    ("--top_p 0.9 --tis token_mask", "tis, old_policy: rollout log-probs are of a truncated distribution"),
    ("--top_k 9 --old_policy rollout", "tis, old_policy: rollout log-probs are of a truncated distribution"),
    ("--tis token_mask --tis_floor 2", "tis_floor: is not below tis_cap (got 2.0 and 2.0); lower it"),
    ("--advantage maxrl", "advantage: maxrl divides by the mean reward"),
    (
        "--advantage maxrl --reward_incorrect 0 --overlong_buffer_tokens 9",
        "advantage: maxrl divides by the mean reward",
    ),
    ("--adam_betas [0.9]", "adam_betas: must be two numbers (got 1); write [0.9, 0.999]"),
    ("--vllm.gpu_memory_utilization 0.9", "vllm: gpu_memory_utilization is set by engine_memory_share; remove it"),
    ("--vllm.logprobs_mode raw_logprobs", "vllm: logprobs_mode is set by the trainer; remove it"),
    ("--off_policy_steps 1", "off_policy_steps: nothing corrects for stale rollouts; set old_policy rollout, or tis"),
    ("--engine hf", "engine: hf has one RNG per batch"),
]


@pytest.mark.parametrize("argv, start", CONFLICTS)
def test_a_conflict_or_doubt_is_one_line(monkeypatch, argv: str, start: str):
    (line,) = lines(argv, monkeypatch)
    assert line.startswith(start)


@pytest.mark.parametrize(
    "argv",
    [
        "--reward_incorrect 0 --advantage maxrl",
        "--off_policy_steps 1 --tis token_truncate",
        "--off_policy_steps 1 --old_policy rollout --minibatches 1",
        "--attention flash_attention_2",
        "--top_p 0.9",
        "--vllm {enforce_eager: true, max_num_seqs: 64, compilation_config: {level: 3}}",
        "--dynamic_sampling 1 --reward mine.py:reward --reward_correct 2 --overlong_buffer_tokens 9",
        "--epochs 2 --minibatches 1",
    ],
)
def test_what_makes_sense_is_accepted_without_a_word(monkeypatch, argv: str):
    head, _, mapping = argv.partition(" {")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load(Config, [*head.split(), *(["{" + mapping] if mapping else [])]).warnings() == []


def test_arguments_of_vllm_that_have_an_option_or_are_fixed_are_refused(monkeypatch):
    """Except those that a user may tune: engine_arguments sets them as well, and `vllm` overrides them."""
    monkeypatch.setattr(rollout, "mask_beyond_tokenizer", lambda _: None)  # imports vLLM, which takes seconds
    options = EngineOptions("vllm", "bfloat16", 9, 9, 9, 0.5, 2**28, 1, {}, False)
    ours = set(engine_arguments("m", options, world=2, device="cuda"))
    tunable = {"max_num_seqs", "enforce_eager", "disable_log_stats"}
    assert ours - tunable == {*OWN_VLLM_ARGUMENTS, *FIXED_VLLM_ARGUMENTS}
    assert set(OWN_VLLM_ARGUMENTS.values()) <= {*OPTIONS, "max_prompt_tokens and max_response_tokens"}


@pytest.mark.parametrize("rule", sorted(load_rule("band", {}) and RULES))
def test_which_rules_change_the_gradient_where_the_ratio_is_1(rule: str):
    batch = synthetic_batch(torch.float64)
    result = load_rule(rule, {})(**batch | {"logprobs": batch["old_logprobs"]})
    weight = torch.ones(()) if isinstance(result, tuple) else result[batch["advantages"] != 0]
    assert bool((weight != 1).any()) == (rule in RULES_AT_RATIO_1)


# ---- help ----


def test_help_has_every_option_complete_on_lines_of_its_own():
    blocks = help_text(Config).split("\n  --")[1:]
    assert [block.split()[0] for block in blocks] == OPTIONS
    for block, f in zip(blocks, fields(Config), strict=True):
        first, *rest = block.partition("\n\n")[0].splitlines()
        words = " ".join(line.strip() for line in rest)
        assert ", default " in first and "..." not in block and words.startswith(f.metadata["help"])
        assert all(len(line) <= 120 for line in block.splitlines()), block
        assert f.metadata["source"] in words and f.metadata["unit"] in first and f.metadata["symbol"] in first


def test_functions_of_the_configuration_are_short():
    for path in (ROOT / "configs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 45, f"{path.name}: {node.name}"


def test_the_page_of_options_is_up_to_date():
    page = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8").partition("## Options\n")[2]
    assert page.endswith(option_list(Config)), "replace its end by the output of: python -m configs --options"
