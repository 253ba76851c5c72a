"""Evaluate any checkpoint: mean@K, pass@k and maj@K on benchmark sets, with both graders.

    python -m eval.run runs/NAME                                                # or --model runs/NAME
    python -m eval.run --model DIR_OR_HUB_ID --sets aime24,amc23 --samples 32

A run stands for its newest checkpoint. For a run or checkpoint, prompt, sampling and sets default to its training
settings. Starts one sampling process per GPU, or one on the CPU, without a launcher. Writes to OUTPUT_DIR/NAME/:

    settings.json      settings that affect samples; a second call with other settings raises an error
    answers.jsonl      every response as it finishes; a second call samples only missing responses
    samples.jsonl      all responses with both verdicts         results.json    all metrics
    log_*.txt          output of the sampling processes

A second call may add sets or samples. It grades all responses again, so a new verifier needs no new samples. Not
supported: several machines (run some sets on each), greedy decoding except with --top_k 1.
"""

import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from itertools import chain
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from configs import knob, load_or_exit
from configs.memory import Size, cpu_cache_bytes
from configs.schema import PAPER, Config, vllm_problems
from data import (
    Problem,
    PromptBuilder,
    build_prompts,
    check_names,
    load_problems,
    set_name,
    stop_token_ids,
    vocabulary_size,
)
from data.tables import read_json_object
from eval.compare import text_table
from eval.evaluate import Grading, Job, Prompts, Row, generate, in_order, jobs, share, summarize
from eval.records import find_policy, read_lines
from rewards import Verifier
from trainer.checkpoint import replace_file
from trainer.preflight import check_model, files_hash, short_hash
from trainer.rollout import MOST_SEQUENCES, EngineOptions, Sampling, make_engine
from trainer.stopping import hard_exit
from trainer.task import VERIFIER_MEMORY_GIB


def shared(name: str, **changes: Any) -> Any:
    """Define an option with the `knob` arguments of training's option `name`, updated by `changes`."""
    return knob(**{**Config.__dataclass_fields__[name].metadata, "section": "", **changes})


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation config. Defaults are those of the paper: 32 samples at temperature 1, DAPO's prompt, 4,096 tokens."""

    model: str = knob(
        "Qwen/Qwen2.5-3B-Instruct",
        "folder or hub id; with runs/NAME or a checkpoint of it, settings of the run are the defaults",
        section="Input",
    )
    sets: str | list[str] = knob("aime24,aime25,amc23", "comma-separated dataset names, hub ids or files")
    prompt_column: str | None = shared("prompt_column")
    answer_column: str | None = shared("answer_column")
    samples: int = knob(32, "responses per problem", symbol="k", source=PAPER, low=1, high=1000)
    output_dir: str = knob("evals", "parent folder of the results")
    name: str = knob("", "folder of the results; empty: RUN_STEP_SETS, or MODEL_SETS")
    seed: int = shared("seed", help="seed of sampling")

    prompt_template: str = shared("prompt_template", section="Prompt")
    system_prompt: str = shared("system_prompt")
    chat_template: bool = shared("chat_template")
    chat_template_kwargs: dict[str, Any] = shared("chat_template_kwargs")
    max_prompt_tokens: int = shared("max_prompt_tokens")

    temperature: float = shared("temperature", help="sampling temperature", section="Sampling")
    top_p: float = shared("top_p")
    top_k: int = shared("top_k", help="number of most likely tokens to sample from; 0: off; 1: greedy")
    max_response_tokens: int = shared("max_response_tokens")
    stop: list[str] = shared("stop")

    engine: Literal["vllm", "hf"] = shared("engine", section="Machine")
    precision: Literal["auto", "float32", "bfloat16"] = shared(
        "precision", help="dtype; auto: bfloat16 on a GPU that supports it"
    )
    processes: int = knob(0, "sampling processes, one GPU each; 0: one per visible GPU, one on a CPU", low=0)
    engine_memory_share: float = shared("engine_memory_share", default=0.9)
    vllm: dict[str, Any] = shared("vllm")
    trust_remote_code: bool = shared("trust_remote_code")
    verifier_workers: int = shared("verifier_workers", help="grading processes")
    verifier_timeout_s: float = shared("verifier_timeout_s")

    @property
    def set_names(self) -> list[str]:
        names = self.sets.split(",") if isinstance(self.sets, str) else self.sets
        return [name.strip() for name in names if name.strip()]

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / (self.name or self.name_for(self.model.strip("./").replace("/", "_")))

    def name_for(self, policy: str) -> str:
        return "_".join([policy, *map(set_name, self.set_names)])

    def problems(self) -> list[str]:
        """List invalid combinations of keys, one line per problem."""
        return vllm_problems(self.vllm) + ["sets: names no set; name one, for example aime24"] * (not self.set_names)


