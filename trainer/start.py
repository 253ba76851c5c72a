"""Starts a run: processes, log, policy, engine, verifier, in an order that matters; from a checkpoint if there is one.

with start(cfg, plan, say, clock) as run: ...
"""

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from configs import to_yaml
from configs.memory import LOGPROB_CHUNK_TOKENS, Size, cache_a_token, cpu_cache_bytes, sharding_of
from configs.schema import Config, Plan
from rewards import GraderError, Verifier
from trainer import checkpoint
from trainer.checks import EngineMismatch, check_processes, find_rule
from trainer.clock import Clock
from trainer.imports import quick_imports
from trainer.metrics_log import LogError, MetricsLog, open_log
from trainer.policy import Policy, PolicyOptions
from trainer.ranks import Ranks
from trainer.resume import NEWEST, find_checkpoint, load_state
from trainer.rollout import MOST_SEQUENCES, Engine, EngineError, EngineOptions, SharedEngine, make_engine
from trainer.run import Run
from trainer.state import State
from trainer.stopping import Signals, ending_all_ranks, one_clear_line
from trainer.task import VERIFIER_MEMORY_GIB, Task, load_task
from trainer.tracking import Tracker, write_environment


@contextmanager
def start(cfg: Config, plan: Plan, say: Callable[[str], None], clock: Clock) -> Iterator[Run]:
    """Everything a run needs; resumes from the newest good checkpoint; closes what it opened.

    Mistakes and accidents end the process with one line (stopping.one_clear_line). Raises RuntimeError when processes
    or sharding are not what was asked for.
    """
    with quick_imports():  # here, since --help and --dry_run do without
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
        from transformers.utils.logging import disable_progress_bar

    if cfg.deterministic:
        _be_deterministic()
    # Accelerate starts the process group; the engine, built later, joins it.
    group = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    ranks = Ranks(Accelerator(mixed_precision="no", kwargs_handlers=[group]))
    check_processes(ranks.accelerator)
    if not sys.stderr.isatty():
        disable_progress_bar()
    clock.done("processes")
    with one_clear_line(ValueError, OSError, code=2):
        task = load_task(cfg, say, ranks)
    clock.done("data")
    folder, signals = checkpoint.safe_run_dir(cfg.output_dir, cfg.run_name), Signals()
    with one_clear_line(ValueError, OSError, checkpoint.CheckpointError, code=2):
        lock = checkpoint.RunLock(folder) if ranks.is_main else None
        resumed = find_checkpoint(folder, cfg, task.fingerprint, ranks, say)
        state = load_state(resumed, ranks.rank, ranks.processes) if resumed else State()
        log = _open_files(cfg, folder, resumed, lock, say) if lock else None
    with signals.noted():
        tracker = Tracker(
            folder,
            dataclasses.asdict(cfg),
            mode=cfg.wandb,
            project="bandpo",
            run_id=checkpoint.info(resumed)["wandb_run_id"] if resumed else None,
            max_steps=cfg.max_steps,
            is_main=ranks.is_main,
            log=log,
        )
        clock.done("log")
        with one_clear_line(ValueError, code=2):
            options, layout = _policy_options(cfg, task, ranks)
            policy = Policy.load(str(resumed / "policy") if resumed else cfg.model, options, ranks.accelerator)
            reference = _reference(cfg, options, ranks)
        say(policy.text())
        optimizer = _optimizer(cfg, policy)
        if resumed:
            policy.load_optimizer(resumed / "optimizer.pt", optimizer)
        clock.done("policy")
        verifier, eval_verifier = _verifiers(cfg, signals)
        with _told(folder, ranks):
            engine = _engine(cfg, plan, task, policy, ranks)
        run = Run(
            cfg=cfg,
            plan=plan,
            task=task,
            folder=folder,
            ranks=ranks,
            clock=clock,
            signals=signals,
            tracker=tracker,
            policy=policy,
            reference=reference,
            optimizer=optimizer,
            engine=engine,
            verifier=verifier,
            eval_verifier=eval_verifier,
            rule=find_rule(cfg),
            layout=layout,
            state=state,
            saved_step=-1 if state.pending_metrics else state.step,  # -1: to be saved again, with its score
        )
        try:
            with _told(folder, ranks):
                if resumed:
                    run.sync()
                clock.done("engine")
                say(clock.start_up())
                yield run
                tracker.complete()
        finally:
            verifier.close()
            eval_verifier.close()
            tracker.finish()
            engine.close()  # last: vLLM takes the process group with it
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            if log and lock:
                log.close()
                lock.close()


def _open_files(
    cfg: Config, folder: Path, resumed: Path | None, lock: checkpoint.RunLock, say: Callable[[str], None]
) -> MetricsLog:
    """The files of a run beside its checkpoints: written, and the log of metrics opened. Raises OSError."""
    kept = (resumed / "metrics.jsonl").read_bytes() if resumed else b""
    log, told = open_log(folder / "metrics.jsonl", kept, lock)
    checkpoint.replace_file(folder / "config.yaml", to_yaml(cfg).encode())
    for line in [*told, *write_environment(folder)]:
        say(line)
    return log


