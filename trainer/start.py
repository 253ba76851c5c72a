"""Start or resume of a run: process group, data, logs, policy, engine and verifiers.

with start(cfg, plan, info, clock) as run: ...
"""

import dataclasses
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch

from configs import to_yaml
from configs.memory import LOGPROB_CHUNK_TOKENS, Size, cache_a_token, cpu_cache_bytes, sharding_of
from configs.schema import Config, Plan
from rewards import GraderError, Verifier
from trainer import checkpoint
from trainer.clock import Clock, gc_paused
from trainer.logging import LogError, Tracker, restore_rows, write_environment
from trainer.lora import Lora, StartModel
from trainer.policy import Policy, PolicyOptions
from trainer.preflight import check_processes, find_rule
from trainer.ranks import USER_ERRORS, Ranks
from trainer.resume import NEWEST, find_checkpoint, load_state
from trainer.rollout import (
    MOST_SEQUENCES,
    Engine,
    EngineError,
    EngineMismatch,
    EngineOptions,
    SharedEngine,
    make_engine,
)
from trainer.run import Run
from trainer.stopping import Signals, abort_all_ranks_on_error, exit_on_error
from trainer.task import VERIFIER_MEMORY_GIB, Info, Task, load_task
from trainer.types import State

FAILURES = (checkpoint.CheckpointError, LogError, FloatingPointError, EngineError, EngineMismatch, GraderError)


@contextmanager
def start(cfg: Config, plan: Plan, info: Info, clock: Clock) -> Iterator[Run]:
    """Start a run, or resume it from its newest undamaged checkpoint. Closes all components at the end of the block.

    Invalid config or data and failures during training end the process with a one-line error (stopping.exit_on_error).
    Raises RuntimeError if the sharding is not as requested.
    """
    ranks, signals = start_processes(cfg), Signals()
    with ExitStack() as stack:
        with exit_on_error(*USER_ERRORS, code=2):
            task = load_task(cfg, info, ranks)
            folder = checkpoint.safe_run_dir(cfg.output_dir, cfg.run_name)
            lock = checkpoint.RunLock(folder) if ranks.is_main else None
            resumed = find_checkpoint(folder, cfg, task.fingerprint, ranks, info)
            state = load_state(resumed, ranks.rank, ranks.processes) if resumed else State()
            rows = (resumed / "metrics.jsonl").read_bytes() if resumed else b""
            if lock:
                stack.callback(lock.close)
                lines = restore_rows(folder / "metrics.jsonl", rows)
                checkpoint.replace_file(folder / "config.yaml", to_yaml(cfg).encode())
                for line in [*lines, *write_environment(folder)]:
                    info(line)
        stack.enter_context(signals.handled())
        tracker = Tracker(
            folder,
            dataclasses.asdict(cfg),
            mode=cfg.wandb,
            project="bandpo",
            run_id=checkpoint.info(resumed)["wandb_run_id"] if resumed else None,
            max_steps=cfg.max_steps,
            lock=lock,
            rows=rows,
        )
        with exit_on_error(ValueError, code=2):
            models = load_models(cfg, task, ranks, resumed)
            info(models["policy"].text())
            verifiers = make_verifiers(cfg, signals)
        with one_line_per_failure(folder, ranks):
            engine = start_engine(cfg, plan, task, models["policy"], ranks)
        stack.callback(ranks.accelerator.end_training)  # destroys the process group; callbacks run in reverse order
        for close in (engine.close, tracker.finish, *(each.close for each in verifiers.values())):
            stack.callback(close)
        run = Run(
            cfg=cfg,
            plan=plan,
            task=task,
            folder=folder,
            ranks=ranks,
            clock=clock,
            signals=signals,
            tracker=tracker,
            engine=engine,
            rule=find_rule(cfg),
            state=state,
            saved_step=state.step,
            **models,
            **verifiers,
        )
        with one_line_per_failure(folder, ranks):
            if resumed:
                run.sync_weights()
            info(f"start-up: {time.time() - psutil.Process().create_time():.1f} s")
            yield run
            tracker.complete()


