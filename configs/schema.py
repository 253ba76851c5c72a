"""Every knob of training, once, and the batch arithmetic that follows from them.

    python train.py --help          # all of them with type, unit, default, symbol and source

A new knob is one line in `Config`; the code reads it as `cfg.name`. A YAML file beside this one sets what differs from
the defaults, which are the paper's main run but for `reward` (the paper's is answer_line).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.load import ConfigError, knob

PAPER = "paper"  # arXiv 2603.04918 and the scripts published with it
DAPO = "arXiv 2503.14476"
# Keys that `rule` stands in place of.
OF_CLIP = "clip divergence delta delta_final delta_schedule radius ratio_cap clip_low clip_high".split()


@dataclass(frozen=True)
class Config:
    """Every knob, once. `python train.py --help` prints them with type, unit, default, symbol and source."""

    run_name: str = knob("run", "folder of the run under output_dir; the same name again resumes it", section="Run")
    output_dir: str = knob("runs", "where runs are kept")
    seed: int = knob(0, "everything random is a function of it and the step", low=0, high=2**32 - 1)
    deterministic: bool = knob(False, "the same bits from the same seed on a GPU too, slower; on a CPU always so")
    max_steps: int = knob(1020, "steps of rollout and update; the paper's 10 epochs", source=PAPER, low=1)
    max_epochs: float | None = knob(
        None, "stop after so many passes over the training prompts, refills included; null: max_steps alone", above=0
    )
    dry_run: bool = knob(False, "print the configuration and every check; stop before a model is loaded")
    wandb: Literal["auto", "online", "offline", "disabled"] = knob("auto", "auto: online with a key and a network")
    wandb_project: str = knob("bandpo", "project on wandb")
    samples_logged: int = knob(8, "answers logged a step, in runs/NAME/samples and on wandb", low=0)
    plots: bool = knob(True, "make runs/NAME/page.html and plots/entropy.png when the run ends")

    model: str = knob("Qwen/Qwen2.5-3B-Instruct", "folder or hub id to start from", section="Model")
    precision: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "of compute and engine; master weights are float32. auto: bfloat16 on a GPU that has it"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = knob(
        "auto", "attention kernel; auto: flash_attention_2 where installed, else sdpa"
    )
    packing: Literal["auto", "on", "off"] = knob(
        "auto", "sequences end to end, no padding; auto: unless attention: eager"
    )
    gradient_checkpointing: bool = knob(True, "recompute activations in backward: less memory, a third more compute")
    compile: bool = knob(False, "torch.compile of the decoder layers: a minute to start, faster steps")
    logprob_chunk_tokens: int = knob(1024, "response tokens whose logits exist at a time", unit="tokens", low=1)
    logprob_kernel: Literal["chunked", "liger"] = knob("chunked", "liger: liger-kernel's fused op, to be installed")
    sharding: Literal["none", "ddp", "fsdp2"] = knob("fsdp2", "how the policy is cut over processes")
    reference_offload: bool = knob(True, "keep the reference policy in CPU memory between its turns")
    trust_remote_code: bool = knob(False, "run Python code that comes with the model: only if you trust its author")

    train_data: str | list[str] = knob(
        ["dapo_math_17k_processed", "math_train_l3_5"], "sets or files, mixed", source=PAPER, section="Data"
    )
    eval_data: str | list[str] = knob(["aime24", "aime25", "amc23"], "sets or files to evaluate on", source=PAPER)
    prompt_template: str = knob("dapo", "instruction around the problem: a name of data/prompts.py", source=PAPER)
    system_prompt: str = knob("default", "default: the chat template's own; none: no system turn; or the text")
    chat_template: bool = knob(True, "wrap prompts in the model's chat template")
    max_prompt_tokens: int = knob(1024, "longer prompts are dropped and counted", unit="tokens", source=PAPER, low=1)
    bad_gold: Literal["drop", "refuse"] = knob("drop", "gold answers that do not verify against themselves")

    engine: Literal["vllm", "hf"] = knob("vllm", "what samples; hf: transformers' generate", section="Rollout")
    prompts_per_step: int = knob(256, "over all processes", unit="prompts", symbol="B", source=PAPER, low=1)
    samples_per_prompt: int = knob(16, "answers to each prompt, a group", symbol="G", source=PAPER, low=2)
    max_response_tokens: int = knob(4096, "answers are cut here", unit="tokens", source=PAPER, low=1)
    temperature: float = knob(
        1.0, "of sampling, log-probs and entropy; vLLM takes 2 at most", source=PAPER, above=0, high=2
    )
    top_p: float = knob(1.0, "nucleus sampling; 1: off", source=PAPER, above=0, high=1)
    top_k: int = knob(0, "sample among the k likeliest tokens; 0: off", source=PAPER, low=0)
    dynamic_sampling: bool = knob(False, "replace groups whose answers are all right or all wrong", source=DAPO)
    max_refills: int = knob(10, "rounds of dynamic sampling a step; groups still without signal stay", low=0)
    lag: int = knob(0, "train on the answers that the policy gave so many steps ago", unit="steps", low=0)
    tensor_parallel: int = knob(1, "processes that share one engine", low=1)
    engine_memory_share: float = knob(0.6, "of a GPU's memory, for the engine while it samples", above=0, below=1)
    engine_cpu_cache_gib: float = knob(0.25, "KV cache of the engine on a CPU", unit="GiB", above=0)
    engine_max_sequences: int | None = knob(None, "decoded at once; null: all that the cache holds", low=1)
    engine_eager: bool = knob(False, "no CUDA graphs in the engine: quick to start, slow to sample; on a CPU always so")

    reward: str = knob("math", "math: tolerant; answer_line: the paper's; file.py:function: yours", section="Reward")
    reward_right: float = knob(1.0, "for a right answer", source=PAPER)
    reward_wrong: float = knob(-1.0, "for any other", source=PAPER)
    reward_format: float = knob(0.0, "added when there is one final answer, right or wrong; 0: off", low=0)
    overlong_buffer_tokens: int = knob(
        0, "soft penalty over the last tokens before the limit; 0: off", source=DAPO, low=0
    )
    overlong_penalty: float = knob(1.0, "taken off at the limit", source=DAPO, low=0)
    verifier_workers: int = knob(4, "grading processes of each rank", low=1)
    verifier_timeout_s: float = knob(3.0, "processor time for one answer", unit="s", above=0, high=86_400)
    verifier_memory_gib: float = knob(2.0, "of one grading process", unit="GiB", above=0)

    clip: Literal["fixed", "band", "band_relaxed", "dcpo", "none"] = knob(
        "band", "how a token's ratio interval is chosen; none: dual clip alone", section="Objective"
    )
    divergence: Literal["kl", "tv", "chi2", "reverse_kl", "hellinger", "jensen_shannon", "alpha"] = knob(
        "kl", "f-divergence of the Band's trust region", symbol="D_f", source=PAPER
    )
    delta: float = knob(0.05, "radius of the trust region", symbol="δ", source=PAPER, above=0, high=1000)
    delta_final: float | None = knob(None, "radius at the last step; null: constant", above=0, high=1000)
    delta_schedule: Literal["constant", "linear", "cosine"] = knob("constant", "way from delta to delta_final")
    radius: Literal["constant", "entropy"] = knob("constant", "entropy: wider where the policy is unsure, same mean")
    ratio_cap: float | None = knob(10.0, "largest upper bound of band and dcpo; null: none", source=PAPER, low=1)
    clip_low: float = knob(0.2, "fixed, band_relaxed, dcpo: room below", symbol="ε_low", source="GRPO", low=0)
    clip_high: float = knob(0.2, "fixed, band_relaxed, dcpo: room above", symbol="ε_high", source="GRPO", low=0)
    dual_clip: float | None = knob(10.0, "largest r for A < 0; null: off", symbol="c", source=PAPER, above=1)
    surrogate: Literal["ppo", "cispo", "gspo"] = knob(
        "ppo", "ppo: min(rA, clip(r)A); cispo: clipped weight on the log-prob; gspo: ratio of the whole sequence"
    )
    rule: str | None = knob(
        None, "in place of clip: a rule of docs/rules.md by its name, or file.py:function, your own"
    )
    rule_parameters: dict[str, float | str | None] = knob({}, "what differs from that rule's published values")
    advantage: Literal["group_std", "group_mean", "rloo", "maxrl"] = knob(
        "group_std", "from a group's rewards to advantages: group_advantages in train.py", source=PAPER
    )
    loss_aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"] = knob(
        "seq-mean-token-mean", "from token losses to one number", source=PAPER
    )
    kl_coef: float = knob(0.001, "of the KL to the model started from; 0: none", symbol="β", source=PAPER, low=0)
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k3", "of that KL", source=PAPER)
    old_policy: Literal["trainer", "sampler"] = knob(
        "trainer", "whose log-probs anchor ratio and Band; sampler spares a forward pass and absorbs the mismatch"
    )
    mismatch_correction: Literal["none", "token_truncate"] = knob(
        "none", "weight tokens by min(trainer / sampler, mismatch_cap)"
    )
    mismatch_cap: float = knob(2.0, "largest such weight", above=0)
    mismatch_limit: float = knob(0.2, "stop when KL(sampler, trainer) per token is above", unit="nats", above=0)

    updates_per_step: int = knob(4, "optimizer steps on a step's rollouts", source=PAPER, low=1, section="Optimizer")
    epochs_per_step: int = knob(1, "passes over them; minibatches = updates / epochs", source=PAPER, low=1)
    micro_batch_tokens: int = knob(16384, "through the model together, padding included", unit="tokens", low=1)
    lr: float = knob(1e-6, "learning rate of AdamW", source=PAPER, low=0)
    lr_warmup_steps: int = knob(0, "linear warm-up", unit="steps", source=PAPER, low=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = knob("constant", "to zero at max_steps", source=PAPER)
    weight_decay: float = knob(0.01, "of AdamW", source=PAPER, low=0)
    adam_beta1: float = knob(0.9, "of AdamW", source=PAPER, low=0, below=1)
    adam_beta2: float = knob(0.999, "of AdamW", source=PAPER, low=0, below=1)
    grad_clip: float = knob(1.0, "largest norm of the gradient", source=PAPER, above=0)
    max_skipped: int = knob(3, "updates in a row without a finite gradient; then the run stops", low=1)

    eval_every: int = knob(
        5, "steps; and before the first, after the last; 0: never", source=PAPER, low=0, section="Eval and checkpoints"
    )
    eval_samples: int = knob(
        32, "answers to each problem, at the temperature of training", symbol="k", source=PAPER, low=1
    )
    save_every: int = knob(10, "steps; also after the last one; 0: then alone", source=PAPER, low=0)
    keep_last: int = knob(2, "newest checkpoints kept", low=1)
    keep_best: int = knob(1, "best checkpoints kept, by mean@k over the evaluation sets", low=0)
    on_save_failure: Literal["stop", "continue"] = knob("stop", "when a checkpoint cannot be written (disk full)")

    def problems(self) -> list[str]:
        """Mistakes between keys, one line each."""
        try:
            plan = Plan(self)
        except ConfigError as error:  # the launcher's variables: nothing below can be checked
            return error.problems
        whole = self.max_prompt_tokens + self.max_response_tokens
        unit = plan.minibatches * plan.processes
        truncated = self.top_p < 1 or self.top_k > 0
        mistakes = [
            (
                self.updates_per_step % self.epochs_per_step > 0,
                f"updates_per_step: {self.updates_per_step} is not a multiple of epochs_per_step {self.epochs_per_step}"
                f"; use {self.epochs_per_step * (self.updates_per_step // self.epochs_per_step + 1)}",
            ),
            (
                self.prompts_per_step % unit > 0,
                f"prompts_per_step: {self.prompts_per_step} does not divide into {plan.minibatches} minibatches on "
                f"{plan.processes} processes; use {(self.prompts_per_step // unit + 1) * unit}",
            ),
            (
                self.sharding == "none" and plan.processes > 1,
                f"sharding: none is for one process, {plan.processes} were launched; use ddp or fsdp2",
            ),
            (
                self.sharding == "ddp" and plan.processes == 1,
                "sharding: ddp is for several processes, one was launched; use none",
            ),
            (
                plan.processes % self.tensor_parallel > 0,
                f"tensor_parallel: {self.tensor_parallel} does not divide {plan.processes} processes; use a divisor",
            ),
            (
                self.dynamic_sampling and self.tensor_parallel > 1,
                "dynamic_sampling: every rank refills on its own; use tensor_parallel 1",
            ),
            (
                truncated and (self.mismatch_correction != "none" or self.old_policy == "sampler"),
                "mismatch_correction, old_policy: the sampler's log-probs are of a truncated distribution; set top_p 1 "
                "and top_k 0, or mismatch_correction none and old_policy trainer",
            ),
            (
                self.mismatch_correction != "none" and self.old_policy == "sampler",
                "mismatch_correction: with old_policy sampler the ratio is to the sampler, each weight would be "
                "one; set one of the two",
            ),
            (
                (self.delta_schedule == "constant") != (self.delta_final is None),
                "delta_final: belongs to delta_schedule linear or cosine; set both or neither",
            ),
            (
                self.overlong_buffer_tokens >= self.max_response_tokens,
                f"overlong_buffer_tokens: {self.overlong_buffer_tokens} is not below max_response_tokens; lower it",
            ),
            (
                self.micro_batch_tokens < whole,
                f"micro_batch_tokens: {self.micro_batch_tokens} does not hold one sequence of max_prompt_tokens + "
                f"max_response_tokens; use at least {whole}",
            ),
            (
                self.deterministic and self.compile,
                "compile: deterministic cannot hold, kernels are chosen by their speed; set one of the two false",
            ),
            (
                self.deterministic and self.logprob_kernel == "liger",
                "logprob_kernel: deterministic is not known to hold for liger; use chunked",
            ),
            (
                self.deterministic and self.attention == "flash_attention_3",
                "attention: deterministic is not known to hold for flash_attention_3; use sdpa or flash_attention_2",
            ),
            (
                self.deterministic and self.tensor_parallel > 1,
                "tensor_parallel: deterministic is not known to hold for an engine of several ranks; use 1",
            ),
            (not self.train_data, "train_data: names no set; name one"),
            (
                self.eval_every > 0 and not self.eval_data,
                "eval_data: names no set to evaluate on; name one, or set eval_every 0",
            ),
            *(
                (
                    self.rule is not None and getattr(self, key) != getattr(Config, key),
                    f"{key}: belongs to clip, and rule {self.rule} stands in its place; leave one of the two out",
                )
                for key in OF_CLIP
            ),
            (
                self.rule is None and bool(self.rule_parameters),
                f"rule_parameters: there is no rule to take {', '.join(self.rule_parameters)}; the parameters of clip "
                f"{self.clip} are keys of their own",
            ),
            (
                self.advantage == "maxrl" and self.reward_wrong < 0,
                f"advantage: maxrl divides by the mean reward; set reward_wrong 0, it is {self.reward_wrong}",
            ),
            (self.clip_low > 1, f"clip_low: {self.clip_low} would allow negative ratios; use at most 1"),
            (
                self.reward_right <= self.reward_wrong,
                f"reward_right: {self.reward_right} is not above reward_wrong {self.reward_wrong}; swap them",
            ),
        ]
        return [line for wrong, line in mistakes if wrong] + _same_names(self.eval_data)

    def warnings(self) -> list[str]:
        """Choices that are allowed and perhaps not meant."""
        inert = self.updates_per_step == 1 and self.clip != "none" and self.old_policy == "trainer"
        doubts = [
            (inert, f"clip: {self.clip} is inert with updates_per_step 1: every ratio is one, all methods agree"),
            (
                self.surrogate == "gspo" and self.clip != "fixed",
                f"surrogate: gspo judges the ratio of a sequence by the interval of its tokens (clip: {self.clip})",
            ),
            (self.engine == "hf", "engine: hf has one random stream a batch; samples depend on how work is cut"),
        ]
        return [line for doubtful, line in doubts if doubtful]


def _same_names(eval_data: str | list[str]) -> list[str]:
    """A line for each set whose metrics would bear the name of an earlier one: a file's stem, NAME of NAME=PATH."""
    first: dict[str, str] = {}
    lines = []
    for each in [eval_data] if isinstance(eval_data, str) else eval_data:
        left, _, right = each.partition("=")
        name = left if right and "/" not in left else Path(each).stem
        if name in first:
            lines.append(f"eval_data: {first[name]} and {each} would both be {name} in the metrics; rename one file")
        first.setdefault(name, each)
    return lines


