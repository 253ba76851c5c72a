"""What the policy is trained and evaluated on: tokenizer, stop ids, problems with their prompts.

task = load_task(cfg, say)             # finds the user's mistakes before a model is loaded
dry_run(cfg, processes, say)           # the same as far as it is within reach, and tells it: --dry_run
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    stop_token_ids,
    vocabulary_size,
)
from rewards import Verifier, check_golds
from trainer import checkpoint
from trainer.checks import find_kernels, find_model, find_rule

Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What the policy is trained and evaluated on."""

    tokenizer: Any
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    train: list[tuple[Problem, list[int]]]  # problem, prompt token ids
    evals: dict[str, list[tuple[Problem, list[int]]]]  # by set


def load_task(cfg: Config, say: Say) -> Task:
    """Load problems, check their golds, build prompts. Raises ValueError or OSError naming what to mend."""
    from transformers import AutoConfig

    _check_local(cfg, say)
    find_model(cfg.model)
    tokenizer, stops, builder = _prompting(cfg)
    train = _prompts(cfg, cfg.train_data, builder, say)
    _check_enough(cfg, len(train))
    evals = {set_name(name): _prompts(cfg, name, builder, say) for name in _eval_sets(cfg)} if cfg.eval_every else {}
    sizes = ", ".join(f"{name} ({len(rows)})" for name, rows in evals.items())
    say(f"{len(train):,} training prompts; evaluation on {sizes or 'nothing'}")
    rows = AutoConfig.from_pretrained(cfg.model, trust_remote_code=cfg.trust_remote_code).vocab_size
    return Task(tokenizer, min(vocabulary_size(tokenizer), rows), stops, train, evals)


def look_at_task(cfg: Config, say: Say) -> tuple[Size | None, list[str]]:
    """Check all that load_task checks and the hub does not keep back; the model's size, and what was kept back.

    Raises as load_task does.
    """
    from transformers import AutoConfig

    missing: list[str] = []
    _check_local(cfg, say)
    builder, size = None, MODELS.get(cfg.model)
    try:
        find_model(cfg.model)
        *_, builder = _prompting(cfg)
        size = Size.of(AutoConfig.from_pretrained(cfg.model, trust_remote_code=cfg.trust_remote_code))
    except HubUnreachable:
        missing.append(f"model {cfg.model}: its tokenizer, chat template and stop ids")
    train = [cfg.train_data] if isinstance(cfg.train_data, str) else cfg.train_data
    for key, names in (("train_data", train), ("eval_data", _eval_sets(cfg))):
        found, out_of_reach = 0, len(missing)
        for name in names:
            try:
                found += len(_prompts(cfg, name, builder, say) if builder else _problems(cfg, name, say))
            except HubUnreachable:
                missing.append(f"{key} {name}: its problems, their golds and the length of their prompts")
        if key == "train_data" and len(missing) == out_of_reach:
            _check_enough(cfg, found)
    return size, missing


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


def _check_enough(cfg: Config, problems: int) -> None:
    if problems < cfg.prompts_per_step:
        raise ValueError(
            f"prompts_per_step: {cfg.prompts_per_step} is more than the {problems} usable problems of train_data "
            f"{cfg.train_data}; use at most {problems}"
        )


def _check_local(cfg: Config, say: Say) -> None:
    checkpoint.safe_run_dir(cfg.output_dir, cfg.run_name)
    find_kernels(cfg)
    find_rule(cfg)
    Verifier(1, cfg.verifier_timeout_s, cfg.verifier_memory_gib, cfg.reward).close()  # loads a grader of the user's
    for line in check_leaks(cfg.train_data, _eval_sets(cfg)):
        say(line)


def _eval_sets(cfg: Config) -> list[str]:
    return [cfg.eval_data] if isinstance(cfg.eval_data, str) else cfg.eval_data


def _prompting(cfg: Config) -> tuple[Any, tuple[int, ...], PromptBuilder]:
    """The tokenizer, the ids that end an answer, and what makes prompts of problems."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=cfg.trust_remote_code)
    stops = stop_token_ids(cfg.model, tokenizer)
    builder = PromptBuilder(
        tokenizer, template=cfg.prompt_template, system_prompt=cfg.system_prompt, chat_template=cfg.chat_template
    )
    return tokenizer, tuple(stops), builder


def _prompts(cfg: Config, sets: str | list[str], builder: PromptBuilder, say: Say) -> list[tuple[Problem, list[int]]]:
    kept, dropped = build_prompts(_problems(cfg, sets, say), builder, max_prompt_tokens=cfg.max_prompt_tokens)
    if dropped:
        say(f"{sets}: {dropped} prompts longer than max_prompt_tokens {cfg.max_prompt_tokens} dropped")
    return kept


def _problems(cfg: Config, sets: str | list[str], say: Say) -> list[Problem]:
    report = load_problems(sets)
    for line in report.lines:
        say(line)
    return _with_good_golds(report.problems, cfg, say)


def _with_good_golds(problems: list[Problem], cfg: Config, say: Say) -> list[Problem]:
    """Without those whose gold does not verify against itself: no answer to them could be rewarded."""
    if cfg.reward != "math":
        return problems
    reasons = check_golds([problem.gold for problem in problems])
    bad = [f"{p.id}: gold {p.gold!r}: {reason}" for p, reason in zip(problems, reasons, strict=True) if reason]
    if bad and (cfg.bad_gold == "refuse" or len(bad) == len(problems)):
        raise ValueError(
            f"bad_gold: {len(bad)} of {len(problems)} gold answers do not verify against themselves; the first:\n  "
            + "\n  ".join(bad[:10])
            + "\nmend them, or set bad_gold: drop to train without them"
        )
    for line in bad[:10]:
        say(f"dropped {line}")
    if bad:
        say(f"{len(bad)} problems dropped whose gold does not verify against itself")
    return [problem for problem, reason in zip(problems, reasons, strict=True) if not reason]
