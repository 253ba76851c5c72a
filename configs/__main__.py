"""Check configurations without a GPU, a model or a network: mistakes, batch arithmetic, memory per rank.

    python -m configs --check                          # every YAML file of this folder, on 8 processes
    python -m configs --check mine.yaml --processes 16

Exit code 1 when a file has a mistake. Files of `sharding: none` are checked on one process. Memory is the estimate of
configs/memory.py.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from configs.load import CONFIG_DIR, ConfigError, load
from configs.memory import CARDS_GIB, MODELS, estimate
from configs.schema import Config, Plan


def load_on(path: Path, processes: int) -> tuple[Config, Plan]:
    """The configuration of a file with its batch arithmetic on `processes` (one under `sharding: none`).

    Raises ConfigError with every mistake.
    """
    before = os.environ.get("WORLD_SIZE")
    try:
        os.environ["WORLD_SIZE"] = "1"
        cfg = load(Config, ["--config", str(path)])
        if cfg.sharding != "none":
            os.environ["WORLD_SIZE"] = str(processes)
            cfg = load(Config, ["--config", str(path)])
        return cfg, Plan(cfg)
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


HEADER = (
    f"{'GPUs':>4} {'prompts x samples':>17} {'updates x sequences':>19} {'rank, update':>12} {'steps':>6}"
    f" | {'param':>6} {'states':>6} {'update':>6} {'rollout':>14} {'card':>5}"
)


FOOTER = f"""
rank, update: sequences of one update on one rank. Memory in GiB per rank, estimated (configs/memory.py):
states: weights and Adam; update: peak of that phase; rollout: beside the engine + the engine's share of the card;
card: the smallest of {", ".join(map(str, CARDS_GIB))} GiB that holds all of it"""


def row(cfg: Config, plan: Plan) -> str:
    """The numbers of one file, under HEADER."""
    batch = (
        f"{plan.processes:>4} {f'{cfg.prompts_per_step} x {cfg.samples_per_prompt}':>17} "
        f"{f'{cfg.updates_per_step} x {plan.sequences_per_minibatch:,}':>19} "
        f"{plan.sequences_per_minibatch // plan.processes:>12,} {cfg.max_steps:>6,}"
    )
    size = MODELS.get(cfg.model)
    if size is None:
        return f"{batch} | no sizes known for model {cfg.model}"
    memory = estimate(cfg, size, plan.processes)
    return (
        f"{batch} | {size.parameters / 1e9:>5.2f}B {memory.states:>6.1f} {memory.update:>6.1f} "
        f"{f'{memory.beside_engine:.1f} + {cfg.engine_memory_share:.0%}':>14} {memory.card or 'none':>5}"
    )


def check(paths: Sequence[Path], processes: int) -> int:
    """Print a table of the files, those with equal numbers under one row, then their mistakes; 1 if there are any."""
    groups: dict[str, list[str]] = {}
    mistakes: list[str] = []
    for path in paths:
        try:
            groups.setdefault(row(*load_on(path, processes)), []).append(path.stem)
        except ConfigError as error:
            mistakes += [line if line.startswith(path.name) else f"{path.name}: {line}" for line in error.problems]
    if groups:
        print(HEADER)
        for numbers, names in groups.items():
            print(numbers)
            print(textwrap.indent(textwrap.fill(", ".join(names), 115), " " * 5))
        print(FOOTER)
    for line in mistakes:
        print(line, file=sys.stderr)
    return 1 if mistakes else 0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m configs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", required=True, help="print the table")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="YAML files; none: all of this folder")
    parser.add_argument("--processes", type=int, default=8, help="of a launch (default 8)")
    arguments = parser.parse_args(argv)
    return check(arguments.files or sorted(CONFIG_DIR.glob("*.yaml")), arguments.processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