@contextmanager
def _told(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Accidents of training end the run with one line; what an engine said goes to a file."""
    accidents = (checkpoint.CheckpointError, LogError, FloatingPointError, EngineError, EngineMismatch, GraderError)
    with one_clear_line(*accidents, code=1), ending_all_ranks(ranks.processes):
        try:
            yield
        except EngineError as error:
            path = folder / f"engine_error_rank_{ranks.rank}.txt"
            with path.open("a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
            again = "; the same command again resumes the run" if (folder / NEWEST).exists() else ""
            raise EngineError(f"{error} (all of it: {path}){again}") from error


def _be_deterministic() -> None:
    """Before anything reaches the device: what torch, flash attention and vLLM need to add in the same order each time.

    torch raises for an operation that it cannot make deterministic.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    if torch.cuda.is_available():  # else a sample's rounding depends on the batch; a CPU does without, it lacks Triton
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    torch.use_deterministic_algorithms(True)


def _policy_options(cfg: Config, task: Task, ranks: Ranks) -> tuple[PolicyOptions, str]:
    """The policy's options with `auto` resolved for this device, and the layout of batching.model_inputs."""
    has_bf16 = ranks.device.type != "cpu" and torch.cuda.is_bf16_supported()
    attention, layout = _attention(cfg)
    options = PolicyOptions(
        sharding=sharding_of(cfg, task.model_size, ranks.processes),
        precision={"auto": "bfloat16" if has_bf16 else "float32"}.get(cfg.precision, cfg.precision),
        attention=attention,
        gradient_checkpointing=cfg.gradient_checkpointing,
        temperature=cfg.temperature,
        vocab_size=task.vocab_size,
        chunk_tokens=LOGPROB_CHUNK_TOKENS,
        trust_remote_code=cfg.trust_remote_code,
    )
    return options, layout


def _attention(cfg: Config) -> tuple[str, str]:
    """The attention kernel, and the layout of sequences that it needs (batching.model_inputs)."""
    if cfg.attention != "auto":
        return cfg.attention, "packed" if cfg.attention.startswith("flash") else "padded"
    from transformers.utils.import_utils import is_flash_attn_2_available

    if torch.cuda.is_available() and is_flash_attn_2_available():
        return "flash_attention_2", "packed"
    return "sdpa_by_sequence", "by_sequence"


def _reference(cfg: Config, options: PolicyOptions, ranks: Ranks) -> Policy | None:
    """The start model, also in a resumed run; it waits in CPU memory."""
    if cfg.kl_coef == 0:
        return None
    reference = Policy.load(cfg.model, options, ranks.accelerator, trainable=False)
    reference.model.to("cpu")
    return reference


def _optimizer(cfg: Config, policy: Policy) -> torch.optim.Optimizer:
    betas = (cfg.adam_betas[0], cfg.adam_betas[1])
    return torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay, fused=True)


def _verifiers(cfg: Config, signals: Signals) -> tuple[Verifier, Verifier]:
    """For rewards, and for evaluations. Grading that is waited for is given up when a signal asks to stop."""
    workers = (cfg.verifier_workers, cfg.verifier_timeout_s, VERIFIER_MEMORY_GIB)
    with one_clear_line(ValueError, code=2):  # a grader of the user's that loaded once and does not a second time
        verifier = Verifier(*workers, cfg.reward, signals.check)
    return verifier, verifier if cfg.reward == "math" else Verifier(*workers, "math", signals.check)


def _engine(cfg: Config, plan: Plan, task: Task, policy: Policy, ranks: Ranks) -> Engine:
    precision, wanted = policy.options.precision, plan.sequences // plan.processes * cfg.tensor_parallel
    cpu_cache = cpu_cache_bytes(cfg, task.model_size, wanted)
    if ranks.device.type == "cpu":
        cache = float(cpu_cache)
    else:  # what the weights leave of the engine's share
        share = cfg.engine_memory_share * torch.cuda.mem_get_info(ranks.device)[1] * cfg.tensor_parallel
        cache = share - task.model_size.parameters * {"float32": 4, "bfloat16": 2}[precision]
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
    where = {"rank": ranks.rank, "world": ranks.processes, "device": str(ranks.device)}
    engine = make_engine(cfg.model, options, **where)
    return SharedEngine(engine, ranks.rank, cfg.tensor_parallel, ranks.gather) if cfg.tensor_parallel > 1 else engine


def sequences_at_once(cfg: Config, size: Size, *, wanted: int, cache_bytes: float, precision: str) -> int:
    """Sequences that an engine decodes at once: all that are wanted, as far as its cache holds them.

    The cache is assumed to hold sequences of half the longest length: most responses end before the limit, and when too
    many do not, vLLM recomputes some of them, which is slow and not wrong.
    """
    tokens = cache_bytes / cache_a_token(size, {"float32": 4, "bfloat16": 2}[precision])
    whole = cfg.max_prompt_tokens + cfg.max_response_tokens
    return max(1, min(wanted, int(tokens / (whole / 2)), MOST_SEQUENCES[cfg.engine]))
