"""Inputs of a run: tokenizer, stop token ids, problems with their prompts.

task = load_task(cfg, info, ranks)      # reports invalid config and data before a model is loaded
dry_run(cfg, processes, info)           # the same checks, as far as the hub is reachable: --dry_run

Every rank checks its own files (model, reward, rule, output folder). Rank 0 reads the data, checks the gold answers and
builds the prompts for all ranks, so that all ranks train on the same problems. `fingerprint` identifies them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from configs import to_yaml
from configs.memory import MODELS, Size, memory_text
from configs.schema import Config
from data import (
    HubUnreachable,
    Problem,
    PromptBuilder,
    asks_answer_line,
    build_prompts,
    check_leaks,
    check_names,
    load_problems,
    set_name,
    shared_problems,
    stop_token_ids,
    vocabulary_size,
)
from rewards import BUILT_IN, NOT_CHECKED, GraderError, Verifier, check_golds
from trainer.checkpoint import safe_run_dir
from trainer.clock import gc_paused
from trainer.preflight import (
    check_context,
    check_kernels,
    check_model,
    check_weights,
    describe_changes,
    engine_error,
    files_hash,
    find_rule,
    fingerprint_of_data,
    function_files,
    read_config,
    read_tokenizer,
)
from trainer.ranks import Ranks

VERIFIER_MEMORY_GIB = 2.0  # address space of one grading process
Info = Callable[[str], None]  # prints a line on rank 0
Rows = list[tuple[Problem, list[int]]]  # problem, prompt token ids


@dataclass(frozen=True)
class Task:
    """Training and evaluation data of a run, tokenized for its model."""

    tokenizer: Any
    vocab_size: int
    model_size: Size
    stop_token_ids: tuple[int, ...]
    train: Rows
    evals: dict[str, Rows]  # by name of the evaluation set
    fingerprint: dict[str, str]  # short hashes of the data and of the files of models, reward and rule (preflight.py)


class Model(NamedTuple):
    """Tokenizer, stop token ids, prompt builder and config of the model."""

    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    builder: PromptBuilder
    config: Any  # transformers config


@gc_paused()
def load_task(cfg: Config, info: Info, ranks: Ranks) -> Task:
    """Load problems, check their gold answers, build prompts. Collective.

    Raises ValueError on all ranks if one of them has invalid config or data.
    """

    def read_own_files() -> tuple[Model, dict[str, str]]:
        check_local(cfg, info)
        model = read_model(cfg)
        if error := engine_error(cfg, Size.of(model.config)):
            raise ValueError(error)
        models = {key: files_hash(name) for key, name in (("model", cfg.model), ("teacher", cfg.teacher)) if name}
        return model, {**models, **function_files({"reward": cfg.reward, "rule": cfg.rule})}

    model, hashes = ranks.run_on_all_ranks(read_own_files)
    of_ranks = ranks.gather([hashes])
    for rank, theirs in enumerate(of_ranks):
        for line in describe_changes(of_ranks[0], theirs):
            raise ValueError(f"rank {rank} has other files than rank 0, under the same names: {line}")
    train, evals = ranks.run_on_rank0(lambda: read_data(cfg, model, info, unreachable=None))
    sizes = ", ".join(f"{name} ({len(rows)})" for name, rows in evals.items())
    info(f"{len(train):,} training prompts; evaluation on {sizes or 'nothing'}")
    return Task(
        tokenizer=model.tokenizer,
        vocab_size=min(vocabulary_size(model.tokenizer), model.config.get_text_config().vocab_size),
        model_size=Size.of(model.config),
        stop_token_ids=model.stop_token_ids,
        train=train,
        evals=evals,
        fingerprint=fingerprint_of_data(train, evals) | hashes,
    )


@gc_paused()
def dry_run(cfg: Config, processes: int, info: Info) -> int:
    """Run every check that needs neither weights nor the hub, and print the config. Returns the exit code 0.

    Also prints the checks that were skipped because the hub is not reachable. Raises ValueError for invalid input.
    """
    unreachable: list[str] = []
    model, size = None, MODELS.get(cfg.model)
    check_local(cfg, info)
    try:
        model = read_model(cfg)
        size = Size.of(model.config)
    except HubUnreachable:
        unreachable.append(f"model {cfg.model}: its tokenizer, chat template and stop token ids")
    error = engine_error(cfg, size) if size else ""
    if error and torch.cuda.is_available():
        raise ValueError(error)
    if error:  # the config may be for another machine
        info(f"warning: this machine has no GPU, and its CPU could not run this: {error}")
    read_data(cfg, model, info, unreachable)
    if size:
        info(memory_text(cfg, size, processes))
    info(to_yaml(cfg))
    for line in unreachable:
        info(f"not checked, the hub is not reachable: {line}")
    return 0


# ---- model and local files ----


def check_local(cfg: Config, info: Info) -> None:
    safe_run_dir(cfg.output_dir, cfg.run_name)
    check_kernels(cfg)
    find_rule(cfg)
    if cfg.reward not in BUILT_IN:
        one_verifier(cfg).close()
    check_names("eval_data", eval_sets(cfg))
    for line in check_leaks(cfg.train_data, eval_sets(cfg)):
        info(line)


def read_model(cfg: Config) -> Model:
    """Check the model's files, and load its config, tokenizer and prompt builder. Raises ValueError."""
    check_model(cfg.model)
    config = read_config(cfg.model, trust_remote_code=cfg.trust_remote_code)
    check_context(cfg, config)
    check_weights(cfg.model, trust_remote_code=cfg.trust_remote_code)
    tokenizer = read_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code)
    if cfg.teacher:
        check_teacher(cfg, cfg.teacher, tokenizer)
    builder = PromptBuilder(
        tokenizer,
        template=cfg.prompt_template,
        system_prompt=cfg.system_prompt,
        chat_template=cfg.chat_template,
        chat_template_kwargs=cfg.chat_template_kwargs,
    )
    return Model(tokenizer, tuple(stop_token_ids(cfg.model, tokenizer)), builder, config)


