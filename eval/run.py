"""Evaluate any checkpoint: mean@K, pass@k, maj@k on benchmark sets, both graders side by side.

    python -m eval.run runs/NAME                                                # or --model runs/NAME
    python -m eval.run --model DIR_OR_HUB_ID --sets aime24,amc23 --samples 32

A run stands for its newest checkpoint. The policy of a run is prompted and sampled as in its training, on the run's
evaluation sets, unless told otherwise; so is a checkpoint named by itself. One process per GPU (none: one on the CPU),
started from here; no launcher is needed. Writes to OUTPUT_DIR/NAME/:

    settings.json      what decides the samples; a second call with other settings is refused
    answers/*.jsonl    every answer as it finishes: the record that makes a second call resume where the first stopped
    samples.jsonl      all answers with both verdicts         results.json    every figure
    log_*.txt          what the sampling processes printed

A second call regenerates nothing that is there; it may add sets or samples, and it grades anew, so that a better
verifier needs no sampling. Left out: several machines (run sets on each), greedy decoding but for --top_k 1.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import chain, takewhile
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from tqdm import tqdm

from configs import knob, load_or_exit
from configs.memory import Size, cpu_cache_bytes
from configs.schema import Config, vllm_problems
from data import Problem, PromptBuilder, build_prompts, load_problems, set_name, stop_token_ids, vocabulary_size
from eval.compare import text_table
from eval.evaluate import Grading, Job, Prompts, Row, generate, jobs, share, summarize
from eval.records import find_policy
from rewards import Verifier
from trainer.preflight import check_model
from trainer.rollout import MOST_SEQUENCES, EngineOptions, Sampling, make_engine
from trainer.stopping import hard_exit
from trainer.task import VERIFIER_MEMORY_GIB

WORKER = "--sampling-process"  # first argument of the processes that this one starts
POLL_S = 0.5
ROOT = Path(__file__).resolve().parent.parent  # where `python -m eval.run` finds this package


@dataclass(frozen=True)
class EvalConfig:
    """Defaults are the paper's evaluation: 32 samples at temperature 1, DAPO's prompt, 4,096 tokens."""

    model: str = knob(
        "Qwen/Qwen2.5-3B-Instruct",
        "runs/NAME (its newest checkpoint), a checkpoint, a folder or hub id",
        section="What",
    )
    sets: str | list[str] = knob("aime24,aime25,amc23", "sets, hub ids or files, with commas between")
    prompt_column: str | None = knob(None, "column of the problem or conversation; null: detected")
    answer_column: str | None = knob(None, "column of the reference answer, or STRUCT.FIELD; null: detected")
    samples: int = knob(32, "answers to each problem", symbol="k", source="paper", low=1, high=1000)
    output_dir: str = knob("evals", "results go to OUTPUT_DIR/NAME")
    name: str = knob("", "folder of the results; empty: made from run and step, or `model`, and the sets")
    seed: int = knob(0, "every sample's random stream is a function of it", low=0, high=2**32 - 1)

    prompt_template: str = knob("dapo", "instruction around the problem, a name of data/prompts.py", section="Prompt")
    system_prompt: str = knob("default", "default: the chat template's own; none: no system turn; or the text")
    chat_template: bool = knob(True, "wrap prompts in the model's chat template")
    chat_template_kwargs: dict[str, Any] = knob({}, "further variables of the chat template")
    max_prompt_tokens: int = knob(1024, "longer prompts are dropped and counted", unit="tokens", source="paper", low=1)

    temperature: float = knob(
        1.0, "of sampling; vLLM takes 2 at most", source="paper", above=0, high=2, section="Sampling"
    )
    top_p: float = knob(1.0, "nucleus sampling", source="paper", above=0, high=1)
    top_k: int = knob(0, "0: off; 1: greedy", source="paper", low=0)
    max_response_tokens: int = knob(4096, "answers are cut here", unit="tokens", source="paper", low=1)

    engine: Literal["vllm", "hf"] = knob("vllm", "what samples; hf: transformers' generate, slow", section="Machine")
    precision: Literal["auto", "float32", "bfloat16"] = knob("auto", "auto: bfloat16 on a GPU")
    processes: int = knob(0, "that sample, one GPU each; 0: one per visible GPU, one on a CPU", low=0)
    engine_memory_share: float = knob(0.9, "of a GPU's memory", above=0, below=1)
    vllm: dict[str, Any] = knob({}, "further arguments of vllm.LLM, such as {enforce_eager: true, max_num_seqs: 256}")
    trust_remote_code: bool = knob(False, "run Python code that comes with the model; off unless you trust its author")
    verifier_workers: int = knob(4, "grading processes", low=1)
    verifier_timeout_s: float = knob(3.0, "for one answer", unit="s", above=0)

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
        """Mistakes between keys, one line each."""
        called: dict[str, list[str]] = {}
        for each in self.set_names:
            called.setdefault(set_name(each), []).append(each)
        if not called:
            return ["sets: names no set; name one, for example aime24"]
        return [
            f"sets: {' and '.join(same)} would both be {name} in the results; leave one out, or rename a file"
            for name, same in called.items()
            if len(same) > 1
        ] + vllm_problems(self.vllm)


# What is another key in the configuration of a run: the rest of IN_RUN has the same name here.
NAMES_IN_RUN = {"sets": "eval_data", "samples": "eval_samples"}
# Not among them: `seed`, so that runs of several seeds are sampled by the same random streams;
# `trust_remote_code`, which only its user may give; `engine_memory_share`, since no trainer shares the GPU here.
IN_RUN = """
    sets samples prompt_column answer_column prompt_template system_prompt chat_template chat_template_kwargs
    max_prompt_tokens temperature top_p top_k max_response_tokens engine precision vllm
    """.split()


def configure(argv: Sequence[str]) -> EvalConfig:
    """The configuration that `argv` describes, on top of what a run's policy had in its run, which a line tells.

    A first word that is no key is the model.

    Mistakes of `argv` end the process (see load_or_exit). Raises ValueError as find_policy does.
    """
    bare = list(takewhile(lambda word: not word.startswith("-"), argv))
    if len(bare) > 1:
        raise ValueError(f"model: one at a time, not {' and '.join(bare)}")
    argv = ["--model", *argv] if bare else argv
    config = load_or_exit(EvalConfig, argv)
    policy = find_policy(config.model)
    if policy is None:
        return config
    of_run = {key: policy.settings.get(NAMES_IN_RUN.get(key, key)) for key in IN_RUN}
    of_run = {
        key: value for key, value in of_run.items() if value not in (None, [])
    }  # null: as many as there is room for
    config = load_or_exit(_with_defaults(of_run), argv)
    plain = EvalConfig()
    taken = {key: value for key, value in of_run.items() if getattr(config, key) == value != getattr(plain, key)}
    for line in policy.warnings:
        print(f"warning: {line}")
    print(f"{policy.path}: {policy.run}, step {policy.step}; as in that run: {_as_typed(taken) or 'the defaults'}")
    name = config.name or config.name_for(f"{policy.run}_step_{policy.step:06d}")
    return replace(config, model=str(policy.path), name=name)


def _with_defaults(values: dict[str, Any]) -> type[EvalConfig]:
    """EvalConfig with other defaults, which come after the command line and a --config file."""
    other = [
        (f.name, f.type, knob(**f.metadata | {"default": values[f.name]}))
        for f in fields(EvalConfig)
        if f.name in values
    ]
    return make_dataclass("EvalConfig", other, bases=(EvalConfig,), frozen=True)


def _as_typed(settings: dict[str, Any]) -> str:
    words = []
    for key, value in settings.items():
        text = ",".join(value) if isinstance(value, list) else str(value)
        words += [f"--{key}", text.lower() if isinstance(value, bool) else text]
    return shlex.join(words)


def run(config: EvalConfig) -> dict[str, float]:
    """Evaluate as configured; prints the table and returns the metrics, eval/<set>/mean@K and so on.

    Raises ValueError for settings that contradict what is stored, RuntimeError when a sampling process failed.
    """
    prompts, work = prepare(config)
    folder = config.folder
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    check_settings(folder / "settings.json", settings_of(config, work))
    every = jobs(prompts, config.samples)
    stored = read_answers(folder / "answers", every)
    missing = [job for job in map(partial(without, stored), every) if job.samples]
    todo = sum(len(job.samples) for job in missing)
    print(f"{len(stored):,} answers are there, {todo:,} to sample on {work.processes} x {work.device}", flush=True)
    verifier = Verifier(
        workers=config.verifier_workers,
        timeout_s=config.verifier_timeout_s,
        memory_gib=VERIFIER_MEMORY_GIB,
        grader="math",
    )
    with verifier, progress_bar(sum(len(job.samples) for job in every)) as bar:
        warn_of_golds(verifier, every)
        grading = Grading(verifier, prompts)
        with closing(sample(missing, work, folder)) as fresh:
            for row in chain(stored.values(), fresh):
                grading.submit(row)
                bar.update()
        rows = grading.collect()
    place = {(job.set, job.problem): number for number, job in enumerate(every)}
    rows.sort(key=lambda row: (place[row["set"], row["problem"]], row["sample"]))
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if k < config.samples] + [config.samples]
    metrics = summarize(rows, config.samples, ks)
    write_lines(folder / "samples.jsonl", rows)
    reasons = {name: Counter(row["reason"] for row in rows if row["set"] == name) for name in prompts}
    results = {"config": asdict(config), "problems": {k: len(v) for k, v in prompts.items()}, "reasons": reasons}
    (folder / "results.json").write_text(json.dumps(results | {"metrics": metrics}, indent=1))
    print(table(metrics, {name: len(pairs) for name, pairs in prompts.items()}, config.samples))
    print(f"\n{folder / 'results.json'}, {folder / 'samples.jsonl'}")
    return metrics


# What to sample


@dataclass(frozen=True)
class Work:
    """What a sampling process must know beside its jobs."""

    model: str
    seed: int
    processes: int
    device: str  # cuda | cpu
    options: EngineOptions
    sampling: Sampling


def prepare(config: EvalConfig) -> tuple[Prompts, Work]:
    """Prompts of every set, and how to sample them. Prints what was loaded and dropped; the engine is not built yet."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

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
        )
        kept, dropped = build_prompts(report.problems, builder, max_prompt_tokens=config.max_prompt_tokens)
        print("\n".join(report.lines))
        if dropped:
            print(f"warning: {name}: {dropped} prompts over max_prompt_tokens {config.max_prompt_tokens} are left out")
        prompts[set_name(name)] = kept
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
    stops = tuple(stop_token_ids(config.model, tokenizer))
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.max_response_tokens, stops)
    return prompts, Work(config.model, config.seed, config.processes or max(1, gpus), device, options, sampling)


