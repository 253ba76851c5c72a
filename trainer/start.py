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
from configs.memory import Size, cache_a_token
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
from trainer.task import Task, load_task
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
            project=cfg.wandb_project,
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
            saved_step=-1 if state.unlogged else state.step,  # -1: to be saved again, with its score
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
    """What `auto` stands for on this device; and how sequences are laid out for the attention kernel."""
    has_bf16 = ranks.device.type != "cpu" and torch.cuda.is_bf16_supported()
    attention, layout = _attention(cfg)
    options = PolicyOptions(
        sharding=cfg.sharding,
        precision={"auto": "bfloat16" if has_bf16 else "float32"}.get(cfg.precision, cfg.precision),
        attention=attention,
        gradient_checkpointing=cfg.gradient_checkpointing,
        compile=cfg.compile,
        temperature=cfg.temperature,
        vocab_size=task.vocab_size,
        chunk_tokens=cfg.logprob_chunk_tokens,
        logprob_kernel=cfg.logprob_kernel,
        trust_remote_code=cfg.trust_remote_code,
    )
    return options, layout


def _attention(cfg: Config) -> tuple[str, str]:
    """The attention kernel, and the layout of sequences that it takes (batching.lay_out)."""
    name = cfg.attention
    if name == "auto":
        from transformers.utils.import_utils import is_flash_attn_2_available

        name = "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"
    if cfg.packing == "off":
        return name, "padded"
    if name == "sdpa":
        return "sdpa_by_sequence", "by_sequence"
    return name, "packed" if name.startswith("flash") or cfg.packing == "on" else "padded"


def _reference(cfg: Config, options: PolicyOptions, ranks: Ranks) -> Policy | None:
    """The model started from, also in a resumed run."""
    if cfg.kl_coef == 0:
        return None
    reference = Policy.load(cfg.model, options, ranks.accelerator, trainable=False)
    if cfg.reference_offload:
        reference.to("cpu")
    return reference


def _optimizer(cfg: Config, policy: Policy) -> torch.optim.Optimizer:
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    return torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay, fused=True)


def _verifiers(cfg: Config, signals: Signals) -> tuple[Verifier, Verifier]:
    """For rewards, and for evaluations. Grading that is waited for is given up when a signal asks to stop."""
    workers = (cfg.verifier_workers, cfg.verifier_timeout_s, cfg.verifier_memory_gib)
    with one_clear_line(ValueError, code=2):  # a grader of the user's that loaded once and does not a second time
        verifier = Verifier(*workers, cfg.reward, signals.check)
    return verifier, verifier if cfg.reward == "math" else Verifier(*workers, "math", signals.check)


def _engine(cfg: Config, plan: Plan, task: Task, policy: Policy, ranks: Ranks) -> Engine:
    precision = policy.options.precision
    options = EngineOptions(
        engine=cfg.engine,
        dtype=precision,
        vocab_size=task.vocab_size,
        max_model_tokens=cfg.max_prompt_tokens + cfg.max_response_tokens,
        max_sequences=cfg.engine_max_sequences
        or sequences_at_once(
            cfg,
            Size.of(policy.causal_lm.config),
            wanted=plan.sequences // plan.processes * cfg.tensor_parallel,
            bytes_per_number={"float32": 4, "bfloat16": 2}[precision],
            device_bytes=None if ranks.device.type == "cpu" else torch.cuda.mem_get_info(ranks.device)[1],
        ),
        memory_share=cfg.engine_memory_share,
        cpu_cache_gib=cfg.engine_cpu_cache_gib,
        tensor_parallel=cfg.tensor_parallel,
        eager=cfg.engine_eager,
        trust_remote_code=cfg.trust_remote_code,
    )
    where = {"rank": ranks.rank, "world": ranks.processes, "device": str(ranks.device)}
    engine = make_engine(cfg.model, options, **where)
    return SharedEngine(engine, ranks.rank, cfg.tensor_parallel, ranks.gather) if cfg.tensor_parallel > 1 else engine


def sequences_at_once(
    cfg: Config, size: Size, *, wanted: int, bytes_per_number: int, device_bytes: float | None
) -> int:
    """How many sequences an engine decodes at once when nobody says: all that are wanted, as far as there is room.

    The room for keys and values is what the weights leave of the engine's share of `device_bytes`, or the cache on a
    CPU (None). It is taken to hold sequences of half the longest length: most answers end before the limit, and when
    too many do not, vLLM computes some of them twice, which is slow and not wrong.
    """
    if device_bytes is None:
        room = cfg.engine_cpu_cache_gib * 2**30
    else:
        share = cfg.engine_memory_share * device_bytes * cfg.tensor_parallel  # of the ranks that share an engine
        room = share - size.parameters * bytes_per_number
    tokens = room / cache_a_token(size, bytes_per_number)
    whole = cfg.max_prompt_tokens + cfg.max_response_tokens
    return max(1, min(wanted, int(tokens / (whole / 2)), MOST_SEQUENCES[cfg.engine]))
