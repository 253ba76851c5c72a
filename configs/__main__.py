"""Lists the configurations and checks them; needs no GPU, model or network.

    python -m configs --list                           # every model with every method
    python -m configs --check                          # all of them on 8 processes: mistakes, batch arithmetic, memory
    python -m configs --check mine.yaml --processes 16

Exit code 2 when a file has a mistake. Files of `sharding: none` are looked at on one process. Memory is the estimate of
configs/memory.py.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from configs.load import ConfigError, load, read
from configs.memory import CARDS_GIB, MODELS, Memory, estimate
from configs.names import CONFIG_DIR, config_names, stems
from configs.schema import Config, Plan


def load_on(name: str, processes: int) -> tuple[Config, Plan]:
    """The configuration `name` with its batch arithmetic on `processes` (one under `sharding: none`).

    Raises ConfigError with every mistake.
    """
    argv = ["--config", name]
    sharding = read(Config, argv)[0].sharding
    with _launch_of(1 if sharding == "none" else processes):
        cfg = load(Config, argv)
        return cfg, Plan(cfg)


@contextmanager
def _launch_of(processes: int) -> Iterator[None]:
    """The environment of rank 0 of so many processes."""
    before = dict(os.environ)
    os.environ.update(WORLD_SIZE=str(processes), RANK="0")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# ---- --check ----

HEADER = (
    f"{'GPUs':>4} {'prompts x samples':>17} {'updates x sequences':>19} {'rank, update':>12} {'steps':>6}"
    f" | {'param':>6} {'states':>6} {'update':>6} {'rollout':>14} {'card':>5}"
)


FOOTER = f"""
rank, update: sequences of one update on one rank. Memory in GiB per rank, estimated (configs/memory.py):
states: weights and Adam; update: peak of that phase; rollout: beside the engine + the engine's share of the card;
card: the smallest of {", ".join(map(str, CARDS_GIB))} GiB that holds all of it"""


def memory_of(cfg: Config, plan: Plan) -> Memory | None:
    """None for a model whose sizes configs/memory.py does not know."""
    return estimate(cfg, MODELS[cfg.model], plan.processes) if cfg.model in MODELS else None


def row(cfg: Config, plan: Plan) -> str:
    """The numbers of one file, under HEADER."""
    batch = (
        f"{plan.processes:>4} {f'{cfg.prompts_per_step} x {cfg.samples_per_prompt}':>17} "
        f"{f'{cfg.updates_per_step} x {plan.sequences_per_minibatch:,}':>19} "
        f"{plan.sequences_per_minibatch // plan.processes:>12,} {cfg.max_steps:>6,}"
    )
    memory = memory_of(cfg, plan)
    if memory is None:
        return f"{batch} | no sizes known for model {cfg.model}"
    return (
        f"{batch} | {MODELS[cfg.model].parameters / 1e9:>5.2f}B {memory.states:>6.1f} {memory.update:>6.1f} "
        f"{f'{memory.beside_engine:.1f} + {cfg.engine_memory_share:.0%}':>14} {memory.card or 'none':>5}"
    )


def check(names: Sequence[str], processes: int) -> int:
    """Print a table of the files, those with equal numbers under one row, then their mistakes; 2 if there are any."""
    groups: dict[str, list[str]] = {}
    mistakes: list[str] = []
    for name in names:
        file = Path(name).name
        try:
            groups.setdefault(row(*load_on(name, processes)), []).append(file.removesuffix(".yaml"))
        except ConfigError as error:
            mistakes += [line if line.startswith(file) else f"{file}: {line}" for line in error.problems]
    if groups:
        print(HEADER)
        for numbers, files in groups.items():
            print(numbers)
            print(textwrap.indent(textwrap.fill(", ".join(files), 115), " " * 5))
        print(FOOTER)
    for line in mistakes:
        print(line, file=sys.stderr)
    return 2 if mistakes else 0


# ---- --list ----


def listing(processes: int) -> str:
    """Methods by models, in each cell the card that the run needs, then what every file is.

    Raises ConfigError for a file with a mistake.
    """
    models, methods = stems("models"), stems("methods")
    wide = max(map(len, [*models, *methods, *stems("")]))
    lines = ["train.py --config MODEL_METHOD.yaml, or any other of these names", "", " ".join([" " * wide, *models])]
    for method in methods:
        cells = [f"{method:<{wide}}"]
        for model in models:
            memory = memory_of(*load_on(f"{model}_{method}", processes))
            cells.append(f"{(memory and memory.card) or '?':>{len(model)}}")
        lines.append(" ".join(cells))
    lines.append(f"{'':{wide}} in GiB, the smallest card of which {processes} hold the run (estimated; ?: unknown)")
    for title, kind in (("models", "models"), ("methods", "methods"), ("other", "")):
        lines += ["", title, *(f"{name:<{wide}} {first_words(kind, name)}" for name in stems(kind))]
    return "\n".join(lines)


def first_words(kind: str, name: str) -> str:
    """The first sentence of a file's comment."""
    line = (CONFIG_DIR / kind / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("# ").partition(". ")[0].rstrip(".") if line.startswith("# ") else ""


# ---- the command line ----


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1; for example 8")
    return int(text)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m configs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print models and methods")
    what.add_argument("--check", action="store_true", help="print numbers and mistakes")
    parser.add_argument("files", nargs="*", metavar="FILE", help="of --check; none: all that --list shows")
    parser.add_argument("--processes", type=positive, default=8, metavar="N", help="of a launch (default 8)")
    arguments = parser.parse_args(argv)
    if arguments.check:
        return check(arguments.files or config_names(), arguments.processes)
    try:
        print(listing(arguments.processes))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
