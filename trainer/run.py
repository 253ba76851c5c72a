"""What surrounds the training loop: start-up, resuming, saving, stopping, adding up over ranks.

    with start(cfg, plan, task) as run:    # processes, policy, engine, verifier, log; resumes from a checkpoint
        with run.phase("rollout"): ...     # timed as time/rollout_s
        run.sync(); run.save(); run.log(metrics)

Nothing here knows how the policy is trained: that is train.py.
"""

import ctypes
import dataclasses
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from transformers.utils.logging import disable_progress_bar

from configs import diff, to_yaml
from configs.memory import Size, cache_a_token
from configs.schema import Config, Plan
from data import epoch_length
from rewards import Verifier
from trainer import checkpoint
from trainer.checks import check_processes
from trainer.policy import Policy, PolicyOptions
from trainer.rollout import MOST_SEQUENCES, Engine, EngineError, EngineOptions, Sampling, make_engine, weight_sum
from trainer.task import Task
from trainer.tracking import Tracker, write_environment

# Keys that may differ when a run is resumed: they change what is shown, kept or how fast it goes, not what is learnt.
FREE_KEYS = set(
    """
    max_steps max_epochs dry_run output_dir wandb wandb_project eval_every save_every keep_last keep_best
    on_save_failure max_skipped mismatch_limit micro_batch_tokens logprob_chunk_tokens logprob_kernel attention
    gradient_checkpointing compile sharding tensor_parallel trust_remote_code packing samples_logged plots
    engine_memory_share engine_cpu_cache_gib engine_max_sequences engine_eager verifier_workers
    verifier_memory_gib
    """.split()
)


SAME_CTRL_C_S = 3.0  # a second one within this time is the first, passed on
FIRST_WORDS_S = 10.0  # the other ranks wait this long for rank 0 to tell a mistake
LAST_WORDS_S = 20.0  # a rank that failed has this long to close what it opened


class Stopped(Exception):
    """A signal asked the run to stop; raised where work may be abandoned, never inside an update."""


class StoppedTogether(Stopped):
    """As Stopped, and every rank knows already."""


