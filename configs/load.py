"""Load YAML files and command-line overrides into a frozen dataclass, and report all invalid values at once.

    @dataclass(frozen=True)
    class Config:
        lr: float = knob(1e-6, "learning rate", symbol="η", source="arXiv 2603.04918 §4", above=0, section="Optimizer")

    config = load_or_exit(Config, sys.argv[1:])   # train.py --config NAME.yaml --lr 2e-6

- NAME is looked up in this folder, then in the current one. It can be a path, and `.yaml` is optional.
- MODEL_METHOD.yaml reads models/MODEL.yaml, then methods/METHOD.yaml, and sets run_name (configs/names.py).
- `inherit: NAME.yaml` in a file reads that configuration first (looked up next to the file, then in this folder).
- The option's type determines how a value is parsed, not YAML: `lr: 1e-6` is a number, `run_name: no` and
  `run_name: 010` are texts, `yes` is not a bool. Empty, `~` or `null` is None if None is allowed.
- A mapping is merged entry by entry: `--rule_args.delta 0.03` replaces one entry of a file's `rule_args: {...}`.

Not supported: interpolation, environment variables, more than one parent.
"""

import contextlib
import dataclasses
import difflib
import math
import operator
import os
import re
import sys
import textwrap
import types
import typing
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from configs.names import CONFIG_DIR, config_names, find, label

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Entry = tuple[str, str, yaml.Node]  # place, option (option.name for an entry of a mapping), value

