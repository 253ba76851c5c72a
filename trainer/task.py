"""What the policy is trained and evaluated on: tokenizer, stop ids, problems with their prompts.

task = load_task(cfg, say, ranks)      # finds the user's mistakes before a model is loaded
dry_run(cfg, processes, say)           # the same as far as it is within reach, and tells it: --dry_run

Every rank looks at its own files (model, reward, rule, folder); one reads the data, judges the golds and builds the
prompts, and the others get them from it. So all train on the same problems, and a hash names them (fingerprint.py).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from configs import to_yaml
from configs.memory import MODELS, Size, memory_text
from configs.schema import Config
from data import (
    HubUnreachable,
    Problem,
    PromptBuilder,
    build_prompts,
    check_leaks,
    load_problems,
    set_name,
    shared_problems,
    stop_token_ids,
    vocabulary_size,
)
from rewards import NOT_CHECKED, GraderError, Verifier, check_golds
from trainer import checkpoint
from trainer.checks import cache_trouble, find_kernels, find_model, find_room, find_rule
from trainer.fingerprint import changed, fingerprint_of_data, own_files, tokenizer_hash
from trainer.imports import quick_imports
from trainer.model_files import check_context, check_weights, files_hash, read_config, read_tokenizer
from trainer.ranks import Ranks

VERIFIER_MEMORY_GIB = 2.0  # address space of one grading process
Say = Callable[[str], None]
Rows = list[tuple[Problem, list[int]]]  # problem, prompt token ids


@dataclass(frozen=True)
class Task:
    """What the policy is trained and evaluated on."""

    tokenizer: Any
    vocab_size: int
    model_size: Size
    stop_token_ids: tuple[int, ...]
    train: Rows
    evals: dict[str, Rows]  # by set
    fingerprint: dict[str, str]  # short hashes of all of this and of the files behind it (fingerprint.py)


class Model(NamedTuple):
    """What is known of the model without its weights."""

    tokenizer: Any
    stops: tuple[int, ...]  # ids that end an answer
    builder: PromptBuilder  # of prompts
    config: Any  # transformers'


@quick_imports()
def load_task(cfg: Config, say: Say, ranks: Ranks) -> Task:
    """Load problems, check their golds, build prompts; collective.

    Raises ValueError or OSError naming what to mend, on all ranks when one of them meets it.
    """

    def look() -> tuple[Model, dict[str, str]]:
        with _reward_tried(cfg):
            _check_local(cfg, say)
            model = _model(cfg)
        if told := cache_trouble(cfg, Size.of(model.config)):
            raise ValueError(told)
        own = own_files({"reward": cfg.reward, "rule": cfg.rule})
        return model, {"tokenizer": tokenizer_hash(model.tokenizer, model.stops), "model": files_hash(cfg.model), **own}

    def read() -> tuple[Rows, dict[str, Rows]]:
        train = _prompts(cfg, cfg.train_data, model.builder, say)
        _check_enough(cfg, len(train))
        _try_reward(cfg, train[0][0], model.tokenizer.decode(train[0][1]))
        evals = {set_name(n): _prompts(cfg, n, model.builder, say) for n in _eval_sets(cfg)} if cfg.eval_every else {}
        for name, rows in evals.items():
            _tell_shared([problem for problem, _ in train], name, [problem for problem, _ in rows], say)
        return train, evals

    model, of_files = ranks.on_each(look)
    _check_same(ranks, of_files)
    train, evals = ranks.on_first(read)
    sizes = ", ".join(f"{name} ({len(rows)})" for name, rows in evals.items())
    say(f"{len(train):,} training prompts; evaluation on {sizes or 'nothing'}")
    return Task(
        tokenizer=model.tokenizer,
        vocab_size=min(vocabulary_size(model.tokenizer), model.config.get_text_config().vocab_size),
        model_size=Size.of(model.config),
        stop_token_ids=model.stops,
        train=train,
        evals=evals,
        fingerprint=fingerprint_of_data(train, evals) | of_files,
    )


def look_at_task(cfg: Config, say: Say) -> tuple[Size | None, list[str]]:
    """Check all that load_task checks and the hub does not keep back; the model's size, and what was kept back.

    Raises as load_task does.
    """
    missing: list[str] = []
    model, size = None, MODELS.get(cfg.model)
    with _reward_tried(cfg):
        _check_local(cfg, say)
        try:
            model = _model(cfg)
            size = Size.of(model.config)
        except HubUnreachable:
            missing.append(f"model {cfg.model}: its tokenizer, chat template and stop ids")
    told = cache_trouble(cfg, size) if size else ""
    if told and torch.cuda.is_available():
        raise ValueError(told)
    if told:  # the run may be meant for another machine
        say(f"warning: this machine has no GPU, and its processor could not run this: {told}")
    found: dict[str, list[list[Problem]]] = {"train_data": [], "eval_data": []}
    train_sets = [cfg.train_data] if isinstance(cfg.train_data, str) else cfg.train_data
    for key, names in (("train_data", train_sets), ("eval_data", _eval_sets(cfg))):
        for name in names:
            try:
                problems = _problems(cfg, name, say)
            except HubUnreachable:
                missing.append(f"{key} {name}: its problems, their golds and the length of their prompts")
                continue
            if model:
                problems = [problem for problem, _ in _built(cfg, name, problems, model.builder, say)]
            found[key].append(problems)
            if key == "eval_data":
                _tell_shared(sum(found["train_data"], []), set_name(name), problems, say)
    train = sum(found["train_data"], [])
    if len(found["train_data"]) == len(train_sets):
        _check_enough(cfg, len(train))
    if train:
        _try_reward(cfg, train[0], model.tokenizer.decode(model.builder.build(train[0])) if model else train[0].problem)
    return size, missing


@quick_imports()
def dry_run(cfg: Config, processes: int, say: Say) -> int:
    """Say everything that can be told without loading a model, then the configuration; the exit code, 0.

    Raises as load_task does.
    """
    size, missing = look_at_task(cfg, say)
    if size:
        say(memory_text(cfg, size, processes))
    say(to_yaml(cfg))
    for line in missing:
        say(f"not looked at, since the hub is not within reach: {line}")
    return 0


# ---- the parts ----


def _check_same(ranks: Ranks, of_files: dict[str, str]) -> None:
    """Raise ValueError when ranks, on machines of their own, have other files under the same names."""
    every = ranks.gather([of_files])
    for rank, theirs in enumerate(every):
        for line in changed(every[0], theirs):
            raise ValueError(f"rank {rank} has other files than rank 0, under the same names: {line}")


def _check_enough(cfg: Config, problems: int) -> None:
    if problems < cfg.prompts_per_step:
        raise ValueError(
            f"prompts_per_step: {cfg.prompts_per_step} is more than the {problems} usable problems of train_data "
            f"{cfg.train_data}; use at most {problems}"
        )


def _check_local(cfg: Config, say: Say) -> None:
    find_room(checkpoint.safe_run_dir(cfg.output_dir, cfg.run_name))
    find_kernels(cfg)
    find_rule(cfg)
    for line in check_leaks(cfg.train_data, _eval_sets(cfg)):
        say(line)


@contextmanager
def _reward_tried(cfg: Config) -> Iterator[None]:
    """Loads the reward, a user's too, in the process it will have: it comes up while the caller imports and reads."""
    with ThreadPoolExecutor(1) as beside:
        trial = beside.submit(lambda: _verifier(cfg).close())
        yield
        trial.result()