def check_teacher(cfg: Config, teacher: str, tokenizer: Any) -> None:
    """Raise ValueError if the teacher cannot be loaded, its context is too short or its vocabulary differs."""
    check_model(teacher)
    check_context(replace(cfg, model=teacher), read_config(teacher, trust_remote_code=cfg.trust_remote_code))
    check_weights(teacher, trust_remote_code=cfg.trust_remote_code)
    if read_tokenizer(teacher, trust_remote_code=cfg.trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"teacher: its tokenizer differs from the model's (got {teacher}); use a model of one family")


# ---- data ----


def read_data(
    cfg: Config, model: Model | None, info: Info, unreachable: list[str] | None
) -> tuple[Rows, dict[str, Rows]]:
    """Return training rows, and evaluation rows by set. Without a model, their prompts are empty.

    unreachable: receives one line per set that cannot be fetched from the hub. If it is None, HubUnreachable is raised.
    """

    def read(key: str, sets: str | list[str]) -> Rows:
        try:
            report = load_problems(
                sets,
                prefer="train" if key == "train_data" else "test",
                prompt_column=cfg.prompt_column,
                answer_column=cfg.answer_column,
                keep_rows=":" in cfg.reward,
                key=key,
            )
        except HubUnreachable:
            if unreachable is None:
                raise
            unreachable.append(f"{key} {sets}: its problems, gold answers and prompt lengths")
            return []
        for line in report.lines:
            info(line)
        problems = check_gold_answers(key, report.problems, cfg, info)
        return prompts_of(cfg, sets, problems, model, info) if model else [(each, []) for each in problems]

    # With `unreachable`, each set is read separately, so that reachable sets are checked.
    together = unreachable is None or isinstance(cfg.train_data, str)
    parts = [read("train_data", sets) for sets in ([cfg.train_data] if together else cfg.train_data)]
    train = [row for part in parts for row in part]
    if all(parts) and len(train) < cfg.prompts_per_step:
        raise ValueError(
            f"prompts_per_step: {cfg.prompts_per_step} is more than the {len(train)} usable problems of train_data "
            f"{cfg.train_data}; use at most {len(train)}"
        )
    if train:
        problem, prompt = train[0]
        if cfg.reward == "answer_line" and model and not asks_answer_line(model.builder, (each for each, _ in train)):
            raise ValueError(
                f"reward: answer_line reads an 'Answer:' line, and no prompt of train_data {cfg.train_data} asks for "
                f"one (got prompt_template {cfg.prompt_template}); use prompt_template dapo, or reward math"
            )
        try_reward(cfg, problem, model.tokenizer.decode(prompt) if model else problem.problem)
    evals = {set_name(name): read("eval_data", name) for name in eval_sets(cfg)} if cfg.eval_every else {}
    for name, rows in evals.items():
        if shared := shared_problems([problem for problem, _ in train], [problem for problem, _ in rows]):
            info(
                f"warning: {len(shared):,} of the {len(rows):,} problems of eval_data {name} are in train_data too, "
                f"such as {shorten(shared[0])}: their score measures memorization"
            )
    return train, evals


