"""Reads YAML files and command-line overrides into a frozen dataclass; finds every mistake before anything is loaded.

    @dataclass(frozen=True)
    class Config:
        lr: float = knob(1e-6, "learning rate", symbol="η", source="arXiv 2603.04918 §4", above=0, section="Optimizer")

    config = load_or_exit(Config, sys.argv[1:])   # train.py --config NAME.yaml --lr 2e-6

- A bare NAME is looked up in this folder, then in the current one; a path works too; `.yaml` may be left out.
- MODEL_METHOD.yaml is models/MODEL.yaml, then methods/METHOD.yaml, under that run_name (configs/names.py).
- `inherit: NAME.yaml` in a file takes over that configuration first (looked up beside the file, then in this folder).
- A value is read as its key's type says, never as YAML guesses: `lr: 1e-6` is the number it plainly is, `run_name: no`
  and `run_name: 010` are texts, `yes` is not a bool. Empty, `~` or `null` is None where None is allowed.
- All mistakes come at once, one line each (`where: key: value is not ALLOWED; FIX`), as ConfigError or exit code 2.

Left out on purpose: nesting, interpolation, environment variables, more than one parent.
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
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from configs.names import CONFIG_DIR, config_names, find, label

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

MAX_FILE_BYTES = 1 << 20  # a config is a few lines; more is a wrong file or an attack
UNREADABLE = (yaml.YAMLError, ValueError, OverflowError, RecursionError)  # what PyYAML raises on bad input
RESERVED = ("config", "help", "inherit")


class ConfigError(ValueError):
    """All mistakes of one configuration; `.problems` holds one line for each."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


LIMITS = {  # what a knob may limit a number by: the word for it, and what a value must be to it
    "low": ("from", operator.ge),
    "above": ("above", operator.gt),
    "high": ("up to", operator.le),
    "below": ("below", operator.lt),
}


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
    """A dataclass field; its annotation is the type: int, float, bool, str, Literal of texts, list of these, X | None,
    or dict[str, Any], whose values have the types that YAML gives them.

    `low` and `high` are allowed values themselves, `above` and `below` are not. `section` starts a heading of --help;
    the fields after it belong there until the next one. A mapping is merged entry by entry, `--key.name value` sets one
    entry; where the key that it `belongs_to` is set, the entries of less specific files are dropped.
    """
    metadata = locals()  # all of the above by name
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def load(cls: type[T], argv: Sequence[str]) -> T:
    """The configuration that `argv` (without the program's name) describes.

    `--config FILE`, then `--key value` or `--key=value` for any key; a bare `--key` of a bool means true.
    Lists are written `[a, b]`. `--help` prints every key and raises SystemExit(0).
    A method `problems(self) -> list[str]` of `cls` checks keys against each other; its lines join the others.
    Raises ConfigError with every mistake of the files, the command line and `problems`.
    """
    if "--help" in argv or "-h" in argv:
        if _is_main_process():
            print(help_text(cls))
        raise SystemExit(0)
    config, problems, bad_keys = read(cls, argv)
    # Cross-key checks run on the defaults in place of what could not be read; lines about those keys would mislead.
    for line in getattr(config, "problems", list)():
        if not any(re.search(rf"\b{re.escape(key)}\b", line) for key in bad_keys):
            problems.append(line)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def read(cls: type[T], argv: Sequence[str]) -> tuple[T, list[str], set[str]]:
    """As `load`, without the checks of keys against each other: the configuration, the mistakes so far, one line each,
    and the keys that could not be read, which have their defaults."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    assert not set(known) & set(RESERVED), f"{RESERVED} cannot be keys"
    problems: list[str] = []
    values: dict[str, Any] = {}
    bad_keys: set[str] = set()
    origin: dict[tuple[str, str], str] = {}  # (key, name) of a mapping's entry -> the file, or the command line
    for where, path, node in _entries(argv, problems):
        key, dot, name = path.partition(".")
        source = where.partition(" line ")[0]
        if key not in known or (dot and not _is_mapping(hints[key])):
            problems.append(f"{where}: {_show(path)} is not a key; {_nearest(key, known, '--help lists all keys')}")
            continue
        about = known[key].metadata
        try:
            value = _in_range({name: _untyped(node)} if dot else _convert(node, hints[key]), about)
        except _Wrong as wrong:
            bad_keys.add(key)
            fix = str(wrong) or f"for example {key}: {_dump(_default(known[key]))}"
            problems.append(f"{where}: {key}: {_show(node)} is not {_allowed(hints[key], about)}; {fix}")
            continue
        if isinstance(value, dict):
            origin |= {(key, name): source for name in value}
            value = {**values.get(key, {}), **value}
        values[key] = value
        for f in fields(cls):  # entries of the files that this one builds on were meant for another value of `key`
            if f.metadata["belongs_to"] == key and f.name in values:
                own = {name: v for name, v in values[f.name].items() if origin[f.name, name] == source}
                values[f.name] = own
    return cls(**values), problems, bad_keys


def load_or_exit(cls: type[T], argv: Sequence[str]) -> T:
    """`load` for scripts: mistakes go to stderr, one line each, and the process exits with code 2, without a traceback.

    The lines of `warnings(self) -> list[str]` of `cls` go to stderr too. Of several ranks only the first one prints.
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
    """YAML text that `load` reads back to an equal configuration, floats to the last bit; plain PyYAML reads it too."""
    return _dump(dataclasses.asdict(config))


