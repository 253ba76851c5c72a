"""Raw rows of local files, folders and hub data sets.

`datasets` reads the hub, `save_to_disk` folders and Arrow files, and finds the splits of a folder. pyarrow reads
Parquet without a cached copy. Python reads JSON and CSV: errors have the line number, and values keep their types.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from data.registry import SUFFIXES

if TYPE_CHECKING:
    import datasets

MOST_DIGITS = 4300  # digits of an integer in JSON: Python's limit
PROBE_TIMEOUT_S = 5.0  # for a first request to the hub: the retries of the libraries take 30 s


class Table(NamedTuple):
    """Raw rows of a source.

    where: name in messages. columns: names of all columns. rows(columns): dicts with at least these columns.
    """

    where: str
    columns: list[str]
    rows: Callable[[Sequence[str]], Iterable[dict[str, Any]]]


class HubUnreachable(ValueError):
    """Raised if the hub is not reachable or lacks the files; the message explains how to download them elsewhere."""


def read_local(path: Path, config: str | None, split: str | None, prefer: str) -> Table:
    """Read a file, a `save_to_disk` folder, or a folder of data files such as a clone of a hub repository.

    prefer: the split to read if `split` is None and the folder has several. Raises ValueError with path and fix.
    """
    import datasets

    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        if split:
            raise ValueError(f"{path}: a file has no splits (got {split}); remove it")
        return _read_file(path)
    if config and (path / config).is_dir():
        path, config = path / config, None
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        with _reading(path, "a whole `save_to_disk` folder"):
            saved = datasets.load_from_disk(str(path))
        if split and not isinstance(saved, dict) and str(saved.split) != split:
            raise ValueError(f"{path}: has the split {saved.split}, not {split}; remove it")
        return _dataset_table(_choose(saved, split, prefer, str(path)), str(path))
    try:
        with TemporaryDirectory() as cache:  # datasets creates a lock file there
            builder: Any = datasets.load_dataset_builder(str(path), config, cache_dir=cache)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}; write FOLDER:CONFIG:SPLIT, or name a file") from None
    files = _choose(builder.config.data_files, split, prefer, str(path))
    tables = [_read_file(Path(file)) for file in files]
    for table in tables:
        if set(table.columns) != set(tables[0].columns):
            raise ValueError(f"{table.where}: columns {table.columns} differ from those of {tables[0].where}")
    where = tables[0].where if len(tables) == 1 else f"{path} ({len(tables)} files)"
    return Table(where, tables[0].columns, lambda names: chain.from_iterable(table.rows(names) for table in tables))


def read_hub(name: str, hub_id: str, config: str | None, split: str | None, prefer: str) -> Table:
    """Read a data set of the hub, or with HF_HUB_OFFLINE=1 from the cache of `datasets`.

    name: the set's name in the config, for messages. Raises HubUnreachable, immediately when offline, and ValueError
    with the fix for an invalid name.
    """
    import datasets
    from datasets import config as settings
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # pyright: ignore[reportPrivateImportUsage]

    try:
        revision = None
        if not settings.HF_HUB_OFFLINE:
            revision = str(HfApi().dataset_info(hub_id, timeout=PROBE_TIMEOUT_S).sha)
        dataset = datasets.load_dataset(hub_id, config, split=split, revision=revision)
    except (HTTPError, OSError, ValueError, DatasetsError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        text = f"{name}: cannot read {hub_id} (config {config or 'default'}, split {split or prefer}): {reason}"
        if isinstance(error, RepositoryNotFoundError) or (revision and not isinstance(error, HTTPError | OSError)):
            raise ValueError(f"{text}; write ORG/NAME:CONFIG:SPLIT") from None
        raise HubUnreachable(
            f"{text}\nWhere the hub can be reached, run   hf download {hub_id} --repo-type dataset --local-dir DIR\n"
            f"and write   {'DIR' + name.removeprefix(hub_id) if name.startswith(hub_id) else name + '=DIR'}   in place "
            f"of {name}. (HF_HUB_OFFLINE=1 takes what the `datasets` library has in its cache.)"
        ) from error
    return _dataset_table(_choose(dataset, split, prefer, hub_id), f"{hub_id}@{(revision or 'cached')[:8]}")


def _choose(splits: Any, split: str | None, prefer: str, where: str) -> Any:
    """Choose from a dict of splits: `split`, else the only one, else `prefer`. Other values are returned unchanged."""
    if not isinstance(splits, dict):
        return splits
    wanted = split or (prefer if len(splits) > 1 else next(iter(splits)))
    if wanted not in splits:
        raise ValueError(f"{where}: has the splits {', '.join(map(str, splits))}, not {wanted}; write {where}:SPLIT")
    return splits[wanted]


def _read_file(path: Path) -> Table:
    import datasets
    import pyarrow.parquet

    if path.suffix == ".parquet":

        def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
            with _reading(path, "a readable parquet file"), pyarrow.parquet.ParquetFile(path) as file:
                yield from _dicts(file.iter_batches(columns=list(columns)), str(path))

        with _reading(path, "a readable parquet file"):
            return Table(str(path), pyarrow.parquet.read_schema(path).names, rows)
    if path.suffix == ".arrow":
        with _reading(path, "an Arrow stream as `datasets` writes it"):
            return _dataset_table(datasets.Dataset.from_file(str(path)), str(path))
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file; one of {', '.join(SUFFIXES)} or a folder is read")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    records = (_read_csv if path.suffix == ".csv" else _read_json)(text, str(path))
    return Table(str(path), list(dict.fromkeys(key for record in records for key in record)), lambda _: records)


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Raise ValueError with the file name for errors of a damaged file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not {kind} ({str(error)[:200]}); fetch or write it again") from error


def _read_csv(text: str, where: str) -> list[dict[str, Any]]:
    """Parse a CSV file with a header row. Every value is text."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader, records = csv.DictReader(io.StringIO(text, newline=""), strict=True), []
    try:
        for record in reader:
            if None in record or None in record.values():
                raise csv.Error(f"the heading has {len(reader.fieldnames or [])} columns, and this row does not")
            records.append(record)
    except csv.Error as error:
        raise ValueError(f"{where}, line {reader.line_num}: not CSV ({error}); correct the row") from None
    return records


