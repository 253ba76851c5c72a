"""Tables of raw rows, from local files or from the hub: column names first, rows only of the columns asked for.

Local parquet is read with pyarrow and JSON with Python, not through `datasets.load_dataset`: no second copy in a cache,
no lock between ranks, and an error names the file and the line. Arrow files, `save_to_disk` folders and the hub go
through `datasets`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.registry import SetSpec

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".parquet", ".jsonl", ".json", ".arrow")
MOST_DIGITS = 4300  # of a whole number in JSON: Python's own limit
SPLIT_NAMES = ("train", "test", "validation")
PROBE_TIMEOUT_S = 5.0  # one request to the hub before anything else: the libraries' own retries take half a minute


@dataclass(frozen=True)
class Table:
    """where: what errors call it. columns: all there are. rows(columns): one dict per row with these columns."""

    where: str
    columns: list[str]
    rows: Callable[[Sequence[str]], Iterator[dict[str, Any]]]


def read_local(path: Path, split: str | None, config: str | None) -> Table:
    """A local file, or a folder: `datasets.save_to_disk`'s, or one of data files.

    split, config: a registry set's, None for a plain path. In a folder they choose among several splits (files named
    test*, train*) and configurations (sub-folders); a plain path must not be ambiguous.
    Raises ValueError naming the path and the fix.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        return _read_files([path])
    if config and (path / config).is_dir():
        path = path / config
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _read_saved(path, split)
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and not file.name.startswith("."))
    if not files:
        raise ValueError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
    found = {name: [file for file in files if name in file.relative_to(path).as_posix()] for name in SPLIT_NAMES}
    found = {name: its_files for name, its_files in found.items() if its_files}
    if split and found.get(split):
        return _read_files(found[split])
    if len(found) > 1:
        raise ValueError(f"{path}: holds several splits ({', '.join(found)}); name one file or sub-folder of it")
    return _read_files(files)


class HubUnreachable(ValueError):
    """The hub does not give what a name of its own stands for; the text says how to get it elsewhere."""


def read_hub(name: str, spec: SetSpec) -> Table:
    """A registry set from the hub (or, with HF_HUB_OFFLINE=1, from the cache of `datasets`)."""
    dataset, revision = load_hub(name, spec)
    return _dataset_table(dataset, f"{spec.hub_id}@{revision[:8]}")


def load_hub(name: str, spec: SetSpec) -> "tuple[datasets.Dataset, str]":
    """(the split, the revision read). Raises HubUnreachable, at once when offline."""
    import datasets
    from datasets import config
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  (of its own client)

    try:
        revision = "cached"
        if not config.HF_HUB_OFFLINE:
            revision = str(HfApi().dataset_info(spec.hub_id, timeout=PROBE_TIMEOUT_S).sha)
        pinned = None if revision == "cached" else revision
        return datasets.load_dataset(spec.hub_id, spec.config, split=spec.split, revision=pinned), revision
    except (HTTPError, OSError, ValueError, DatasetsError) as error:
        raise HubUnreachable(
            f"{name}: cannot read {spec.hub_id} (config {spec.config or 'default'}, split {spec.split}) from the hub: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}\n"
            f"Where the hub can be reached, run   python -m data.fetch {name} --out DIR\n"
            f"and write   {name}=DIR/{name}.parquet   in place of {name}. "
            "(HF_HUB_OFFLINE=1 takes what the `datasets` library has in its cache.)"
        ) from error