def eval_sets(cfg: Config) -> list[str]:
    return [cfg.eval_data] if isinstance(cfg.eval_data, str) else cfg.eval_data


def prompts_of(cfg: Config, sets: str | list[str], problems: list[Problem], model: Model, info: Info) -> Rows:
    """Build the prompts of problems; drop those longer than max_prompt_tokens.

    Raises ValueError for a token id outside the model's embedding.
    """
    builder, rows = model.builder, model.config.get_text_config().vocab_size
    pairs, dropped = build_prompts(problems, builder, max_prompt_tokens=cfg.max_prompt_tokens)
    largest = max(max(ids) for _, ids in pairs)
    if largest >= rows:
        raise ValueError(
            f"model: prompts of {sets} have the token {model.tokenizer.decode(largest)!r} with the id {largest}, and "
            f"the embedding of {cfg.model} has {rows} rows; resize it to the tokenizer (resize_token_embeddings)"
        )
    if dropped:
        info(f"{sets}: {dropped} prompts longer than max_prompt_tokens {cfg.max_prompt_tokens} dropped")
    spelled = list(filter(None, (builder.control_tokens_in(problem) for problem, _ in pairs)))
    if spelled:
        tokens = ", ".join(sorted(set().union(*spelled)))
        info(f"warning: {sets}: {len(spelled)} problems spell control tokens ({tokens}); they are given as plain text")
    return pairs


def check_gold_answers(key: str, problems: list[Problem], cfg: Config, info: Info) -> list[Problem]:
    """Report problems whose gold answer does not verify against itself, and return the problems to use.

    train_data: they are dropped, since no response to them could be rewarded. eval_data: they count as unsolved, as in
    published results. key: train_data or eval_data.
    Raises ValueError for a gold answer that exceeds the verifier's limits: the data must not depend on machine speed.
    """
    if key == "train_data" and cfg.reward != "math":
        return problems
    try:
        reasons = check_golds([problem.gold for problem in problems])
    except GraderError as error:
        raise ValueError(f"{key}: the gold answers cannot be checked: {error}") from None
    bad = [
        (f"{shorten(problem.id)}: gold {shorten(repr(problem.gold))}: {reason}", reason in NOT_CHECKED)
        for problem, reason in zip(problems, reasons, strict=True)
        if reason
    ]
    if unchecked := [line for line, not_checked in bad if not_checked]:
        raise ValueError(
            f"{key}: {len(unchecked)} gold answers are too much for the verifier; take them out, since "
            "a machine's speed must not choose the data. The first:\n  " + "\n  ".join(unchecked[:10])
        )
    if bad and len(bad) == len(problems):
        raise ValueError(
            f"{key}: none of {len(problems)} gold answers verifies against itself; correct them. The "
            "first:\n  " + "\n  ".join(line for line, _ in bad[:10])
        )
    fate = "dropped" if key == "train_data" else "counted as unsolved"
    for line, _ in bad[:10]:
        info(f"{key}: {fate}: {line}")
    if bad:
        info(f"{key}: {len(bad)} problems {fate}, whose gold answer does not verify against itself")
    return [p for p, reason in zip(problems, reasons, strict=True) if key == "eval_data" or not reason]


# ---- reward ----


def one_verifier(cfg: Config) -> Verifier:
    limits = (cfg.verifier_timeout_s, VERIFIER_MEMORY_GIB)
    return Verifier(1, *limits, cfg.reward, reward_timeout_s=cfg.reward_timeout_s)


def try_reward(cfg: Config, problem: Problem, prompt: str) -> None:
    """Grade a synthetic response with a user's reward. Raises ValueError if that fails or exceeds a limit."""
    if cfg.reward in BUILT_IN:
        return
    response = f"\\boxed{{{problem.gold}}}"
    about = {"problem": asdict(problem), "prompt": prompt, "response_tokens": 1, "truncated": False}
    about["completion_with_special_tokens"] = response
    try:
        with one_verifier(cfg) as verifier:
            (grade,) = verifier.collect([verifier.submit(response, problem.gold, about)])
    except GraderError as error:
        raise ValueError(f"reward: {error} (a synthetic response to {shorten(problem.id)})") from None
    if grade.reason in NOT_CHECKED:
        raise ValueError(
            f"reward: {cfg.reward} ended in a {grade.reason} on a synthetic response to {shorten(problem.id)}; make it "
            "faster or smaller, or raise verifier_timeout_s"
        )


def shorten(text: str) -> str:
    """Shorten a text to at most one line."""
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