def _read_json(text: str, where: str) -> list[dict[str, Any]]:
    """Parse JSON lines, or one JSON list of objects."""
    records: list[tuple[int, Any]] = []
    is_list = text.lstrip().startswith("[")
    lines = [text] if is_list else text.split("\n")  # splitlines would also split at U+2028 inside a string
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line, parse_int=_whole) if line.strip() else []
        except RecursionError:
            raise ValueError(f"{where}, line {number}: not JSON (nested too deeply)") from None
        except json.JSONDecodeError as error:
            hint = "" if is_list else "; one object per line"
            raise ValueError(f"{where}, line {number + error.lineno - 1}: not JSON ({error.msg}){hint}") from None
        records += enumerate(value, 1) if is_list else [(number, value)] if line.strip() else []
    for number, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{where}, record {number}: {type(record).__name__} found; an object per row is expected")
    return [record for _, record in records]


def read_json_object(path: Path) -> dict[str, Any]:
    """Load a JSON object from a file. Raises ValueError with the file name if it is not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: not JSON ({why}); get the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {type(value).__name__} found, a JSON object is expected; get the file again")
    return value


def _whole(digits: str) -> int | str:
    """Parse an integer of JSON; text if it has more digits than Python converts."""
    return int(digits) if len(digits) <= MOST_DIGITS else digits


def _dataset_table(dataset: "datasets.Dataset", where: str) -> Table:
    def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        yield from _dicts(dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=10_000), where)

    return Table(where, dataset.column_names, rows)


def _dicts(batches: Iterable[Any], where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of pyarrow batches. Raises ValueError with the number of a row that is not UTF-8."""
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