def _launched(variable: str, *, default: int, low: int, below: int | None = None) -> int:
    """A number that the launcher put into the environment. Raises ConfigError when it is none from `low` on."""
    text = os.environ.get(variable, str(default))
    if text.isdecimal() and low <= int(text) and (below is None or int(text) < below):
        return int(text)
    allowed = f"a whole number from {low}" + (f" and below {below}, the WORLD_SIZE" if below else "")
    raise ConfigError(
        [f"environment: {variable}: {text!r} is not {allowed}; launchers set it, unset it to start one process"]
    )


class Plan:
    """The batch arithmetic that follows from the configuration and the number of processes.

    Raises ConfigError when WORLD_SIZE or RANK, which the launcher sets, is no number of processes or one of them.
    """

    def __init__(self, cfg: Config):
        self.processes = _launched("WORLD_SIZE", default=1, low=1)
        self.rank = _launched("RANK", default=0, low=0, below=self.processes)
        self.minibatches = max(1, cfg.updates_per_step // cfg.epochs_per_step)
        self.prompts_per_minibatch = cfg.prompts_per_step // self.minibatches  # over all processes
        self.sequences_per_minibatch = self.prompts_per_minibatch * cfg.samples_per_prompt
        self.sequences = cfg.prompts_per_step * cfg.samples_per_prompt  # of a step, over all processes

    def slots(self, rank: int) -> list[int]:
        """Positions in the step's batch of prompts that are this rank's, minibatch after minibatch.

        Minibatch m holds the same prompts on any number of processes, so an update does not depend on how work is cut.
        """
        share = self.prompts_per_minibatch // self.processes
        starts = [m * self.prompts_per_minibatch + rank * share for m in range(self.minibatches)]
        return [start + i for start in starts for i in range(share)]

    def text(self, cfg: Config) -> str:
        """The arithmetic in words."""
        return (
            f"a step:  {cfg.prompts_per_step} prompts x {cfg.samples_per_prompt} samples = {self.sequences:,} "
            "sequences\n"
            f"updates: {cfg.updates_per_step} a step = {self.minibatches} minibatches of "
            f"{self.sequences_per_minibatch:,} sequences x {cfg.epochs_per_step} epoch(s)\n"
            f"a rank:  {self.sequences // self.processes:,} sequences a step on each of {self.processes} process(es), "
            f"micro-batches of {cfg.micro_batch_tokens:,} tokens at most\n"
            f"in all:  {cfg.max_steps:,} steps, {cfg.max_steps * cfg.updates_per_step:,} updates, "
            f"{cfg.max_steps * self.sequences:,} sequences"
        )