def diff(old: Mapping[str, Any], config: "DataclassInstance") -> dict[str, tuple[Any, Any]]:
    """Keys whose value in `config` differs from `old` (a saved `dataclasses.asdict`): {key: (old, new)}.

    A key that only one side has shows as "absent" on the other.
    """
    new = dataclasses.asdict(config)
    pairs = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in {**new, **old}}
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}


def help_text(cls: "type[DataclassInstance]") -> str:
    """The program's usage, then every key by section: type, default, range, unit, symbol, what it is, source."""
    hints = typing.get_type_hints(cls)
    module = sys.modules["__main__"].__spec__  # None for a program that was started by its file
    name = f"-m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name
    lines = [f"usage: python {name} [--config NAME.yaml] [--key value ...]", ""]
    for f in fields(cls):
        about = f.metadata
        if about["section"]:
            lines += ["", about["section"]]
        unit = f" [{about['unit']}]" if about["unit"] else ""
        symbol = f" ({about['symbol']})" if about["symbol"] else ""
        default = _dump(_default(f))
        lines.append(f"  --{f.name}{symbol}  {_allowed(hints[f.name], about)}{unit}, default {default}")
        text = about["help"] + (f" [{about['source']}]" if about["source"] else "")
        lines += textwrap.wrap(text, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


# ---- reading: (where, key, YAML node) of every assignment, parents first, the command line last ----

Entry = tuple[str, str, yaml.Node]


def _entries(argv: Sequence[str], problems: list[str]) -> Iterator[Entry]:
    """Yields the assignments in the order in which they override one another; appends to `problems`."""
    config, overrides = None, []
    seen: set[str] = set()
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            problems.append(f"command line: {_show(word)} is not a key; write --key value, or --config {word}")
            continue
        key, equals, text = word[2:].partition("=")
        if not equals:
            bare = not words or words[0].startswith("--")
            text = words.pop(0) if not bare else "" if key == "config" else "true"
        if key in seen:
            problems.append(f"command line: {_show(key)} is given twice; keep one")
            continue
        seen.add(key)
        if key == "config":
            config = text
            continue
        try:
            # Only lists and quoted texts are YAML here: `--run_name a:b#c` needs no quoting beyond the shell's.
            node = yaml.compose(text, Loader=yaml.BaseLoader) if text[:1] in ("[", "{", '"', "'") else _plain(text)
        except UNREADABLE as error:
            problems.append(
                f"command line: {key}: {_show(text)} is not readable ({_syntax(error)}); write a list as '[a, b]'"
            )
            continue
        overrides.append(("command line", key, node))
    if config is not None:
        paths = find(config, [CONFIG_DIR, Path()])
        if not paths:
            problems.append(f"command line: config: {_show(config)} is not a file; {_nearest_names(config)}")
        yield from _entries_of(paths, (), problems)
    yield from overrides


def _entries_of(paths: Sequence[Path], chain: tuple[Path, ...], problems: list[str]) -> Iterator[Entry]:
    """The assignments of what `find` found: a file, or a model and a method, which together make a run's name."""
    for path in paths:
        if path.is_file():
            yield from _file_entries(path, chain, problems)
        else:  # a rule
            yield label(path), "rule", _plain(path.stem)
            yield label(path), "dual_clip", _plain("null")
    if len(paths) > 1:
        yield " + ".join(map(label, paths)), "run_name", _plain("_".join(path.stem for path in paths))


def _file_entries(path: Path, chain: tuple[Path, ...], problems: list[str]) -> Iterator[Entry]:
    """The assignments of a file after those of the files it inherits from; `chain`: those that led here."""
    name, chain = label(path), (*chain, path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise OSError(f"larger than {MAX_FILE_BYTES} bytes")
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        problems.append(f"{name}: cannot be read ({error.strerror or error}); check the path")
        return
    except UNREADABLE as error:
        problems.append(f"{name}: is not valid YAML ({_syntax(error)}); write lines such as key: value")
        return
    if root is None:
        return  # an empty file changes nothing
    if not isinstance(root, yaml.MappingNode):
        problems.append(f"{name}: is not a list of keys; write lines such as key: value")
        return
    own: list[Entry] = []
    seen: dict[str, str] = {}
    for key_node, node in root.value:
        where = f"{name} line {key_node.start_mark.line + 1}"
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else _show(key_node)
        if key in seen:
            problems.append(f"{where}: {_show(key)} is already set in {seen[key]}; keep one")
            continue
        seen[key] = where
        if key != "inherit":
            own.append((where, key, node))
            continue
        parent = node.value if isinstance(node, yaml.ScalarNode) else ""
        paths = find(parent, [path.parent, CONFIG_DIR], but=path)
        circle = [label(each) for each in paths if each in chain]
        if not paths:
            problems.append(
                f"{where}: inherit: {_show(node)} is no file beside this one or in configs/; {_nearest_names(parent)}"
            )
        elif circle:
            fix = "remove one of the two lines"
            problems.append(f"{where}: inherit: {circle[0]} inherits from this file in turn; {fix}")
        else:
            yield from _entries_of(paths, chain, problems)
    yield from own


def _syntax(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or str(error).splitlines()[0]
    text = "a tab; use spaces" if r"'\t'" in text else text
    return f"line {mark.line + 1}: {text}" if mark else text


# ---- one value: from a YAML node to the type that the key declares ----


class _Wrong(Exception):
    """A value that its key does not allow; the text is the fix, empty where an example says enough."""


def _plain(text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", text)


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) is dict


def _untyped(node: yaml.Node) -> Any:
    """A value whose type no key declares: null, true, false, a number as Python reads it, else text; or a list."""
    if isinstance(node, yaml.SequenceNode):
        return [_untyped(item) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise _Wrong("write one value or a list")
    for hint in (type(None), bool, int, float) if node.style is None else ():
        with contextlib.suppress(_Wrong):
            return _convert(node, hint)
    return _scalar(node.value, str)


def _convert(node: yaml.Node, hint: Any) -> Any:
    members = _members(hint)
    if _is_mapping(hint):
        if not isinstance(node, yaml.MappingNode):
            raise _Wrong("write {name: value}")
        return {_convert(name, str): _untyped(item) for name, item in node.value}
    if isinstance(node, yaml.SequenceNode):
        for member in members:
            if typing.get_origin(member) is list:
                return [_convert(item, typing.get_args(member)[0]) for item in node.value]
        raise _Wrong("one value is wanted, not a list")
    if not isinstance(node, yaml.ScalarNode) or not node.tag.endswith(":str"):
        raise _Wrong("")
    is_plain = node.style is None
    if is_plain and node.value in ("", "~", "null", "Null", "NULL"):
        if type(None) in members:
            return None
        raise _Wrong("")
    fixes = []
    for member in members:
        try:
            return _scalar(node.value, member)
        except _Wrong as wrong:
            fixes.append(str(wrong))
    raise _Wrong(next((fix for fix in fixes if fix), ""))


def _scalar(text: str, hint: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if text in choices:
            return text
        raise _Wrong(_nearest(text.lower(), choices, ""))
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        yaml_1_1 = {"yes": "write true", "on": "write true", "no": "write false", "off": "write false"}
        raise _Wrong(yaml_1_1.get(text.lower(), ""))
    if hint in (int, float):
        try:
            number = float(text)
        except ValueError:
            raise _Wrong("") from None
        if hint is float and math.isfinite(number):
            return number
        if hint is int and re.fullmatch(r"[-+]?[0-9][0-9_]{0,24}", text) and abs(int(text)) < 2**63:
            return int(text)
        raise _Wrong(f"write {int(number)}" if abs(number) < 2**53 and number == int(number) else "")
    if hint is str:
        if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in text):
            raise _Wrong("remove the control characters")
        return text
    if typing.get_origin(hint) is list:
        raise _Wrong(f"write [{text}]")
    raise _Wrong("")  # NoneType: null was dealt with before


def _in_range(value: Any, about: Mapping[str, Any]) -> Any:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            if not all(holds(number, about[name]) for name, (_, holds) in LIMITS.items() if about[name] is not None):
                raise _Wrong("")
    return value


# ---- words ----


def _allowed(hint: Any, about: Mapping[str, Any]) -> str:
    """The type and range of a key in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    words = []
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            words.append("one of " + " | ".join(typing.get_args(member)))
        elif typing.get_origin(member) is list:
            words.append(f"a list [a, b] of {names[typing.get_args(member)[0]].removeprefix('a ')}s")
        elif typing.get_origin(member) is dict:
            words.append("a mapping {name: value}")
        else:
            words.append(names[member])
    limits = [f"{word} {_dump(about[name])}" for name, (word, _) in LIMITS.items() if about[name] is not None]
    words[0] += " " + " and ".join(limits)
    return " or ".join(word.strip() for word in words)


def _nearest(name: str, known: Iterable[str], otherwise: str, most: int = 1) -> str:
    near = difflib.get_close_matches(name[:80], list(known), most, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def _nearest_names(name: str) -> str:
    stem = name.rpartition("/")[2].removesuffix(".yaml")
    return _nearest(stem, config_names(), f"`python -m configs --list` shows {CONFIG_DIR.name}/", 3)


def _show(value: "str | yaml.Node") -> str:
    """A value as the user wrote it, shortened. Only one level of a list: aliases make deep ones endless."""
    if isinstance(value, yaml.MappingNode):
        return "a mapping"
    if isinstance(value, yaml.SequenceNode):
        items = ["[...]" if isinstance(item, yaml.SequenceNode) else _show(item) for item in value.value[:9]]
        text = f"[{', '.join(items)}]"
    else:
        text = repr(value.value if isinstance(value, yaml.Node) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default is not dataclasses.MISSING else typing.cast(Any, f.default_factory)()


def _dump(value: Any) -> str:
    """A mapping as lines, anything else as one word or one line."""
    if isinstance(value, dict) and value:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**9)
    line = yaml.safe_dump([value], allow_unicode=True, width=10**9, default_flow_style=True)
    return line.strip()[1:-1]


def _is_main_process() -> bool:
    """Whether this process prints: the first of a launch, and any whose RANK no launch gives."""
    rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not (rank.isdecimal() and processes.isdecimal() and 0 < int(rank) < int(processes))