def settings_of(config: EvalConfig, work: Work) -> dict[str, Any]:
    """All that decides an answer. `sets` and `samples` do not: both may grow."""
    model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    prompt = {key: getattr(config, key) for key in ("seed", "prompt_template", "system_prompt", "chat_template")}
    sampling = asdict(work.sampling) | {"stop_token_ids": list(work.sampling.stop_token_ids)}  # a list, as JSON has it
    return (
        {"model": model}
        | prompt
        | sampling
        | {"engine": work.options.engine, "dtype": work.options.dtype}
        | model_files(config.model)
    )


def warn_of_golds(verifier: Verifier, every: Sequence[Job]) -> None:
    """Problems whose gold cannot be matched count as unsolved, as they do in published figures; say which."""
    for job, trouble in zip(every, verifier.check_golds([job.gold for job in every]), strict=True):
        if trouble:
            print(f"warning: {job.problem}: gold {job.gold!r:.80} cannot be matched ({trouble}); it counts as unsolved")


def model_files(model: str) -> dict[str, str]:
    """Which weights a local folder holds, so that a new checkpoint in an old place is not taken for the old one.

    A hash of each weight file's size and its first and last MiB: enough to tell training steps apart, quick at 100 GB.
    """
    found = {}
    for path in sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []:
        with path.open("rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest = sha256(f"{path.stat().st_size}".encode() + head + file.read())
        found[f"weights {path.name}"] = digest.hexdigest()[:16]
    return found


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of the first call; refuse others later. Raises ValueError naming each that changed, and
    for a file that cannot be read."""
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1))
        return
    try:
        before = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give another --name, or remove the folder") from None
    changed = [
        f"{key}: {before.get(key)!r} there, {settings.get(key)!r} now"
        for key in before | settings
        if before.get(key) != settings.get(key)
    ]
    if changed:
        raise ValueError(
            f"{path.parent} holds answers sampled with other settings ({'; '.join(changed)}): "
            "give another --name, or remove the folder"
        )


Key = tuple[str, str, int]  # set, problem, sample


def read_answers(folder: Path, every: Sequence[Job]) -> dict[Key, Row]:
    """The stored answers that are wanted, with today's golds.

    Raises ValueError where a problem's prompt is no longer the stored one, and for a line that is no answer.
    """
    prompts = {(job.set, job.problem): prompt_hash(job.prompt) for job in every}
    golds = {(job.set, job.problem): job.gold for job in every}
    wanted = {(job.set, job.problem, number) for job in every for number in job.samples}
    stored: dict[Key, Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")[:-1]  # behind the last newline: nothing, or a line cut short
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                key = (row["set"], row["problem"], row["sample"])
            except (ValueError, KeyError, TypeError) as error:
                told = f"{path}, line {number}: no answer of an evaluation ({type(error).__name__}: {error})"
                raise ValueError(f"{told}; take the line out: it is sampled again") from None
            if key not in wanted:
                continue
            if row["prompt_hash"] != prompts[key[:2]]:
                raise ValueError(
                    f"{path}: {row['problem']} was sampled from another prompt (its text, the template or the "
                    "tokenizer changed): give another --name, or remove the folder"
                )
            stored[key] = row | {"gold": golds[key[:2]]}
    return stored


def without(stored: dict[Key, Row], job: Job) -> Job:
    """The job less what is stored."""
    return replace(job, samples=[n for n in job.samples if (job.set, job.problem, n) not in stored])


def prompt_hash(prompt: Sequence[int]) -> str:
    return sha256(json.dumps(list(prompt)).encode()).hexdigest()[:16]


# Sampling processes, one per GPU


def sample(missing: Sequence[Job], work: Work, folder: Path) -> Generator[Row, None, None]:
    """Start the sampling processes and yield every row as it is written.

    Raises ValueError when an engine cannot start with these settings, RuntimeError when a process fails.
    """
    first = len(list((folder / "answers").glob("*.jsonl")))
    children: list[subprocess.Popen[bytes]] = []
    followers: list[Follower] = []
    try:
        for number in range(work.processes):
            own = share(missing, number, work.processes)
            if not own:
                continue
            path = folder / "answers" / f"{first + number:03d}.jsonl"
            path.touch(exist_ok=False)
            log = folder / f"log_{number}.txt"
            order = {"work": asdict(work), "jobs": [asdict(job) for job in own], "path": str(path.resolve())}
            # A file, not a pipe: the child reads it only after its imports, and nobody should wait for that.
            with log.open("wb") as output, TemporaryFile() as orders:
                orders.write(json.dumps(order).encode())
                orders.seek(0)
                command = [sys.executable, "-m", "eval.run", WORKER]
                child = subprocess.Popen(
                    command, stdin=orders, stdout=output, stderr=subprocess.STDOUT, env=environment(number)
                )
            children.append(child)
            followers.append(Follower(path))
        running = True
        while running:
            time.sleep(POLL_S)
            running = any(child.poll() is None for child in children)
            for follower in followers:
                yield from follower.rows()
            for number, child in enumerate(children):
                if child.poll() == 2:  # it told a mistake in its last line
                    raise ValueError(
                        (folder / f"log_{number}.txt").read_text(errors="replace").rpartition("error: ")[2]
                    )
                if child.poll():
                    tail = (folder / f"log_{number}.txt").read_text(errors="replace").strip()[-1500:]
                    raise RuntimeError(
                        f"sampling process {number} stopped with code {child.returncode}:\n{tail}\n"
                        f"What was finished is kept; the same command goes on from there. Log: log_{number}.txt"
                    )
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


def environment(number: int) -> dict[str, str]:
    """Sampling process `number` sees one GPU and nothing of a launcher that may have started this process."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in launcher}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
    return env


class Follower:
    """Reads the rows that are appended to a file, whole lines alone."""

    def __init__(self, path: Path):
        self.path, self.position = path, 0

    def rows(self) -> list[Row]:
        with self.path.open("rb") as file:
            file.seek(self.position)
            whole = file.read().rpartition(b"\n")[0]
        self.position += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines()]


