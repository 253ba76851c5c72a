"""All training options, and the batch sizes derived from them.

    python train.py --help          # options with type, unit, default, symbol and source

A new option is one line in `Config`. The code reads it as `cfg.name`. Defaults are the paper's main run, except for
`reward` (paper: answer_line). A YAML file in this folder sets the options that differ.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from configs.load import ConfigError, knob

PAPER = "paper"  # arXiv 2603.04918 and the scripts published with it
DAPO = "arXiv 2503.14476"
RULES_AT_RATIO_1 = ("clip_cov",)  # rules of bandpo/rules.py that change the gradient where the ratio is 1
# Argument of vllm.LLM that `vllm` cannot override -> option that sets it.
OWN_VLLM_ARGUMENTS = {
    **{"model": "model", "dtype": "precision", "seed": "seed", "tensor_parallel_size": "tensor_parallel"},
    **{"gpu_memory_utilization": "engine_memory_share", "trust_remote_code": "trust_remote_code"},
    **{"max_model_len": "max_prompt_tokens and max_response_tokens"},
}
FIXED_VLLM_ARGUMENTS = dict.fromkeys(
    ["logprobs_mode", "generation_config", "logits_processors", "distributed_executor_backend", "enable_sleep_mode"],
    "the trainer",
)


@dataclass(frozen=True)
class Config:
    """All training options; `python train.py --help` prints them."""

    run_name: str = knob("run", "name of the run's folder; the same name resumes the run", section="Run")
    output_dir: str = knob("runs", "parent folder of the run folders")
    seed: int = knob(0, "seed of sampling, data order and LoRA initialization", low=0, high=2**32 - 1)
    deterministic: bool = knob(False, "bit-identical GPU runs from the same seed, slower; on a CPU always on")
    max_steps: int = knob(1020, "training steps, one rollout each; default: 10 epochs of the data", source=PAPER, low=1)
    dry_run: bool = knob(False, "preflight checks and the configuration only; no model is loaded")
    wandb: Literal["auto", "offline", "disabled"] = knob(
        "auto", "wandb mode; auto: online with an API key and a network, else offline"
    )
    samples_logged: int = knob(8, "logged responses per step, one per group, in runs/NAME/samples and on wandb", low=0)

    model: str = knob("Qwen/Qwen2.5-3B-Instruct", "folder or hub id of the start model", section="Model")
    precision: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "dtype of compute and engine (master weights: float32); auto: bfloat16 on a GPU that supports it"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = knob(
        "auto", "attention kernel and layout; auto: packed if possible; flash_attention_*: packed; eager, sdpa: padded"
    )
    gradient_checkpointing: bool = knob(
        True, "recomputation of activations in backward: less memory, a third more compute"
    )
    sharding: Literal["auto", "none", "ddp", "fsdp2"] = knob(
        "auto", "sharding of the policy; auto: none for one process, ddp up to 1B parameters, else fsdp2"
    )
    lora_rank: int = knob(
        0, "rank of LoRA adapters, which are then the only trained weights (use a higher lr); 0: off", symbol="r", low=0
    )
    lora_alpha: float = knob(32.0, "numerator of the LoRA scale, lora_alpha / lora_rank", above=0)
    lora_targets: str | list[str] = knob("all-linear", "layers with adapters, such as [q_proj, v_proj]")
    trust_remote_code: bool = knob(
        False, "permission for Python code that comes with the model; only if you trust its author"
    )

    train_data: str | list[str] = knob(
        ["dapo_math_17k_processed", "math_train_l3_5"],
        "training sets, mixed: names, hub ids ORG/NAME:CONFIG:SPLIT, files, folders",
        source=PAPER,
        section="Data",
    )
    eval_data: str | list[str] = knob(
        ["aime24", "aime25", "amc23"], "evaluation sets, same syntax as train_data", source=PAPER
    )
    prompt_column: str | None = knob(
        None, "column of the problem or conversation, in sets outside data/registry.py; null: detected"
    )
    answer_column: str | None = knob(
        None, "column of the reference answer, or STRUCT.FIELD, in sets outside data/registry.py; null: detected"
    )
    prompt_template: str = knob("dapo", "instruction around the problem, a name of data/prompts.py", source=PAPER)
    system_prompt: str = knob(
        "default", "system turn; default: of prompt_template, else of the chat template; none: no turn; else: its text"
    )
    chat_template: bool = knob(True, "prompts in the model's chat template; false: the bare text")
    chat_template_kwargs: dict[str, Any] = knob(
        {}, "further variables of the chat template, such as {enable_thinking: false}"
    )
    max_prompt_tokens: int = knob(
        1024, "longest prompt; longer ones are dropped and counted", unit="tokens", source=PAPER, low=1
    )

    engine: Literal["vllm", "hf"] = knob("vllm", "rollout engine; hf: transformers' generate, slow", section="Rollout")
    prompts_per_step: int = knob(256, "prompts per step over all processes", symbol="B", source=PAPER, low=1)
    samples_per_prompt: int = knob(16, "responses per prompt: one group", symbol="G", source=PAPER, low=2)
    max_response_tokens: int = knob(
        4096, "longest response; longer ones are truncated", unit="tokens", source=PAPER, low=1
    )
    temperature: float = knob(1.0, "temperature of sampling, log-probs and entropy", source=PAPER, above=0, high=2)
    top_p: float = knob(1.0, "probability mass of nucleus sampling; 1: off", source=PAPER, above=0, high=1)
    top_k: int = knob(0, "number of most likely tokens to sample from; 0: off", source=PAPER, low=0)
    stop: list[str] = knob([], "stop strings, included in the response; the model's end-of-turn tokens always stop")
    dynamic_sampling: int = knob(
        0, "maximum rounds per step of replacing equal-score groups with new prompts; 0: off", source=DAPO, low=0
    )
    off_policy_steps: int = knob(
        0, "staleness k: steps between rollout and training; 0: on-policy", unit="steps", low=0
    )
    tensor_parallel: int = knob(1, "processes that share one engine", low=1)
    engine_memory_share: float = knob(
        0.6, "share of GPU memory for the engine while it samples; no effect on a CPU", above=0, below=1
    )
    vllm: dict[str, Any] = knob({}, "further arguments of vllm.LLM, such as {enforce_eager: true}")

    reward: str = knob(
        "math",
        "grader; math: tolerant verifier; answer_line: the paper's; FILE.py:FUNCTION: your own",
        section="Reward",
    )
    reward_correct: float = knob(1.0, "reward of score 1, a correct response", source=PAPER)
    reward_incorrect: float = knob(-1.0, "reward of score 0; scores between are interpolated", source=PAPER)
    overlong_buffer_tokens: int = knob(
        0,
        "tokens before the response limit over which DAPO's overlong penalty rises from 0 to 1; 0: off",
        source=DAPO,
        low=0,
    )
    verifier_workers: int = knob(4, "grading processes per rank", low=1)
    verifier_timeout_s: float = knob(3.0, "CPU time limit per response", unit="s", above=0, high=86_400)
    reward_concurrency: int = knob(16, "concurrent responses per rank in an async or batch reward", low=1, high=4096)
    reward_timeout_s: float = knob(
        60.0, "wall-clock limit per call of your own reward; above it the run ends", unit="s", above=0, high=86_400
    )

    rule: str = knob("band", "clipping rule: a name in docs/rules.md, or FILE.py:FUNCTION", section="Objective")
    rule_args: dict[str, Any] = knob(
        {},
        "parameters of the rule that differ from its published values; setting rule drops inherited ones",
        belongs_to="rule",
    )
    dual_clip: float | None = knob(
        10.0,
        "ratio or gradient weight above which tokens with A < 0 get no gradient; null: off",
        symbol="c",
        source=PAPER,
        above=1,
    )
    advantage: Literal["group_std", "group_mean", "rloo", "maxrl"] = knob(
        "group_std", "advantages within a group; formulas: docs/metrics.md", source=PAPER
    )
    loss_aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"] = knob(
        "seq-mean-token-mean",
        "aggregation of token losses; formulas: docs/metrics.md",
        source=PAPER,
    )
    mask_truncated: bool = knob(False, "exclusion of truncated responses from loss and normalization", source=DAPO)
    kl_coef: float = knob(0.001, "coefficient of the k3 KL to the start model; 0: off", symbol="β", source=PAPER, low=0)
    teacher: str | None = knob(
        None, "folder or hub id of a teacher with the same tokenizer: on-policy distillation by reverse KL; null: off"
    )
    teacher_coef: float = knob(
        1.0, "coefficient of teacher minus old log-probs, added to each token's advantage", above=0
    )
    entropy_coef: float = knob(0.0, "coefficient of the entropy bonus; 0: off", low=0)
    old_policy: Literal["trainer", "rollout"] = knob(
        "trainer", "source of old log-probs; trainer: recomputed before the updates; rollout: the engine's"
    )
    tis: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = knob(
        "none", "importance weight (old / rollout policy) on the policy loss, by token or sequence, truncated or masked"
    )
    tis_cap: float = knob(2.0, "upper bound of the importance weight of tis", source="arXiv 2510.18855 uses 5", above=0)
    tis_floor: float = knob(
        0.0, "lower bound of the importance weight, with tis *_mask", source="arXiv 2510.18855 uses 0.5", low=0
    )
    max_rollout_kl: float = knob(
        0.2,
        "maximum KL(rollout, trainer) of on-policy tokens, nats per token; above it the run stops before an update",
        above=0,
    )

    minibatches: int = knob(
        4, "minibatches per step, one optimizer update each", source=PAPER, low=1, section="Optimizer"
    )
    epochs: int = knob(1, "optimization epochs over each step's minibatches", source=PAPER, low=1)
    micro_batch_tokens: int = knob(16384, "maximum tokens per forward pass, padding included", unit="tokens", low=1)
    lr: float = knob(1e-6, "learning rate of AdamW", source=PAPER, low=0)
    lr_warmup_steps: int = knob(0, "steps of linear warm-up", unit="steps", source=PAPER, low=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = knob(
        "constant", "learning rate schedule; linear, cosine: to 0 at max_steps", source=PAPER
    )
    weight_decay: float = knob(0.01, "weight decay of AdamW", source=PAPER, low=0)
    adam_betas: list[float] = knob([0.9, 0.999], "betas of AdamW", source=PAPER, low=0, below=1)
    grad_clip: float = knob(1.0, "maximum gradient norm (clipping)", source=PAPER, above=0)

    eval_every: int = knob(
        5,
        "steps between evaluations; first before step 1, last after max_steps; 0: off",
        source=PAPER,
        low=0,
        section="Evaluation and checkpoints",
    )
    eval_samples: int = knob(32, "responses per problem in evaluations", symbol="k", source=PAPER, low=1)
    save_every: int = knob(10, "steps between checkpoints, also after the last step; 0: last step only", low=0)
    keep_last: int = knob(2, "number of newest checkpoints to keep", low=1)
    keep_best: int = knob(1, "number of best checkpoints to keep, by mean@k over the evaluation sets", low=0)

    @property
    def updates_per_step(self) -> int:
        return self.minibatches * self.epochs

    def problems(self) -> list[str]:
        """List conflicts between options, one line per conflict."""
        try:
            plan = Plan(self)
        except ConfigError as error:  # invalid environment variables of the launcher: no check below can run
            return error.problems
        conflicts = [*_batch_conflicts(self, plan), *_sampling_conflicts(self), *_training_conflicts(self)]
        return [line for wrong, line in conflicts if wrong]

    def warnings(self) -> list[str]:
        """List valid but probably unintended choices: options without effect, surprising combinations."""
        return [line for doubtful, line in [*_without_effect(self), *_surprises(self)] if doubtful]

    def differs(self, key: str) -> bool:
        """Return True if an option is not at its default."""
        return getattr(self, key) != getattr(Config(), key)


Checks = list[tuple[bool, str]]  # whether an error applies, and its line


def _batch_conflicts(cfg: Config, plan: "Plan") -> Checks:
    processes, unit = plan.processes, cfg.minibatches * plan.processes
    whole = cfg.max_prompt_tokens + cfg.max_response_tokens
    return [
        (
            cfg.prompts_per_step % unit > 0,
            f"prompts_per_step: does not divide into {cfg.minibatches} minibatches on {processes} processes (got "
            f"{cfg.prompts_per_step}); use {(cfg.prompts_per_step // unit + 1) * unit}",
        ),
        (
            cfg.micro_batch_tokens < whole,
            "micro_batch_tokens: does not hold one sequence of max_prompt_tokens + max_response_tokens (got "
            f"{cfg.micro_batch_tokens}); use at least {whole}",
        ),
        (
            cfg.sharding == "none" and processes > 1,
            f"sharding: none is for one process (got {processes}); use auto, ddp or fsdp2",
        ),
        (cfg.sharding == "ddp" and processes == 1, "sharding: ddp is for several processes (got 1); use auto or none"),
        (
            processes % cfg.tensor_parallel > 0,
            f"tensor_parallel: does not divide {processes} processes (got {cfg.tensor_parallel}); use a divisor",
        ),
        (
            cfg.attention.startswith("flash") and cfg.precision == "float32",
            f"attention: {cfg.attention} computes in bfloat16 only (got precision float32); use auto, sdpa or eager",
        ),
        (
            cfg.deterministic and cfg.attention == "flash_attention_3",
            "attention: flash_attention_3 is not known to be deterministic; use sdpa or flash_attention_2",
        ),
        (
            cfg.deterministic and cfg.tensor_parallel > 1,
            "tensor_parallel: an engine of several ranks is not known to be deterministic; use 1",
        ),
    ]


def _sampling_conflicts(cfg: Config) -> Checks:
    return [
        ("" in cfg.stop, "stop: an empty text would end every response; remove it"),
        (not cfg.train_data, "train_data: is empty; name a set or file"),
        (
            cfg.eval_every > 0 and not cfg.eval_data,
            "eval_data: is empty; name a set or file, or set eval_every 0",
        ),
        (
            cfg.engine == "hf" and bool(cfg.vllm),
            f"vllm: has no effect with engine hf (got {', '.join(cfg.vllm)}); remove it",
        ),
        *((True, line) for line in vllm_problems(cfg.vllm)),
        (
            cfg.engine == "hf" and cfg.tensor_parallel > 1,
            f"tensor_parallel: is for engine vllm (got {cfg.tensor_parallel} with engine hf); use 1",
        ),
        (
            cfg.dynamic_sampling > 0 and cfg.tensor_parallel > 1,
            "dynamic_sampling: ranks that share an engine cannot refill on their own; use tensor_parallel 1",
        ),
        (
            cfg.reward_correct <= cfg.reward_incorrect,
            f"reward_correct: is not above reward_incorrect (got {cfg.reward_correct} and {cfg.reward_incorrect}); "
            "raise it",
        ),
        (
            cfg.overlong_buffer_tokens >= cfg.max_response_tokens,
            f"overlong_buffer_tokens: is not below max_response_tokens (got {cfg.overlong_buffer_tokens} and "
            f"{cfg.max_response_tokens}); lower it",
        ),
    ]


def vllm_problems(arguments: Mapping[str, Any]) -> list[str]:
    """Return one line per argument in `vllm` that the trainer or another option sets."""
    reserved = {**OWN_VLLM_ARGUMENTS, **FIXED_VLLM_ARGUMENTS}
    return [f"vllm: {name} is set by {reserved[name]}; remove it" for name in arguments if name in reserved]


def _training_conflicts(cfg: Config) -> Checks:
    return [
        (
            (cfg.top_p < 1 or cfg.top_k > 0) and (cfg.tis != "none" or cfg.old_policy == "rollout"),
            "tis, old_policy: rollout log-probs are of a truncated distribution; set top_p 1 and top_k 0, or tis none "
            "and old_policy trainer",
        ),
        (
            cfg.tis != "none" and cfg.old_policy == "rollout",
            "tis: with old_policy rollout every importance weight is 1; set tis none or old_policy trainer",
        ),
        (cfg.tis == "none" and cfg.tis_cap != Config.tis_cap, "tis_cap: has no effect with tis none; set tis"),
        (
            cfg.tis_floor > 0 and not cfg.tis.endswith("_mask"),
            f"tis_floor: has no effect with tis {cfg.tis}; use token_mask or sequence_mask",
        ),
        (
            cfg.tis_floor >= cfg.tis_cap,
            f"tis_floor: is not below tis_cap (got {cfg.tis_floor} and {cfg.tis_cap}); lower it",
        ),
        (
            cfg.advantage == "maxrl" and (cfg.reward_incorrect < 0 or cfg.overlong_buffer_tokens > 0),
            "advantage: maxrl divides by the mean reward, which must not be negative; set reward_incorrect 0 and "
            "overlong_buffer_tokens 0",
        ),
        (len(cfg.adam_betas) != 2, f"adam_betas: must be two numbers (got {len(cfg.adam_betas)}); write [0.9, 0.999]"),
    ]


def _without_effect(cfg: Config) -> Checks:
    on_policy, decay = cfg.updates_per_step == 1 and cfg.old_policy == "trainer", cfg.max_steps - cfg.lr_warmup_steps
    dual_clip = cfg.dual_clip is not None and cfg.differs("dual_clip")
    clips = cfg.rule not in ("none", *RULES_AT_RATIO_1) and ":" not in cfg.rule
    return [
        (on_policy and clips, f"rule: {cfg.rule} has no effect with one update per step: every ratio is 1"),
        (
            on_policy and dual_clip,
            "dual_clip: has no effect with one update per step: every ratio is 1",
        ),
        (
            cfg.rule == "abc" and not cfg.rule_args and dual_clip,
            "dual_clip: has no effect with rule abc, whose own bound for A < 0 is tighter",
        ),
        (
            cfg.off_policy_steps > 0 and cfg.differs("max_rollout_kl"),
            "max_rollout_kl: has no effect after the first step: off_policy_steps makes all later rollouts stale",
        ),
        (
            not cfg.chat_template and cfg.system_prompt == "none",
            "system_prompt: none has no effect with chat_template false, which writes no turns",
        ),
        *(
            (":" not in cfg.reward and cfg.differs(key), f"{key}: has no effect with reward {cfg.reward}")
            for key in ("reward_concurrency", "reward_timeout_s")
        ),
        (
            not cfg.chat_template and bool(cfg.chat_template_kwargs),
            "chat_template_kwargs: has no effect with chat_template false",
        ),
        (
            cfg.lr_schedule != "constant" and decay < 2,
            f"lr_schedule: {cfg.lr_schedule} has no effect: lr_warmup_steps {cfg.lr_warmup_steps} leaves no step to "
            f"decay (max_steps {cfg.max_steps})",
        ),
        *(
            (cfg.lora_rank == 0 and cfg.differs(key), f"{key}: has no effect with lora_rank 0, which turns LoRA off")
            for key in ("lora_alpha", "lora_targets")
        ),
        (cfg.teacher is None and cfg.differs("teacher_coef"), "teacher_coef: has no effect without a teacher"),
        *(
            (cfg.eval_every == 0 and cfg.differs(key), f"{key}: has no effect with eval_every 0, which turns it off")
            for key in ("eval_data", "eval_samples", "keep_best")
        ),
    ]


def _surprises(cfg: Config) -> Checks:
    groups, every = cfg.prompts_per_step // Plan(cfg).processes, math.lcm(cfg.eval_every, cfg.save_every)
    return [
        (cfg.engine == "hf", "engine: hf has one RNG per batch; samples depend on batch composition"),
        (
            cfg.off_policy_steps > 0 and cfg.old_policy == "trainer" and cfg.tis == "none",
            "off_policy_steps: nothing corrects for stale rollouts; set old_policy rollout, or tis",
        ),
        (
            cfg.differs("samples_logged") and cfg.samples_logged > groups,
            f"samples_logged: rank 0 logs one response per group, {groups} per step (got {cfg.samples_logged}); lower "
            "it",
        ),
        (
            cfg.differs("keep_best") and every > max(cfg.eval_every, cfg.save_every),
            f"keep_best: ranks evaluated checkpoints, one every {every} steps; make save_every a multiple of "
            f"eval_every (got {cfg.save_every} and {cfg.eval_every})",
        ),
    ]


def _launcher_variable(variable: str, *, default: int, low: int, below: int | None = None) -> int:
    """Read an environment variable of the launcher as an integer. Raises ConfigError if invalid or out of range."""
    text = os.environ.get(variable, str(default))
    if text.isdecimal() and low <= int(text) and (below is None or int(text) < below):
        return int(text)
    allowed = f"an integer from {low}" + (f" and below {below}, the WORLD_SIZE" if below else "")
    raise ConfigError(
        [f"environment: {variable}: {text!r} is not {allowed}; launchers set it, unset it to start one process"]
    )


class Plan:
    """Batch sizes, derived from the configuration and the number of processes.

    Raises ConfigError if WORLD_SIZE or RANK, which the launcher sets, is invalid.
    """

    def __init__(self, cfg: Config):
        self.processes = _launcher_variable("WORLD_SIZE", default=1, low=1)
        self.rank = _launcher_variable("RANK", default=0, low=0, below=self.processes)
        self.minibatches = cfg.minibatches
        self.prompts_per_minibatch = cfg.prompts_per_step // self.minibatches  # over all processes
        self.sequences_per_minibatch = self.prompts_per_minibatch * cfg.samples_per_prompt
        self.sequences = cfg.prompts_per_step * cfg.samples_per_prompt  # per step, over all processes

    def slots(self, rank: int) -> list[int]:
        """Return the positions of this rank's prompts in the step's batch, minibatch by minibatch.

        Minibatch m has the same prompts for any number of processes, so an update does not depend on that number.
        """
        share = self.prompts_per_minibatch // self.processes
        starts = [m * self.prompts_per_minibatch + rank * share for m in range(self.minibatches)]
        return [start + i for start in starts for i in range(share)]

    def text(self, cfg: Config) -> str:
        """Format the batch sizes."""
        return (
            f"a step:  {cfg.prompts_per_step} prompts x {cfg.samples_per_prompt} samples = {self.sequences:,} "
            "sequences\n"
            f"updates: {cfg.updates_per_step} per step = {self.minibatches} minibatches of "
            f"{self.sequences_per_minibatch:,} sequences x {cfg.epochs} epoch(s)\n"
            f"a rank:  {self.sequences // self.processes:,} sequences per step ({self.processes} process(es)), "
            f"micro-batches of {cfg.micro_batch_tokens:,} tokens at most\n"
            f"in all:  {cfg.max_steps:,} steps, {cfg.max_steps * cfg.updates_per_step:,} updates, "
            f"{cfg.max_steps * self.sequences:,} sequences"
        )