def _read_files(files: list[Path]) -> Table:
    """Several files of one split, read one after another."""
    readers = {".parquet": _read_parquet, ".jsonl": _read_json, ".json": _read_json, ".arrow": _read_arrow}
    unknown = [file for file in files if file.suffix not in readers]
    if unknown:
        raise ValueError(f"{unknown[0]}: unknown kind of file; one of {', '.join(SUFFIXES)} or a folder is read")
    tables = [readers[file.suffix](file) for file in files]
    for table in tables[1:]:
        if set(table.columns) != set(tables[0].columns):
            raise ValueError(f"{table.where}: columns {table.columns} differ from those of {tables[0].where}")

    def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for table in tables:
            yield from table.rows(columns)

    where = tables[0].where if len(tables) == 1 else f"{files[0].parent} ({len(files)} files)"
    return Table(where, tables[0].columns, rows)


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    def broken(error: Exception) -> ValueError:
        return ValueError(f"{path}: not a readable parquet file ({str(error)[:200]}); fetch or write it again")

    def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                yield from _dicts(file.iter_batches(columns=list(columns)), str(path))
        except (pyarrow.ArrowException, OSError) as error:
            raise broken(error) from error

    try:
        return Table(str(path), pyarrow.parquet.read_schema(path).names, rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise broken(error) from error


def _read_json(path: Path) -> Table:
    """JSON lines, or one JSON list of objects; a missing key reads as None, the columns are those of all rows."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    records: list[tuple[int, Any]] = []
    if text.lstrip().startswith("["):
        try:
            records = list(enumerate(json.loads(text, parse_int=_whole), 1))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
        except RecursionError:
            raise ValueError(f"{path}: not JSON that can be read (nested too deeply)") from None
    else:
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a string
            try:
                records += [(number, json.loads(line, parse_int=_whole))] if line.strip() else []
            except (json.JSONDecodeError, RecursionError) as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                raise ValueError(f"{path}, line {number}: not JSON ({why}); one object per line") from None
    for number, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, record {number}: {type(record).__name__} found; an object per row is expected")
    columns = list(dict.fromkeys(key for _, record in records for key in record))

    def rows(names: Sequence[str]) -> Iterator[dict[str, Any]]:
        return ({name: record.get(name) for name in names} for _, record in records)

    return Table(str(path), columns, rows)


def read_json_object(path: Path) -> dict[str, Any]:
    """What a small JSON file holds. Raises ValueError naming the file when that is not an object."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: not JSON ({why}); get the file again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {type(found).__name__} found, a JSON object is expected; get the file again")
    return found


def _whole(digits: str) -> int | str:
    """A whole number of JSON; as text when it has more digits than Python converts."""
    return int(digits) if len(digits) <= MOST_DIGITS else digits


def _dicts(batches: Iterable[Any], where: str) -> Iterator[dict[str, Any]]:
    """The rows of pyarrow batches. Raises ValueError naming the row whose text is not UTF-8."""
    n_rows = 0
    for batch in batches:
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            for i in range(batch.num_rows):
                try:
                    batch.slice(i, 1).to_pylist()
                except UnicodeDecodeError as error:
                    row = f"{where}, row {n_rows + i + 1}"
                    raise ValueError(f"{row}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
        n_rows += batch.num_rows


def _read_arrow(path: Path) -> Table:
    import datasets
    import pyarrow

    try:
        return _dataset_table(datasets.Dataset.from_file(str(path)), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not an Arrow stream as `datasets` writes it ({str(error)[:200]})") from error


def _read_saved(path: Path, split: str | None) -> Table:
    import datasets
    import pyarrow

    try:
        saved = datasets.load_from_disk(str(path))
    except (pyarrow.ArrowException, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a whole `save_to_disk` folder ({str(error)[:200]}); save it again") from error
    if isinstance(saved, datasets.DatasetDict):
        wanted = split if split in saved else (next(iter(saved)) if len(saved) == 1 else None)
        if wanted is None:
            raise ValueError(f"{path}: holds the splits {', '.join(map(str, saved))}; name one of these sub-folders")
        saved = saved[wanted]
    return _dataset_table(saved, str(path))


def _dataset_table(dataset: "datasets.Dataset", where: str) -> Table:
    def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        yield from _dicts(dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=10_000), where)

    return Table(where, dataset.column_names, rows)