def sampling_process() -> None:
    """The other end of `sample`: reads its order from stdin, appends every answer as it finishes."""
    order = json.loads(sys.stdin.buffer.read())
    settings = order["work"]
    options = EngineOptions(**settings["options"])
    sampling = Sampling(**settings["sampling"] | {"stop_token_ids": tuple(settings["sampling"]["stop_token_ids"])})
    own = [Job(**job) for job in order["jobs"]]
    hashes = {(job.set, job.problem): prompt_hash(job.prompt) for job in own}
    parent = os.getppid()
    try:
        engine = make_engine(settings["model"], options, rank=0, world=1, device=settings["device"])
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(error) from error
    with open(order["path"], "a") as file:

        def append(row: Row) -> None:
            if os.getppid() != parent:  # whoever wanted the answers is gone
                raise SystemExit("the process that started this one has ended")
            row["prompt_hash"] = hashes[row["set"], row["problem"]]
            file.write(json.dumps(row) + "\n")
            file.flush()

        generate(engine, own, sampling, settings["seed"], append, None)
    engine.close()


# What is shown


def progress_bar(total: int) -> tqdm:
    return tqdm(total=total, unit="answer", desc="sample and grade", disable=None, mininterval=1.0)


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    """Whole or absent: a reader never sees half a file."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unfinished.replace(path)


def table(metrics: dict[str, float], problems: dict[str, int], samples: int) -> str:
    """One row a set: percent ± standard error over problems."""
    shown = [f"mean@{samples}", f"strict_mean@{samples}", f"pass@{samples}", f"maj@{samples}", "truncated"]
    rows = []
    for name, count in problems.items():
        cells = []
        for metric in shown:
            error = metrics.get(f"eval/{name}/{metric}_stderr")
            value = f"{100 * metrics[f'eval/{name}/{metric}']:.2f}"
            cells.append(value if error is None else f"{value} ± {100 * error:.2f}")
        rows.append([name, str(count), *cells, f"{metrics[f'eval/{name}/response_length_mean']:.0f}"])
    title = (
        "Percent ± standard error over problems. mean: tolerant verifier; strict_mean: the last line must say Answer:"
    )
    return f"{title}\n\n" + text_table(["set", "problems", *shown, "tokens"], rows)


def main(argv: Sequence[str]) -> int:
    """The exit code: 0; 2: what was asked for cannot be, told in one line; 1: sampling failed; 130: Ctrl-C."""
    try:
        if list(argv) == [WORKER]:
            sampling_process()
        else:
            run(configure(argv))
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    hard_exit(lambda: main(sys.argv[1:]))