def _verifier(cfg: Config) -> Verifier:
    return Verifier(1, cfg.verifier_timeout_s, VERIFIER_MEMORY_GIB, cfg.reward)


def _try_reward(cfg: Config, problem: Problem, prompt: str) -> None:
    """Ask a reward of the user's about a made-up answer. Raises ValueError when it gives no number."""
    if cfg.reward in ("math", "answer_line"):
        return
    answer = f"\\boxed{{{problem.gold}}}"
    about = {"problem": asdict(problem), "prompt": prompt, "response_tokens": 1, "truncated": False}
    try:
        with _verifier(cfg) as verifier:
            (grade,) = verifier.collect([verifier.submit(answer, problem.gold, about)])
    except GraderError as error:
        raise ValueError(f"reward: {error} (a made-up answer to {_short(problem.id)})") from None
    if grade.reason in NOT_CHECKED:
        raise ValueError(
            f"reward: {cfg.reward} ended in a {grade.reason} on a made-up answer to {_short(problem.id)}; make it "
            "quicker or smaller, or raise verifier_timeout_s"
        )


def _eval_sets(cfg: Config) -> list[str]:
    return [cfg.eval_data] if isinstance(cfg.eval_data, str) else cfg.eval_data


def _model(cfg: Config) -> Model:
    """Its configuration, tokenizer and prompts, once its files are seen to be whole and to fit `cfg`."""
    find_model(cfg.model)
    config = read_config(cfg.model, trust_remote_code=cfg.trust_remote_code)
    check_context(cfg, config)
    check_weights(cfg.model, config, trust_remote_code=cfg.trust_remote_code)
    tokenizer = read_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code)
    builder = PromptBuilder(
        tokenizer, template=cfg.prompt_template, system_prompt=cfg.system_prompt, chat_template=cfg.chat_template
    )
    return Model(tokenizer, tuple(stop_token_ids(cfg.model, tokenizer)), builder, config)