@contextmanager
def one_line_per_failure(folder: Path, ranks: Ranks) -> Iterator[None]:
    """End the process with a one-line error for a failure during training. An engine's traceback goes to a file."""
    with exit_on_error(*FAILURES, code=1), abort_all_ranks_on_error(ranks.processes):
        try:
            yield
        except EngineError as error:
            path = folder / f"engine_error_rank_{ranks.rank}.txt"
            with path.open("a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
            resume = "; the same command resumes the run" if (folder / NEWEST).exists() else ""
            raise EngineError(f"{error} (traceback in {path}){resume}") from error


# ---- processes and files ----


def start_processes(cfg: Config) -> Ranks:
    """Start the process group with Accelerate. vLLM joins it later."""
    with gc_paused():  # imported here: --help and --dry_run do not need them
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
        from transformers.utils.logging import disable_progress_bar

    # Accelerate's gather calls a function that torch has deprecated, and every rank would print a warning.
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated", FutureWarning)
    if not sys.stderr.isatty():
        disable_progress_bar()
    if cfg.deterministic:
        use_deterministic_algorithms()
    group = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    with exit_on_error(ValueError, code=2):
        ranks = Ranks(Accelerator(mixed_precision="no", kwargs_handlers=[group]))
        check_processes(ranks.accelerator)
    return ranks


def use_deterministic_algorithms() -> None:
    """Make torch, flash attention and vLLM deterministic. Call it before anything uses the device.

    torch raises RuntimeError for an operation without a deterministic algorithm.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    if torch.cuda.is_available():  # needs Triton; makes the rounding of a sample independent of its batch
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    torch.use_deterministic_algorithms(True)


# ---- models ----


def load_models(cfg: Config, task: Task, ranks: Ranks, resumed: Path | None) -> dict[str, Any]:
    """Load the fields `policy`, `reference`, `teacher` and `optimizer` of a Run. Raises ValueError."""
    has_bf16 = ranks.device.type != "cpu" and torch.cuda.is_bf16_supported()
    precision = {"auto": "bfloat16" if has_bf16 else "float32"}.get(cfg.precision, cfg.precision)
    adapter = resumed / "adapter" if resumed else None
    lora = Lora(cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed, adapter) if cfg.lora_rank else None
    options = PolicyOptions(
        sharding=sharding_of(cfg, task.model_size, ranks.processes),
        precision=precision,
        attention=cfg.attention,
        gradient_checkpointing=cfg.gradient_checkpointing,
        temperature=cfg.temperature,
        vocab_size=task.vocab_size,
        chunk_tokens=LOGPROB_CHUNK_TOKENS,
        trust_remote_code=cfg.trust_remote_code,
        lora=lora,
    )
    source = str(resumed / "policy") if resumed and not lora else cfg.model
    policy = Policy.load(source, options, ranks.accelerator)
    reference = StartModel(policy) if lora and cfg.kl_coef else None
    if cfg.kl_coef and not lora:  # cfg.model is the start model, also in a resumed run
        reference = Policy.load(cfg.model, options, ranks.accelerator, trainable=False)
    teacher = Policy.load(cfg.teacher, options, ranks.accelerator, trainable=False) if cfg.teacher else None
    if teacher and teacher.layout != policy.layout:
        raise ValueError(
            f"teacher: it needs {teacher.layout} sequences, the policy {policy.layout} ones (got attention "
            f"{cfg.attention}); use attention: sdpa, which pads"
        )
    betas = (cfg.adam_betas[0], cfg.adam_betas[1])
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay, fused=True
    )
    if resumed:
        policy.load_optimizer(resumed / "optimizer.pt", optimizer)
    return {"policy": policy, "reference": reference, "teacher": teacher, "optimizer": optimizer}


def make_verifiers(cfg: Config, signals: Signals) -> dict[str, Any]:
    """Start the fields `verifier` and `eval_verifier` of a Run. A signal interrupts the wait for grades."""
    workers = (cfg.verifier_workers, cfg.verifier_timeout_s, VERIFIER_MEMORY_GIB)
    stop = signals.raise_if_interrupted
    verifier = Verifier(*workers, cfg.reward, stop, cfg.reward_concurrency, cfg.reward_timeout_s)
    tolerant = verifier if cfg.reward == "math" else Verifier(*workers, "math", stop)
    return {"verifier": verifier, "eval_verifier": tolerant}


def start_engine(cfg: Config, plan: Plan, task: Task, policy: Policy, ranks: Ranks) -> Engine:
    """Start the inference engine of this rank, or its part of an engine shared by `tensor_parallel` ranks."""
    precision, wanted = policy.options.precision, plan.sequences // plan.processes * cfg.tensor_parallel
    cpu_cache = cpu_cache_bytes(cfg, task.model_size, wanted)
    cache = float(cpu_cache)
    if ranks.device.type != "cpu":  # the engine's share of the memory minus the weights
        share = cfg.engine_memory_share * torch.cuda.mem_get_info(ranks.device)[1] * cfg.tensor_parallel
        cache = share - task.model_size.parameters * getattr(torch, precision).itemsize
    options = EngineOptions(
        engine=cfg.engine,
        dtype=precision,
        vocab_size=task.vocab_size,
        max_model_tokens=cfg.max_prompt_tokens + cfg.max_response_tokens,
        max_sequences=sequences_at_once(cfg, task.model_size, wanted=wanted, cache_bytes=cache, precision=precision),
        memory_share=cfg.engine_memory_share,
        cpu_cache_bytes=cpu_cache,
        tensor_parallel=cfg.tensor_parallel,
        arguments=cfg.vllm,
        trust_remote_code=cfg.trust_remote_code,
    )
    engine = make_engine(cfg.model, options, rank=ranks.rank, world=ranks.processes, device=str(ranks.device))
    return SharedEngine(engine, ranks.rank, cfg.tensor_parallel, ranks.gather) if cfg.tensor_parallel > 1 else engine


def sequences_at_once(cfg: Config, size: Size, *, wanted: int, cache_bytes: float, precision: str) -> int:
    """Return the number of sequences that an engine decodes at once: `wanted`, limited by its KV cache.

    Each sequence counts with half of the maximum length, since most responses end before the limit. If too many are
    longer, vLLM recomputes some of them, which is slow but correct.
    """
    tokens = cache_bytes / cache_a_token(size, getattr(torch, precision).itemsize)
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    return max(1, min(wanted, int(tokens / (longest / 2)), MOST_SEQUENCES[cfg.engine]))