# Keys that have another name in the config of a run.
NAMES_IN_RUN = {"sets": "eval_data", "samples": "eval_samples"}
# Keys taken from the config of a run. Excluded: `seed`, so that runs with different seeds share sampling seeds;
# `trust_remote_code`, which the user must set; `engine_memory_share`, since no trainer shares the GPU here.
IN_RUN = """
    sets samples prompt_column answer_column prompt_template system_prompt chat_template chat_template_kwargs
    max_prompt_tokens temperature top_p top_k max_response_tokens stop engine precision vllm
    """.split()


def configure(argv: Sequence[str]) -> EvalConfig:
    """Parse `argv`. For the policy of a run, the run's settings replace the defaults.

    A first argument that is not a key is the model. Invalid keys end the process (see load_or_exit). Raises ValueError
    like find_policy.
    """
    argv = ["--model", *argv] if argv and not argv[0].startswith("-") else argv
    config = load_or_exit(EvalConfig, argv)
    policy = find_policy(config.model)
    if policy is None:
        return config
    of_run: dict[str, Any] = {key: policy.settings.get(NAMES_IN_RUN.get(key, key)) for key in IN_RUN}
    changed = [
        (f.name, f.type, knob(**{**f.metadata, "default": of_run[f.name]}))
        for f in fields(EvalConfig)
        if of_run.get(f.name) not in (None, [])
    ]
    # Only the defaults change: the command line and a --config file have priority.
    config = load_or_exit(make_dataclass("EvalConfig", changed, bases=(EvalConfig,), frozen=True), argv)
    plain = EvalConfig()
    taken = [f"{k}={v}" for k, v in of_run.items() if getattr(config, k) == v != getattr(plain, k)]
    for line in policy.warnings:
        print(f"warning: {line}")
    print(f"{policy.path}: {policy.run}, step {policy.step}; settings of the run: {' '.join(taken) or 'the defaults'}")
    name = config.name or config.name_for(f"{policy.run}_step_{policy.step:06d}")
    return replace(config, model=str(policy.path), name=name)


def run(config: EvalConfig) -> dict[str, float]:
    """Run an evaluation: print the table and return the metrics, such as eval/<set>/mean@K.

    Raises ValueError if the settings differ from the stored ones, RuntimeError if a sampling process fails.
    """
    prompts, work = prepare(config)
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder / "settings.json", settings_of(config, work, prompts))
    every = jobs(prompts, config.samples)
    stored = read_answers(folder / "answers.jsonl", every)
    left = [replace(j, samples=[n for n in j.samples if (j.set, j.problem, n) not in stored]) for j in every]
    todo = sum(len(job.samples) for job in left)
    print(f"{len(stored):,} answers are there, {todo:,} to sample on {work.processes} x {work.device}", flush=True)
    verifier = Verifier(
        workers=config.verifier_workers,
        timeout_s=config.verifier_timeout_s,
        memory_gib=VERIFIER_MEMORY_GIB,
        grader="math",
    )
    with verifier, tqdm(total=len(stored) + todo, unit="answer", desc="sample and grade", disable=None) as bar:
        warn_of_golds(verifier, every)
        grading = Grading(verifier, prompts)
        with closing(sample(left, work, folder)) as fresh:
            for row in chain(stored.values(), fresh):
                grading.submit(row)
                bar.update()
        rows = in_order(grading.collect(), prompts)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if k < config.samples] + [config.samples]
    metrics = summarize(rows, config.samples, ks)
    write_lines(folder / "samples.jsonl", rows)
    reasons = {name: Counter(row["reason"] for row in rows if row["set"] == name) for name in prompts}
    sizes = {name: len(pairs) for name, pairs in prompts.items()}
    results = {"config": asdict(config), "problems": sizes, "reasons": reasons, "metrics": metrics}
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(table(metrics, sizes, config.samples))
    print(f"\n{folder / 'results.json'}, {folder / 'samples.jsonl'}")
    return metrics