def _prompts(cfg: Config, sets: str | list[str], builder: PromptBuilder, say: Say) -> Rows:
    return _built(cfg, sets, _problems(cfg, sets, say), builder, say)


def _built(cfg: Config, sets: str | list[str], problems: list[Problem], builder: PromptBuilder, say: Say) -> Rows:
    kept, dropped = build_prompts(problems, builder, max_prompt_tokens=cfg.max_prompt_tokens)
    if dropped:
        say(f"{sets}: {dropped} prompts longer than max_prompt_tokens {cfg.max_prompt_tokens} dropped")
    spelled = list(filter(None, (builder.control_tokens_in(problem) for problem, _ in kept)))
    if spelled:
        tokens = ", ".join(sorted(set().union(*spelled)))
        say(f"warning: {sets}: {len(spelled)} problems spell control tokens ({tokens}); they are given as plain text")
    return kept


def _problems(cfg: Config, sets: str | list[str], say: Say) -> list[Problem]:
    report = load_problems(sets)
    for line in report.lines:
        say(line)
    return _with_good_golds(report.problems, cfg, say)


def _tell_shared(train: list[Problem], name: str, held_out: list[Problem], say: Say) -> None:
    shared = shared_problems(train, held_out)
    if shared:
        say(
            f"warning: {len(shared):,} of the {len(held_out):,} problems of eval_data {name} are in train_data too, "
            f"such as {_short(shared[0])}: of them the score tells memory"
        )


def _with_good_golds(problems: list[Problem], cfg: Config, say: Say) -> list[Problem]:
    """Without those whose gold does not verify against itself: no answer to them could be rewarded.

    Which these are never depends on how fast a machine is: a gold that used up its limits is a mistake.
    """
    if cfg.reward != "math":
        return problems
    try:
        reasons = check_golds([problem.gold for problem in problems])
    except GraderError as error:
        raise ValueError(f"train_data, eval_data: the gold answers cannot be checked: {error}") from None
    told = [
        f"{_short(problem.id)}: gold {_short(repr(problem.gold))}: {reason}"
        for problem, reason in zip(problems, reasons, strict=True)
        if reason
    ]
    unchecked = [line for line, reason in zip(told, filter(None, reasons), strict=True) if reason in NOT_CHECKED]
    if unchecked:
        raise ValueError(
            f"train_data, eval_data: {len(unchecked)} gold answers are too much for the verifier, and what depends on "
            "a machine's speed may not choose the data; take them out; the first:\n  " + "\n  ".join(unchecked[:10])
        )
    if told and len(told) == len(problems):
        raise ValueError(
            f"train_data, eval_data: none of {len(problems)} gold answers verifies against itself; correct them, the "
            "first:\n  " + "\n  ".join(told[:10])
        )
    for line in told[:10]:
        say(f"dropped {line}")
    if told:
        say(f"{len(told)} problems dropped whose gold does not verify against itself")
    return [problem for problem, reason in zip(problems, reasons, strict=True) if not reason]


def _short(text: str) -> str:
    """As much of a text as fits into a line."""
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