class StartUp:
    """Seconds from the command to the first step, part by part."""

    def __init__(self) -> None:
        self.last = psutil.Process().create_time()
        self.parts: dict[str, float] = {}

    def done(self, part: str) -> None:
        """Book the time since the last part to this one."""
        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def text(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"start-up: {sum(self.parts.values()):.1f} s ({parts})"


class Run:
    """One process's part of a training run. `step` counts completed steps."""

    def __init__(self, cfg: Config, plan: Plan, task: Task, accelerator: Accelerator):
        self.cfg, self.plan, self.task, self.accelerator = cfg, plan, task, accelerator
        self.folder = checkpoint.safe_run_dir(cfg.output_dir, cfg.run_name)
        self.root = self.folder / "checkpoints"
        self.device = accelerator.device
        self.is_main = accelerator.is_main_process
        has_bf16 = self.device.type != "cpu" and torch.cuda.is_bf16_supported()
        self.precision = {"auto": "bfloat16" if has_bf16 else "float32"}.get(cfg.precision, cfg.precision)
        self.attention, self.layout = _attention(cfg)
        self.step = 0
        self.tokens_seen = 0
        self.prompts_drawn = 0  # position in the order of training prompts
        self.saved_step = 0  # nothing to save before the first step
        self.score: float | None = None  # mean@k of the latest evaluation, and its step
        self.score_step = -1
        self.skipped_in_a_row = 0
        self.unlogged: dict[str, float] = {}  # metrics of the last step while its evaluation is still to be made
        self.times: dict[str, float] = {}
        self.peak_gib = 0.0  # of memory in use at the end of a phase
        self.signal = 0
        self.parent = os.getppid()
        self.lock: TextIO | None = None
        self.policy: Policy
        self.reference: Policy | None = None
        self.optimizer: torch.optim.Optimizer
        self.engine: Engine
        self.verifier: Verifier  # rewards
        self.eval_verifier: Verifier  # evaluations: the tolerant one, whatever the reward is
        self.tracker: Tracker

    # ---- adding up over ranks ----

    def reduce(self, sums: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
        """Sum of each entry over all ranks; one collective, one read from the device. All ranks have the same keys."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in sums.values()])
        total: Any = self.accelerator.reduce(stacked, "sum")
        return dict(zip(sums, total.tolist(), strict=True))

    def largest(self, values: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
        """Maximum of each entry over all ranks."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values.values()])
        rows: Any = self.accelerator.gather(stacked)
        return dict(zip(values, rows.view(-1, len(values)).amax(0).tolist(), strict=True))

    def gather_objects(self, rows: list[Any]) -> list[Any]:
        """The rows of all ranks, in the order of ranks, on every rank."""
        if self.accelerator.num_processes == 1:
            return rows
        parts: list[Any] = [[] for _ in range(self.accelerator.num_processes)]
        torch.distributed.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    # ---- time and memory ----

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase as time/<name>_s, GPU work included."""
        start = time.perf_counter()
        yield
        torch.get_device_module(self.device).synchronize()
        self.times[f"time/{name}_s"] = self.times.get(f"time/{name}_s", 0.0) + time.perf_counter() - start
        self.peak_gib = max(self.peak_gib, memory_in_use_gib(self.device))

    def take_times(self) -> dict[str, float]:
        """Phase times since the last call (this rank's)."""
        times, self.times = self.times, {}
        return times

    # ---- stopping ----

    def check_stop(self, _: int = 0) -> None:
        """Raise Stopped when this process was asked to stop; for callbacks of work that may be abandoned.

        Processes that share an engine go on to the end of their call: alone, none of them can leave it.
        """
        if self.signal and self.cfg.tensor_parallel == 1:
            raise Stopped

    def agreed_to_stop(self) -> bool:
        """Whether any rank was asked to stop; collective, so that all of them leave the loop together."""
        agreed = int(self.largest({"signal": float(self.signal)})["signal"])
        if agreed:  # else leave it alone: a signal may have arrived meanwhile, and is for the next time
            self.signal = agreed
        return agreed != 0

    def exit_code(self) -> int:
        """130 after Ctrl-C, 0 after SIGTERM (pre-emption) or a completed run; collective.

        1 when the SIGTERM came from the death of a launcher: those of other machines then end as well, where after 0
        they would wait minutes for the one that is gone.
        """
        orphaned = self.signal == signal.SIGTERM and os.getppid() != self.parent
        if self.largest({"orphaned": float(orphaned)})["orphaned"]:
            self.tracker.say("stopped since a launcher died, on this machine or another one")
            return 1
        return 130 if self.signal == signal.SIGINT else 0

    # ---- weights to the engine ----

    def sync(self) -> None:
        """New weights into the engine, and the check that they arrived. Raises RuntimeError when they did not."""
        names = self.policy.compared_names(matrices=self.cfg.tensor_parallel == 1)
        ours: dict[str, float] = {}

        def summed() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in self.policy.named_weights(self.precision):
                if name in names:
                    ours[name] = weight_sum(weight)
                yield name, weight

        self.engine.wake()  # which also empties torch's cache: the engine takes its memory elsewhere
        self.engine.sync_weights(summed())
        theirs = self.engine.checksum(names)
        # The same numbers summed in double precision: any real update of a weight shows, the order of the sum does not.
        wrong = [n for n, value in theirs.items() if not abs(value - ours[n]) <= 1e-6]
        if wrong or not theirs:
            raise RuntimeError(
                f"after the sync the engine's weights differ from the trainer's: {wrong[:3] or 'no name fits'}"
            )

    # ---- what a run leaves behind ----

    def log(self, metrics: dict[str, float]) -> None:
        self.tracker.log(self.step, metrics)

    @property
    def epochs(self) -> float:
        """Passes over the training prompts so far, those that refills used up included."""
        return self.prompts_drawn / epoch_length(len(self.task.train), self.cfg.prompts_per_step)

    @property
    def finished(self) -> bool:
        cfg = self.cfg
        return self.step >= cfg.max_steps or (cfg.max_epochs is not None and self.epochs >= cfg.max_epochs)

    def is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def save(self) -> None:
        """Write a checkpoint of the completed steps, unless there is one; collective.

        A write that fails is told, leaves the earlier checkpoints alone, and ends the run or not as configured.
        """
        if self.saved_step == self.step:
            return
        started = time.perf_counter()
        weights, moments = self.policy.full_weights(), self.policy.full_optimizer(self.optimizer)  # collective
        error = ""
        try:
            if self.is_main:
                checkpoint.begin(self.root, self.step)
        except checkpoint.CheckpointError as failed:
            error = str(failed)
        self.accelerator.wait_for_everyone()
        folder = checkpoint.saving_dir(self.root, self.step)
        try:
            if not error:
                with checkpoint.writing():
                    if self.is_main:
                        self.policy.write(folder / "policy", weights)
                        self.task.tokenizer.save_pretrained(folder / "policy")
                        torch.save(moments, folder / "optimizer.pt")
                        checkpoint.write_text(folder / "config.yaml", to_yaml(self.cfg))
        except checkpoint.CheckpointError as failed:
            error = str(failed)
        errors = [e for e in self.gather_objects([error]) if e]
        if self.is_main and not errors:
            score = {"score": self.score} if self.score is not None and self.score_step == self.step else {}
            info = {
                "tokens_seen": self.tokens_seen,
                "prompts_drawn": self.prompts_drawn,
                "skipped_in_a_row": self.skipped_in_a_row,
                "unlogged": self.unlogged,
                "wandb_run_id": self.tracker.run_id,
                **score,
            }
            try:
                checkpoint.commit(self.root, self.step, info)
                checkpoint.prune(self.root, self.cfg.keep_last, self.cfg.keep_best)
            except checkpoint.CheckpointError as failed:
                errors.append(str(failed))
        elif self.is_main:
            checkpoint.discard(self.root, self.step)
        errors = [e for e in self.gather_objects(errors[:1] if self.is_main else []) if e]
        if not errors:
            self.saved_step = self.step
            self.tracker.say(f"checkpoint of step {self.step} saved in {time.perf_counter() - started:.1f} s")
        elif self.cfg.on_save_failure == "stop":
            raise checkpoint.CheckpointError(f"step {self.step}: {errors[0]}")
        else:
            self.tracker.say(f"warning: step {self.step}: {errors[0]}; training goes on (on_save_failure: continue)")

    def sampling(self) -> Sampling:
        cfg = self.cfg
        return Sampling(cfg.temperature, cfg.top_p, cfg.top_k, cfg.max_response_tokens, self.task.stop_token_ids)


def _attention(cfg: Config) -> tuple[str, str]:
    """The attention kernel, and how sequences are laid out for it (batching.lay_out)."""
    name = cfg.attention
    if name == "auto":
        from transformers.utils.import_utils import is_flash_attn_2_available

        name = "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"
    if cfg.packing == "off":
        return name, "padded"
    if name == "sdpa":
        return "sdpa_by_sequence", "by_sequence"
    return name, "packed" if name.startswith("flash") or cfg.packing == "on" else "padded"


def memory_in_use_gib(device: torch.device) -> float:
    """What a GPU holds now, of whatever program: the trainer's tensors, the engine's, the libraries' own. On a CPU the
    largest resident size of this process so far."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


@contextmanager
def start(
    cfg: Config, plan: Plan, task: Task, say: Callable[[str], None], clock: StartUp | None = None
) -> Iterator[Run]:
    """Everything a run needs, in an order that matters; resumes from the newest good checkpoint; closes what it opened.

    Raises ValueError for a run that cannot be resumed with this configuration, RuntimeError when processes, sharding
    or engine are not what was asked for.
    """
    clock = clock or StartUp()
    if cfg.deterministic:
        _be_deterministic()
    # Accelerate starts the process group; the engine, built later, joins it.
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))]
    )
    check_processes(accelerator)
    if not sys.stderr.isatty():
        disable_progress_bar()
    run = Run(cfg, plan, task, accelerator)
    _die_with_launcher()
    with one_clear_line(ValueError, checkpoint.CheckpointError, code=2):
        run.lock = checkpoint.lock_run(run.folder) if run.is_main else None
        resumed = _find_checkpoint(run, say)
    with _noting_signals(run):
        info = checkpoint.info(resumed) if resumed else {}
        run.tracker = Tracker(
            run.folder,
            dataclasses.asdict(cfg),
            mode=cfg.wandb,
            project=cfg.wandb_project,
            run_id=info.get("wandb_run_id"),
            max_steps=cfg.max_steps,
            is_main=run.is_main,
        )
        if run.is_main:
            checkpoint.write_text(run.folder / "config.yaml", to_yaml(cfg))
            write_environment(run.folder)
        clock.done("processes and log")
        with one_clear_line(ValueError, code=2):
            _load_policy(run, str(resumed / "policy") if resumed else cfg.model)
        say(run.policy.text())
        if resumed:
            run.policy.load_optimizer(resumed / "optimizer.pt", run.optimizer)
            run.step = run.saved_step = checkpoint.step_of(resumed)
            run.tokens_seen, run.skipped_in_a_row = info["tokens_seen"], info["skipped_in_a_row"]
            run.prompts_drawn = info["prompts_drawn"]
            run.unlogged = info["unlogged"]
            if run.unlogged:  # to be saved again, with the score
                run.saved_step = -1
        clock.done("policy")
        _start_sampling(run)
        if resumed:
            run.sync()
        clock.done("engine")
        say(clock.text())
        try:
            accidents = (checkpoint.CheckpointError, FloatingPointError, EngineError)
            with one_clear_line(*accidents, code=1), _ending_all_ranks(plan):
                try:
                    yield run
                except EngineError as error:
                    path = run.folder / f"engine_error_rank_{plan.rank}.txt"
                    path.write_text(traceback.format_exc(), encoding="utf-8")
                    raise EngineError(f"{error} (all of it: {path}); the same command again resumes the run") from error
        finally:
            run.verifier.close()
            run.eval_verifier.close()
            run.tracker.finish()
            run.engine.close()  # last: vLLM takes the process group with it
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            if run.lock:
                run.lock.close()


def _be_deterministic() -> None:
    """Before anything reaches the device: what torch, flash attention and vLLM need to add in the same order each time.

    torch raises for an operation that it cannot make deterministic.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    if torch.cuda.is_available():  # else a sample's rounding depends on the batch; a CPU does without, it lacks Triton
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    torch.use_deterministic_algorithms(True)


def _load_policy(run: Run, path: str) -> None:
    cfg = run.cfg
    options = PolicyOptions(
        sharding=cfg.sharding,
        precision=run.precision,
        attention=run.attention,
        gradient_checkpointing=cfg.gradient_checkpointing,
        compile=cfg.compile,
        temperature=cfg.temperature,
        vocab_size=run.task.vocab_size,
        chunk_tokens=cfg.logprob_chunk_tokens,
        logprob_kernel=cfg.logprob_kernel,
        trust_remote_code=cfg.trust_remote_code,
    )
    run.policy = Policy.load(path, options, run.accelerator, trainable=True)
    run.optimizer = torch.optim.AdamW(
        run.policy.parameters(),
        lr=cfg.lr,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    if cfg.kl_coef > 0:  # the model started from, also in a resumed run
        run.reference = Policy.load(cfg.model, options, run.accelerator, trainable=False)
        if cfg.reference_offload:
            run.reference.to("cpu")


def _start_sampling(run: Run) -> None:
    cfg = run.cfg
    options = EngineOptions(
        engine=cfg.engine,
        dtype=run.precision,
        vocab_size=run.task.vocab_size,
        max_model_tokens=cfg.max_prompt_tokens + cfg.max_response_tokens,
        max_sequences=cfg.engine_max_sequences
        or sequences_at_once(
            cfg,
            Size.of(run.policy.causal_lm.config),
            wanted=run.plan.sequences // run.plan.processes * cfg.tensor_parallel,
            bytes_per_number={"float32": 4, "bfloat16": 2}[run.precision],
            device_bytes=None if run.device.type == "cpu" else torch.cuda.mem_get_info(run.device)[1],
        ),
        memory_share=cfg.engine_memory_share,
        cpu_cache_gib=cfg.engine_cpu_cache_gib,
        tensor_parallel=cfg.tensor_parallel,
        eager=cfg.engine_eager,
        trust_remote_code=cfg.trust_remote_code,
    )
    workers = (cfg.verifier_workers, cfg.verifier_timeout_s, cfg.verifier_memory_gib)
    with one_clear_line(ValueError, code=2):  # a grader of the user's that loaded once and does not a second time
        run.verifier = Verifier(*workers, cfg.reward)
    run.eval_verifier = run.verifier if cfg.reward == "math" else Verifier(*workers, "math")
    run.engine = make_engine(
        cfg.model,
        options,
        rank=run.accelerator.process_index,
        world=run.accelerator.num_processes,
        device=str(run.device),
    )


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


def _find_checkpoint(run: Run, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, the same on every rank; metrics after it are dropped, to be written again."""
    found: list[Any] = [None, ""]
    if run.is_main:
        try:
            path, warnings = checkpoint.recover(run.root)
            for line in warnings:
                say(f"warning: {line}")
            if path:
                _refuse_changed_keys(path, run.cfg)
            elif (run.folder / "config.yaml").exists():
                say(f"{run.folder}: no checkpoint yet, starting from step 0")
            # The line of a step whose evaluation was interrupted is written anew.
            last = checkpoint.step_of(path) - bool(checkpoint.info(path)["unlogged"]) if path else -1
            for line in checkpoint.truncate_metrics(run.folder / "metrics.jsonl", last):
                say(line)
            if path:
                say(f"resuming {run.folder} after step {checkpoint.step_of(path)}")
            found = [path, ""]
        except (ValueError, checkpoint.CheckpointError) as error:
            found = [None, str(error)]
    broadcast_object_list(found)
    if found[1]:
        raise ValueError(found[1])
    return found[0]


def _refuse_changed_keys(path: Path, cfg: Config) -> None:
    old = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    scheduled = cfg.lr_schedule != "constant" or cfg.delta_schedule != "constant"
    fixed = {"max_steps", "max_epochs"} if scheduled else set()  # the length of lr_schedule and delta_schedule
    changed = {key: pair for key, pair in diff(old, cfg).items() if key not in FREE_KEYS - fixed}
    if changed:
        keys = "; ".join(f"{key}: {before!r} then, {after!r} now" for key, (before, after) in changed.items())
        raise ValueError(
            f"run_name: {cfg.run_name!r} cannot be resumed with other settings ({keys}); "
            "choose another run_name, or give the old values"
        )


@contextmanager
def _noting_signals(run: Run) -> Iterator[None]:
    """SIGTERM and Ctrl-C are noted, and heeded between phases; a later Ctrl-C stops at once.

    One Ctrl-C arrives up to three times: from the terminal, passed on by the launcher, and as a SIGTERM when the
    launcher has died of it.
    """
    noted_s = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal noted_s
        if not run.signal:
            run.signal, noted_s = number, time.monotonic()
            line = f"\n{signal.Signals(number).name}: saving a checkpoint and stopping; Ctrl-C again to stop at once\n"
            os.write(2, line.encode())  # print() may be what was interrupted
        elif number == signal.SIGINT and time.monotonic() > noted_s + SAME_CTRL_C_S:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_launcher() -> None:
    """Ask the kernel (Linux) for a SIGTERM when the launcher dies, so that no trainer is left running without one.

    Started without a launcher, the parent is a shell, which may well end before the training does (nohup).
    """
    launched = "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ  # by torchrun; by accelerate launch
    if sys.platform == "linux" and launched:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


@contextmanager
def _ending_all_ranks(plan: Plan) -> Iterator[None]:
    """An error on one of several ranks ends this process soon, whatever its last words wait for.

    The launcher ends the others when one process ends, and they may be waiting for this one in a collective.
    """
    try:
        yield
    finally:
        error = sys.exception()
        if error and plan.processes > 1:

            def leave() -> None:
                traceback.print_exception(error)
                os._exit(1)

            timer = threading.Timer(LAST_WORDS_S, leave)
            timer.daemon = True
            timer.start()


@contextmanager
def one_clear_line(*kinds: type[Exception], code: int) -> Iterator[None]:
    """These errors inside the block end the process with one line and no traceback.

    `code` is 2 for a user's mistake, 1 for an accident of training.

    Launchers end all processes when one ends, so rank 0 goes first: a mistake that all ranks meet is told once.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        yield
    except SystemExit:  # already told by rank 0
        time.sleep(FIRST_WORDS_S if rank else 0)
        raise
    except kinds as error:
        time.sleep(FIRST_WORDS_S if rank else 0)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None
