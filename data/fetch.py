"""Save known sets as parquet files, for machines without a network.

    python -m data.fetch aime24 aime25 amc23 --out DIR      then write  aime24=DIR/aime24.parquet  in the configuration

Only the columns that are read are saved, all rows of the split, nothing cleaned.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data.formats import find_layout
from data.registry import SETS
from data.tables import HubUnreachable, load_hub


def save_set(name: str, out: Path) -> Path:
    """Download registry set `name` and write out/<name>.parquet.

    Raises ValueError for an unknown set, HubUnreachable when the hub cannot be read, OSError when `out` cannot be.
    """
    if name not in SETS:
        raise ValueError(f"unknown set {name!r}. Known: {', '.join(SETS)}")
    out.mkdir(parents=True, exist_ok=True)
    dataset, revision = load_hub(name, SETS[name])
    columns = find_layout(dataset.column_names).columns(dataset.column_names)
    path = out / f"{name}.parquet"
    dataset.select_columns(columns).to_parquet(path)
    print(f"{name}: {len(dataset):,} rows of {SETS[name].hub_id}@{revision[:8]}; use {name}={path}")
    return path


def main(argv: Sequence[str]) -> int:
    """The exit code: 0, or 2 after one line for what cannot be fetched or written."""
    parser = argparse.ArgumentParser(prog="python -m data.fetch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one or more of {', '.join(SETS)}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, made where missing")
    arguments = parser.parse_args(argv)
    try:
        for name in arguments.names:
            save_set(name, arguments.out)
    except HubUnreachable as error:  # its other lines send the reader here
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