# Prompts and settings


@dataclass(frozen=True)
class Work:
    """Settings of a sampling process."""

    model: str
    seed: int
    processes: int
    device: str  # cuda | cpu
    options: EngineOptions
    sampling: Sampling


def prepare(config: EvalConfig) -> tuple[Prompts, Work]:
    """Build the prompts of every set and the sampling settings. Prints which problems were loaded and dropped."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    check_names("sets", config.set_names)
    check_model(config.model)
    tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    builder = PromptBuilder(
        tokenizer,
        template=config.prompt_template,
        system_prompt=config.system_prompt,
        chat_template=config.chat_template,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    prompts: dict[str, list[tuple[Problem, list[int]]]] = {}
    for name in config.set_names:
        report = load_problems(
            name,
            prefer="test",
            prompt_column=config.prompt_column,
            answer_column=config.answer_column,
            keep_rows=False,
            key="sets",
        )
        pairs, dropped = build_prompts(report.problems, builder, max_prompt_tokens=config.max_prompt_tokens)
        print("\n".join(report.lines))
        if dropped:
            print(f"warning: {name}: {dropped} prompts over max_prompt_tokens {config.max_prompt_tokens} are left out")
        prompts[set_name(name)] = pairs
    gpus = torch.cuda.device_count()
    if gpus and config.processes > gpus:
        raise ValueError(f"processes: {config.processes}, but {gpus} GPUs are visible and each process needs its own")
    device = "cuda" if gpus else "cpu"
    dtype = {"cuda": "bfloat16", "cpu": "float32"}[device] if config.precision == "auto" else config.precision
    size = Size.of(AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code))
    lengths = Config(max_prompt_tokens=config.max_prompt_tokens, max_response_tokens=config.max_response_tokens)
    options = EngineOptions(
        engine=config.engine,
        dtype=dtype,
        vocab_size=vocabulary_size(tokenizer),
        max_model_tokens=config.max_prompt_tokens + config.max_response_tokens,
        max_sequences=MOST_SEQUENCES[config.engine],
        memory_share=config.engine_memory_share,
        cpu_cache_bytes=cpu_cache_bytes(replace(lengths, precision=dtype), size, MOST_SEQUENCES[config.engine]),
        tensor_parallel=1,
        arguments=config.vllm,
        trust_remote_code=config.trust_remote_code,
    )
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_response_tokens,
        stop_token_ids=tuple(stop_token_ids(config.model, tokenizer)),
        stop=tuple(config.stop),
    )
    return prompts, Work(config.model, config.seed, config.processes or max(1, gpus), device, options, sampling)


def settings_of(config: EvalConfig, work: Work, prompts: Prompts) -> dict[str, Any]:
    """Return the settings that affect a response. A second call may change `samples` and the sets."""
    hashes = {
        f"prompts of {name}": short_hash([[problem.id, ids] for problem, ids in pairs])
        for name, pairs in prompts.items()
    }
    sampling = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(work.sampling).items()}  # as in JSON
    engine = {"engine": config.engine, "dtype": work.options.dtype, "vllm": config.vllm}
    return {"seed": config.seed, "model": files_hash(config.model), **engine, **sampling, **hashes}


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Store the settings. Raises ValueError with the changes if the settings of stored answers differ."""
    answers = path.with_name("answers.jsonl")
    stored = read_json_object(path) if path.exists() and answers.exists() and answers.stat().st_size else {}
    changed = [f"{k}: {stored[k]!r} there, {v!r} now" for k, v in settings.items() if stored.get(k, v) != v]
    if changed:
        raise ValueError(
            f"{path.parent} holds answers sampled with other settings ({'; '.join(changed)}); "
            "give another --name, or remove the folder"
        )
    path.write_text(json.dumps(stored | settings, indent=1))


def warn_of_golds(verifier: Verifier, every: Sequence[Job]) -> None:
    """Warn about problems whose gold cannot be matched. They count as unsolved, as in published results."""
    for job, reason in zip(every, verifier.check_golds([job.gold for job in every]), strict=True):
        if reason:
            print(f"warning: {job.problem}: gold {job.gold!r:.80} cannot be matched ({reason}); it counts as unsolved")