BARE = yaml.ScalarNode("tag:yaml.org,2002:bool", "true")  # value of a `--key` without one
UNREADABLE = (OSError, yaml.YAMLError, ValueError, OverflowError, RecursionError)  # PyYAML raises all of them
RESERVED = ("config", "help", "inherit")
NULLS = ("", "~", "null", "Null", "NULL")
NUMBER = re.compile(r"[-+.\d][-+.\d_eE]*")  # texts that may be parsed as a number
TEXT_TYPES = (NoneType, bool, int, float, str)  # types to try, in order, for a value without a declared type
TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}
LIMITS = {  # limits of a number: text, and the comparison of value and limit
    "low": ("from", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}


class ConfigError(ValueError):
    """Raised with all errors of a configuration. `.problems` has one line per error."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def knob(
    default: Any,
    help: str,
    *,
    unit: str = "",
    symbol: str = "",
    source: str = "",
    section: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    belongs_to: str = "",
) -> Any:
    """Define an option as a dataclass field.

    Its annotation is the type: int, float, bool, str, Literal of texts, list of these, X | None, or dict[str, Any] for
    a mapping whose values have the types that YAML gives them.

    low, high: inclusive limits. above, below: exclusive limits. section: heading of --help before this option.
    belongs_to: name of an option. A file or command line that sets that option drops inherited values of this one.
    """
    metadata = locals()  # all parameters by name
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def load(cls: type[T], argv: Sequence[str]) -> T:
    """Parse the configuration of `argv` (without the program's name).

    Accepts `--config FILE`, and `--key value` or `--key=value` for any option. For a bool, `--key` alone means true.
    Lists are written `[a, b]`. `--help` prints every option and raises SystemExit(0).
    A method `problems(self) -> list[str]` of `cls` checks combinations of options and returns error lines.
    Raises ConfigError with all errors of the files, the command line and `problems`.
    """
    if "--help" in argv or "-h" in argv:
        if _is_main_process():
            print(help_text(cls))
        raise SystemExit(0)
    problems: list[str] = []
    values, unread = _read(cls, argv, problems)
    config = cls(**values)
    # Invalid options have their defaults here, so conflicts that involve one would be misleading.
    for line in getattr(config, "problems", list)():
        if not any(re.search(rf"\b{key}\b", line) for key in unread):
            problems.append(line)
    if problems:
        raise ConfigError(problems)
    return config


def load_or_exit(cls: type[T], argv: Sequence[str]) -> T:
    """`load` for scripts: print one line per error to stderr and exit with code 2, without a traceback.

    Also prints the lines of `warnings(self) -> list[str]` of `cls` to stderr. Only rank 0 prints.
    """
    try:
        config = load(cls, argv)
    except ConfigError as error:
        if _is_main_process():
            print("\n".join(f"config error: {line}" for line in error.problems), file=sys.stderr)
        raise SystemExit(2) from None
    if _is_main_process():
        for line in getattr(config, "warnings", list)():
            print(f"warning: {line}", file=sys.stderr)
    return config


def to_yaml(config: "DataclassInstance") -> str:
    """Serialize to YAML. `load` returns an equal configuration, with bit-exact floats. PyYAML can read it too."""
    return _dump(dataclasses.asdict(config))


def diff(old: Mapping[str, Any], config: "DataclassInstance") -> dict[str, tuple[Any, Any]]:
    """Return options whose value in `config` differs from `old` (a saved `dataclasses.asdict`): {key: (old, new)}.

    An option that exists only on one side is "absent" on the other.
    """
    new = dataclasses.asdict(config)
    pairs = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in {**new, **old}}
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}


def help_text(cls: "type[DataclassInstance]") -> str:
    """Format the usage, and every option by section: symbol, type, range, unit, default, meaning, source."""
    module = sys.modules["__main__"].__spec__  # None for a program started by its file
    name = f"-m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name
    lines = [f"usage: python {name} [--config NAME.yaml] [--key value ...]"]
    for section, option, symbol, values, default, meaning in _described(cls):
        lines += ["", section] if section else []
        lines.append(f"  --{option}{symbol}  {values}, default {default}")
        lines += textwrap.wrap(meaning, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def option_list(cls: "type[DataclassInstance]") -> str:
    """Format name, default and meaning of every option as Markdown (docs/configs.md)."""
    lines = []
    for section, option, symbol, values, default, meaning in _described(cls):
        lines += ["", f"### {section}", ""] if section else []
        choices = f"; {values.replace(' |', ',')}" if values.startswith("one of") else ""
        text = f"- `{option}: {default}`{symbol}: {meaning}{choices}"
        lines += textwrap.wrap(text, 116, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _described(cls: "type[DataclassInstance]") -> Iterator[tuple[str, ...]]:
    """Yield section (at its first option, else ""), name, symbol, allowed values, default and meaning per option."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        about = f.metadata
        unit, symbol = about["unit"] and f" [{about['unit']}]", about["symbol"] and f" ({about['symbol']})"
        values, meaning = _allowed(hints[f.name], about) + unit, about["help"]
        meaning += about["source"] and f" [{about['source']}]"
        yield about["section"], f.name, symbol, values, _dump(about["default"]), meaning


# ---- reading files and the command line ----


def _read(cls: type[T], argv: Sequence[str], problems: list[str]) -> tuple[dict[str, Any], set[str]]:
    """Return the values of `argv` and its files, and the invalid options. Appends to `problems`."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f.metadata for f in fields(cls)}
    assert not set(known) & set(RESERVED), f"{RESERVED} cannot be options"
    values: dict[str, Any] = {}
    unread: set[str] = set()
    for entries in _sources(argv, problems):
        keys = {option.partition(".")[0] for _, option, _ in entries} - {""}
        values = {key: value for key, value in values.items() if known[key]["belongs_to"] not in keys}
        for where, option, node in entries:
            key, dot, name = option.partition(".")
            if key not in known or (dot and typing.get_origin(hints[key]) is not dict):
                problems.append(f"{where}: {option[:60]}: is not an option; {_nearest(key, known, 'see --help')}")
                continue
            try:
                value = _untyped(node) if dot else _first(node, _members(hints[key]))
                _check_range(value, known[key])
                values[key] = {**values.get(key, {}), name: value} if dot else value
            except ValueError:
                choices = [
                    c for m in _members(hints[key]) if typing.get_origin(m) is Literal for c in typing.get_args(m)
                ]
                fix = _nearest(_text(node).lower(), choices, f"for example {key}: {_dump(known[key]['default'])}")
                problems.append(
                    f"{where}: {key}: must be {_allowed(hints[key], known[key])} (got {_show(node)}); {fix}"
                )
                unread.add(key)
    return values, unread


def _sources(argv: Sequence[str], problems: list[str]) -> Iterator[list[Entry]]:
    """Yield the assignments of each file, then of the command line. Later sources override earlier ones."""
    words, entries = list(argv), []
    while words:
        word = words.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            problems.append(f"command line: {_show(_plain(word))}: is not an option; write --key value")
            continue
        if not equals and words and not words[0].startswith("--"):
            equals, text = "=", words.pop(0)
        try:
            # Only lists, mappings and quoted texts are parsed as YAML, so `--run_name a:b#c` needs no extra quotes.
            is_yaml = text[:1] in ("[", "{", '"', "'") and key != "config"
            value = _compose(text) if is_yaml else _plain(text)
            entries.append(("command line", key, value if equals or key == "config" else BARE))
        except UNREADABLE as error:
            problems.append(f"command line: {key}: is not valid YAML ({_reason(error)}); write a list as '[a, b]'")
    entries = _flatten(entries, problems)
    for name in [node.value for _, key, node in entries if key == "config"]:
        paths = find(name, [CONFIG_DIR, Path()])
        if not paths:
            problems.append(f"command line: config: no such file (got {_show(_plain(name))}); {_nearest_names(name)}")
        yield from _files(paths, (), problems)
    yield [entry for entry in entries if entry[1] != "config"]


def _files(paths: Sequence[Path], chain: tuple[Path, ...], problems: list[str]) -> Iterator[list[Entry]]:
    """Yield the assignments of the files of `find`: one file, or model and method. chain: files that inherit them."""
    for path in paths:
        if path.is_file():
            yield from _file(path, chain, problems)
        else:  # a rule without a file (configs/names.py)
            yield [(label(path), "rule", _plain(path.stem)), (label(path), "dual_clip", _plain("null"))]
    if len(paths) > 1:
        yield [(" + ".join(map(label, paths)), "run_name", _plain("_".join(path.stem for path in paths)))]


def _file(path: Path, chain: tuple[Path, ...], problems: list[str]) -> Iterator[list[Entry]]:
    """Yield the assignments of a file's parents, then its own."""
    name = label(path)
    try:
        root = _compose(path.read_text(encoding="utf-8")) or yaml.MappingNode("", [])
        if not isinstance(root, yaml.MappingNode):
            raise ValueError("not a mapping")
    except UNREADABLE as error:
        problems.append(f"{name}: cannot be read ({_reason(error)}); write lines such as key: value")
        return
    rows = [(f"{name} line {key.start_mark.line + 1}", _text(key), node) for key, node in root.value]
    entries = _flatten(rows, problems)
    for where, _, node in [entry for entry in entries if entry[1] == "inherit"]:
        parents = find(_text(node), [path.parent, CONFIG_DIR], but=path)
        circle = [label(each) for each in parents if each in (*chain, path)]
        if not parents:
            problems.append(f"{where}: inherit: no such file (got {_show(node)}); {_nearest_names(_text(node))}")
        elif circle:
            problems.append(
                f"{where}: inherit: {circle[0]} inherits from this file in turn; remove one of the two lines"
            )
        else:
            yield from _files(parents, (*chain, path), problems)
    yield [entry for entry in entries if entry[1] != "inherit"]


def _flatten(entries: Iterable[Entry], problems: list[str]) -> list[Entry]:
    """Return the assignments of one source, one per entry of a mapping. A repeated option is an error."""
    flat: dict[str, Entry] = {}
    for where, option, node in entries:
        inner = [(where, option, node)]
        if isinstance(node, yaml.MappingNode) and "." not in option:
            inner = [(where, f"{option}.{_text(name)}", item) for name, item in node.value]
        for entry in inner:
            if flat.setdefault(entry[1], entry) is not entry:
                problems.append(f"{where}: {entry[1][:60]}: is set twice (first: {flat[entry[1]][0]}); keep one")
    return list(flat.values())


def _compose(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=yaml.BaseLoader)


def _plain(text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", text)


# ---- conversion of a YAML node to the option's type; all functions raise ValueError ----


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _untyped(node: yaml.Node, levels: int = 1) -> Any:
    """Convert a value without a declared type: null, true, false, a number in Python syntax, else text.

    levels: maximum depth of lists and mappings, since YAML aliases allow unlimited depth.
    """
    if isinstance(node, yaml.SequenceNode) and levels:
        return [_untyped(item, levels - 1) for item in node.value]
    if isinstance(node, yaml.MappingNode) and levels:
        return {_convert(name, str): _untyped(item, levels - 1) for name, item in node.value}
    return _first(node, TEXT_TYPES if getattr(node, "style", None) is None else (str,))


def _first(node: yaml.Node, kinds: Iterable[Any]) -> Any:
    """Convert a value to the first matching type of `kinds`."""
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return _convert(node, kind)
    raise ValueError


def _convert(node: yaml.Node, kind: Any) -> Any:
    origin, text = typing.get_origin(kind), node.value
    if isinstance(node, yaml.SequenceNode) and origin is list:
        return [_convert(item, typing.get_args(kind)[0]) for item in node.value]
    if not isinstance(node, yaml.ScalarNode) or not node.tag.endswith((":str", ":bool") if kind is bool else ":str"):
        raise ValueError
    if (node.style is None and text in NULLS) != (kind is NoneType):
        raise ValueError
    if kind is NoneType:
        return None
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is int and re.fullmatch(r"[-+]?[0-9][0-9_]{0,24}", text) and abs(int(text)) < 2**63:
        return int(text)
    if kind is float and math.isfinite(float(text)):
        return float(text)
    controls = any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in text)
    if (kind is str and not controls) or (origin is Literal and text in typing.get_args(kind)):
        return text
    raise ValueError


def _check_range(value: Any, about: Mapping[str, Any]) -> None:
    limits = [(holds, about[name]) for name, (_, holds) in LIMITS.items() if about[name] is not None]
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not all(holds(number, limit) for holds, limit in limits):
            raise ValueError


# ---- text for messages and help ----


def _allowed(hint: Any, about: Mapping[str, Any]) -> str:
    """Format type and range of an option."""
    words = []
    for member in _members(hint):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        kinds = {Literal: f"one of {' | '.join(map(str, arguments))}", dict: "a mapping {name: value}"}
        if origin is list:
            kinds[list] = f"a list [a, b] of {TYPES[arguments[0]].split()[-1]}s"
        words.append(kinds[origin] if origin else TYPES[member])
    limits = [f"{word} {_dump(about[name])}" for name, (word, _) in LIMITS.items() if about[name] is not None]
    return " or ".join([f"{words[0]} {' and '.join(limits)}".strip(), *words[1:]])


def _nearest(name: str, known: Iterable[str], otherwise: str, most: int = 1) -> str:
    near = difflib.get_close_matches(name[:80], list(known), most, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def _nearest_names(name: str) -> str:
    stem = name.rpartition("/")[2].removesuffix(".yaml")
    return _nearest(stem, config_names(), "`python -m configs` lists the names", 3)


def _show(node: yaml.Node, levels: int = 1) -> str:
    """Format a value as the user wrote it, shortened. Nested lists are hidden: YAML aliases allow unlimited depth."""
    if isinstance(node, yaml.SequenceNode) and levels:
        text = f"[{', '.join(_show(item, 0) for item in node.value[:9])}]"
    else:
        text = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
    return text if len(text) <= 60 else text[:57] + "..."


def _text(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else _show(node)


def _reason(error: Exception) -> str:
    """Return the first line of an error, with the line number if PyYAML has one."""
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or str(error).partition("\n")[0]
    text = "nested too deeply" if isinstance(error, RecursionError) else text
    return f"line {mark.line + 1}: {text}" if mark else text


class _Dumper(yaml.SafeDumper):
    """PyYAML dumper that quotes texts which `_untyped` would parse as another type, such as 1e-6."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "'" if NUMBER.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def _dump(value: Any) -> str:
    """Format a value as YAML: a mapping on several lines, any other value on one line."""
    if isinstance(value, dict) and value:
        return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)
    return yaml.dump([value], Dumper=_Dumper, allow_unicode=True, width=10**9, default_flow_style=True).strip()[1:-1]


def _is_main_process() -> bool:
    """Return True for the process that prints: rank 0, or a process without a valid RANK from a launcher."""
    rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not (rank.isdecimal() and processes.isdecimal() and 0 < int(rank) < int(processes))