def read_answers(path: Path, every: Sequence[Job]) -> dict[tuple[str, str, int], Row]:
    """Return the stored responses of these jobs by (set, problem, sample), with the current golds.

    Broken lines are reported and removed, so their samples are generated again.
    """
    notes: list[str] = []
    rows = read_lines(path, ("set", "problem", "sample"), notes)
    for note in notes:
        print(f"warning: {note}")
        write_lines(path, rows)
    stored = {(row["set"], row["problem"], row["sample"]): row for row in rows}
    wanted = {(job.set, job.problem, number): job.gold for job in every for number in job.samples}
    return {key: row | {"gold": wanted[key]} for key, row in stored.items() if key in wanted}


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


# Sampling processes, one per GPU


def sample(left: Sequence[Job], work: Work, folder: Path) -> Generator[Row, None, None]:
    """Start the sampling processes. Append every row to answers.jsonl, then yield it.

    Raises ValueError if an engine cannot start with these settings, RuntimeError if a process fails.
    """
    context = multiprocessing.get_context("spawn")
    children: dict[Connection, tuple[BaseProcess, Path]] = {}  # connection -> process, log
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        for number in range(work.processes):
            if own := [job for job in share(left, number, work.processes) if job.samples]:
                log = folder / f"log_{number}.txt"
                ours, theirs = context.Pipe(duplex=False)
                child = context.Process(target=sampling_process, args=(own, work, theirs, log))
                # Set before the start: the child inherits it, and CUDA reads it once, possibly at the import of torch.
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of(number, visible) if work.device == "cuda" else ""
                child.start()
                theirs.close()
                children[ours] = child, log
        with (folder / "answers.jsonl").open("a") as file:
            while children:
                for connection in wait(list(children)):
                    assert isinstance(connection, Connection)
                    try:
                        row = connection.recv()
                    except EOFError:
                        child, log = children.pop(connection)
                        child.join()
                        if child.exitcode:
                            tail = log.read_text(errors="replace").strip()[-1500:]
                            raise RuntimeError(
                                f"a sampling process stopped with code {child.exitcode}:\n{tail}\n"
                                f"Finished answers are kept; the same command resumes. Log: {log}"
                            ) from None
                        continue
                    if isinstance(row, str):
                        raise ValueError(row)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    yield row
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        for child, _ in children.values():
            child.terminate()
            child.join()


def gpu_of(number: int, visible: str | None) -> str:
    """Return CUDA_VISIBLE_DEVICES of a sampling process: one of the devices that are `visible` here."""
    return visible.split(",")[number] if visible else str(number)


def sampling_process(own: list[Job], work: Work, connection: Connection, log: Path) -> None:
    """Send every row as it finishes, or the error message if the engine does not start."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        engine = make_engine(work.model, work.options, rank=0, world=1, device=work.device)
    except (ValueError, RuntimeError, OSError) as error:
        return connection.send(str(error))
    generate(engine, own, work.sampling, work.seed, connection.send, None)
    engine.close()


def table(metrics: dict[str, float], problems: dict[str, int], samples: int) -> str:
    """Format one row per set: percent ± standard error over problems."""
    shown = [f"mean@{samples}", f"strict_mean@{samples}", f"pass@{samples}", f"maj@{samples}", "truncated"]

    def cell(key: str) -> str:
        error = f" ± {100 * metrics[f'{key}_stderr']:.2f}" if f"{key}_stderr" in metrics else ""
        return f"{100 * metrics[key]:.2f}{error}"

    rows = [
        [name, str(count), *(cell(f"eval/{name}/{metric}") for metric in shown)]
        + [f"{metrics[f'eval/{name}/response_length_mean']:.0f}"]
        for name, count in problems.items()
    ]
    title = (
        "Percent ± standard error over problems. mean: tolerant verifier; strict_mean: the last line must say Answer:"
    )
    return f"{title}\n\n" + text_table(["set", "problems", *shown, "tokens"], rows)


def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0; 2 for invalid arguments; 1 if sampling failed; 130 after Ctrl-C."""
    try:
        run(configure(argv))
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    hard_exit(lambda: main(sys.argv[1:]))
