"""configs/: every kind of mistake, all at once; what is written back is read back; nothing ends in a traceback."""

import math
import os
import random
import re
import string
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ROOT

from configs import ConfigError, diff, help_text, knob, load, names, schema, to_yaml


@dataclass(frozen=True)
class Config:
    run_name: str = knob("demo", "name of the run", section="Run")
    seed: int = knob(0, "of everything random", low=0)
    dry_run: bool = knob(False, "print and exit")
    eval_data: list[str] = knob(["aime24", "amc23"], "evaluation sets")
    train_data: str | list[str] = knob("math", "training sets")
    reference: str | None = knob(None, "reference model")
    delta: float = knob(0.05, "radius", symbol="δ", unit="nats", source="arXiv 2603.04918", above=0, section="Clipping")
    clip: Literal["fixed", "band", "none"] = knob("band", "rule")
    top_p: float | None = knob(None, "nucleus", above=0, high=1)
    shares: list[float] = knob([0.5], "a share each", low=0, below=1)
    args: dict[str, Any] = knob({}, "parameters of clip", belongs_to="clip")

    def problems(self) -> list[str]:
        return ["clip: none ignores delta; set clip: band"] if self.clip == "none" and self.delta != 0.05 else []


def read(tmp_path: Path, text: str | bytes, *argv: str) -> Config:
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(Config, ["--config", str(path), *argv])


def mistakes(tmp_path: Path, text: str | bytes, *argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *argv)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_defaults_file_and_command_line_override_in_this_order(tmp_path):
    assert load(Config, []) == Config()
    config = read(tmp_path, "delta: 0.1\nseed: 3\n", "--seed", "4", "--dry_run", "--eval_data=[a, b c]")
    assert (config.delta, config.seed, config.dry_run, config.eval_data) == (0.1, 4, True, ["a", "b c"])


def test_a_list_default_is_not_shared():
    Config().eval_data.append("x")
    assert Config().eval_data == ["aime24", "amc23"]


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("delta: 1e-6", "delta", 1e-6),  # text to YAML 1.1
        ("delta: 2", "delta", 2.0),
        ("run_name: no", "run_name", "no"),  # false to YAML 1.1
        ("run_name: 010", "run_name", "010"),  # 8
        ("run_name: 2024-01-02", "run_name", "2024-01-02"),  # a date
        ("run_name: 1:30", "run_name", "1:30"),  # 90
        ("seed: 1_000", "seed", 1000),
        ("seed: 010", "seed", 10),
        ("dry_run: True", "dry_run", True),
        ("reference:", "reference", None),
        ("reference: ~", "reference", None),
        ("reference: 'null'", "reference", "null"),
        ("train_data: [a, b]", "train_data", ["a", "b"]),
        ("train_data: a", "train_data", "a"),
        ("train_data:\n- a\n- 1", "train_data", ["a", "1"]),
        ("top_p: 1", "top_p", 1.0),
        ("shares: [0, 0.25]", "shares", [0.0, 0.25]),
        ("eval_data: []", "eval_data", []),
    ],
)
def test_values_are_read_as_their_keys_type(tmp_path, line, key, value):
    got = getattr(read(tmp_path, line), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("delta: 0", "delta: must be a number above 0 (got '0'); for example delta: 0.05"),
        ("delta: nan", "delta: must be a number above 0 (got 'nan'); for example delta: 0.05"),
        ("delta: .inf", "delta: must be a number above 0 (got '.inf'); for example delta: 0.05"),
        ("delta: inf", "delta: must be a number above 0 (got 'inf'); for example delta: 0.05"),
        ("delta: 1e999", "delta: must be a number above 0 (got '1e999'); for example delta: 0.05"),
        ("delta: true", "delta: must be a number above 0 (got 'true'); for example delta: 0.05"),
        ("delta:", "delta: must be a number above 0 (got ''); for example delta: 0.05"),
        ("delta: [0.1]", "delta: must be a number above 0 (got ['0.1']); for example delta: 0.05"),
        ("delta: {a: 1}", "delta.a: is not an option; did you mean delta?"),
        ("delta: !!float 1", "delta: must be a number above 0 (got '1'); for example delta: 0.05"),
        ("seed: -1", "seed: must be an integer from 0 (got '-1'); for example seed: 0"),
        ("seed: 1.5", "seed: must be an integer from 0 (got '1.5'); for example seed: 0"),
        ("seed: 1e3", "seed: must be an integer from 0 (got '1e3'); for example seed: 0"),
        ("seed: 9223372036854775808",
         "seed: must be an integer from 0 (got '9223372036854775808'); for example seed: 0"),
        ("dry_run: yes", "dry_run: must be true or false (got 'yes'); for example dry_run: false"),
        ("dry_run: 1", "dry_run: must be true or false (got '1'); for example dry_run: false"),
        ("eval_data: aime24",
         "eval_data: must be a list [a, b] of strings (got 'aime24'); for example eval_data: [aime24, amc23]"),
        ("clip: Bnd", "clip: must be one of fixed | band | none (got 'Bnd'); did you mean band?"),
        ("clip: 7", "clip: must be one of fixed | band | none (got '7'); for example clip: band"),
        ("top_p: x", "top_p: must be a number above 0 and at most 1 or null (got 'x'); for example top_p: null"),
        ("top_p: 1.5", "top_p: must be a number above 0 and at most 1 or null (got '1.5'); for example top_p: null"),
        ("shares: [0.5, 1]", "shares: must be a list [a, b] of numbers from 0 and below 1 (got ['0.5', '1']); "
         "for example shares: [0.5]"),
        ("args: 3", "args: must be a mapping {name: value} (got '3'); for example args: {}"),
        ("args: [3]", "args: must be a mapping {name: value} (got ['3']); for example args: {}"),
        ("args: {a: [[1]]}", "args: must be a mapping {name: value} (got [a list or mapping]); for example args: {}"),
        ("args: {a: 1, a: 2}", "args.a: is set twice (first: x.yaml line 2); keep one"),
        ('run_name: "a\\0b"', "run_name: must be a string (got 'a\\x00b'); for example run_name: demo"),
        ("run_name:", "run_name: must be a string (got ''); for example run_name: demo"),
        ("delt: 1", "delt: is not an option; did you mean delta?"),
        ("zzzzzz: 1", "zzzzzz: is not an option; see --help"),
        ("? [a]\n: 1", "['a']: is not an option; see --help"),
        ("inherit: nowhere", "inherit: no such file (got 'nowhere'); `python -m configs` lists the names"),
    ],
)  # fmt: skip
def test_each_mistake_names_place_key_value_allowed_values_and_fix(tmp_path, line, problem):
    assert mistakes(tmp_path, "\n" + line) == [f"x.yaml line 2: {problem}"]


def test_all_mistakes_of_files_command_line_and_keys_against_each_other_come_at_once(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: x\n")
    found = mistakes(
        tmp_path,
        "inherit: base.yaml\nclip: none\ndelta: 0.1\ndleta: 1\ntop_p: 7\ntop_p: 8\n",
        *("--sed", "1", "--seed", "-1", "--seed", "y", "loose", "--eval_data", "[a"),
    )
    assert [line.split(";")[0] for line in found] == [
        "command line: 'loose': is not an option",
        "command line: eval_data: is not valid YAML (line 1: expected ',' or ']', but got '<stream end>')",
        "command line: seed: is set twice (first: command line)",
        "x.yaml line 6: top_p: is set twice (first: x.yaml line 5)",
        "base.yaml line 1: seed: must be an integer from 0 (got 'x')",
        "x.yaml line 4: dleta: is not an option",
        "x.yaml line 5: top_p: must be a number above 0 and at most 1 or null (got '7')",
        "command line: sed: is not an option",
        "command line: seed: must be an integer from 0 (got '-1')",
        "clip: none ignores delta",
    ]


def test_a_check_of_keys_against_each_other_is_silent_about_a_key_that_could_not_be_read(tmp_path):
    assert mistakes(tmp_path, "clip: none\ndelta: 0.1")[0].startswith("clip: none ignores delta")
    assert len(mistakes(tmp_path, "clip: none\ndelta: 0.1\nseed: x")) == 2
    found = mistakes(tmp_path, "clip: none\ndelta: -3")
    assert len(found) == 1 and found[0].startswith("x.yaml line 2: delta: must be ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\n\tb: 2", r"cannot be read (line 2: found character '\t' that cannot start any token)"),
        ("- a\n- b", "cannot be read (not a mapping)"),
        ("just words", "cannot be read (not a mapping)"),
        ("a: 1\n---\nb: 2", "cannot be read (line 2: but found another document)"),
        (b"\xff\xfe\x00", "cannot be read ('utf-8' codec can't decode byte 0xff"),
        ('run_name: "\\UFFFFFFFF"', "cannot be read ("),
        ("[" * 5000, "cannot be read (nested too deeply)"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, problem):
    found = mistakes(tmp_path, text)
    assert len(found) == 1 and found[0].startswith("x.yaml: ") and problem in found[0]


@pytest.mark.parametrize("text", ["", "\n", "# nothing but a comment\n"])
def test_an_empty_file_changes_nothing(tmp_path, text):
    assert read(tmp_path, text) == Config()


def test_a_key_cannot_take_the_name_of_an_option():
    @dataclass(frozen=True)
    class Bad:
        help: str = knob("", "no")

    with pytest.raises(AssertionError, match="cannot be options"):
        load(Bad, [])


def test_aliases_cannot_grow(tmp_path):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
    )
    for use in ("eval_data: *k", "args: {a: *k}", "args: {a: {b: *k}}", "args: &m {a: {b: *m}}", "args: &l [*l]"):
        assert all(len(line) < 200 for line in mistakes(tmp_path, bomb + use))
    assert read(tmp_path, "train_data: &t [a]\neval_data: *t").eval_data == ["a"]


def test_a_file_inherits_through_a_chain_and_from_its_own_folder(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\ndelta: 0.1\nrun_name: a\n")
    (tmp_path / "b.yaml").write_text("seed: 2\ndelta: 0.2\ninherit: a\n")
    config = read(tmp_path, "seed: 3\ninherit: b.yaml\n")
    assert (config.seed, config.delta, config.run_name) == (3, 0.2, "a")


def test_a_circle_of_files_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("inherit: x.yaml\n")
    assert mistakes(tmp_path, "inherit: a.yaml") == [
        "a.yaml line 1: inherit: x.yaml inherits from this file in turn; remove one of the two lines"
    ]
    (line,) = mistakes(tmp_path, "inherit: x.yaml")
    assert line.startswith("x.yaml line 1: inherit: no such file (got 'x.yaml'); ")


def test_a_name_is_looked_up_with_and_without_its_ending(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("seed: 7")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "mine.yaml", "./mine", str(tmp_path / "mine.yaml")):
        assert load(Config, ["--config", name]).seed == 7
    for name in ("nothing", "", ".", "..", "/", "\0", "\ud800", "x" * 5000, str(tmp_path)):
        with pytest.raises(ConfigError, match="config: no such file .*; `python -m configs` lists the names"):
            load(Config, ["--config", name])
    with pytest.raises(ConfigError, match=r"config: no such file \(got ''\)"):
        load(Config, ["--config", "--dry_run"])
    for name in ("qwen3b_bnd", "configs/qwen3b_bnd.yaml"):  # the last near name may change with the methods there are
        with pytest.raises(ConfigError, match="did you mean qwen3b_band or "):
            load(Config, ["--config", name])


def test_a_model_and_a_method_are_a_file_of_configs_by_any_path(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    paths = (
        "qwen3b_band_tv",
        "configs/qwen3b_band_tv.yaml",
        "./configs/qwen3b_band_tv",
        f"{ROOT}/configs/qwen3b_band_tv",
    )
    runs = [load(schema.Config, ["--config", path]) for path in paths]
    assert runs[0].run_name == "qwen3b_band_tv" and runs[0].rule_args["divergence"] == "tv"
    assert all(run == runs[0] for run in runs)
    monkeypatch.chdir(tmp_path)
    assert load(schema.Config, ["--config", "qwen3b_band_tv.yaml"]) == runs[0]
    with pytest.raises(ConfigError, match="config: no such file .* did you mean qwen3b_band_tv "):
        load(schema.Config, ["--config", str(tmp_path / "qwen3b_band_tv.yaml")])


def test_a_file_elsewhere_inherits_a_model_with_a_method(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("inherit: qwen7b_dapo.yaml\nkl_coef: 0.01\n")
    changed = diff(vars(load(schema.Config, ["--config", "qwen7b_dapo"])), load(schema.Config, ["--config", str(mine)]))
    assert changed == {"kl_coef": (0.0, 0.01)}
    mine.write_text("inherit: qwen7b_dappo.yaml\n")
    with pytest.raises(ConfigError, match=r"^mine.yaml line 1: inherit: .* did you mean .*qwen7b_dapo\b"):
        load(schema.Config, ["--config", str(mine)])


def test_a_file_may_replace_the_run_whose_name_it_has(tmp_path):
    """So a value of one model and one method has a place."""
    mine = tmp_path / "qwen3b_band.yaml"
    mine.write_text("inherit: qwen3b_band.yaml\nlr: 2.0e-6\n")
    changed = diff(vars(load(schema.Config, ["--config", "qwen3b_band"])), load(schema.Config, ["--config", str(mine)]))
    assert changed == {"lr": (1e-6, 2e-6)}


def test_a_mistake_in_a_method_names_the_file(tmp_path, monkeypatch):
    for kind in ("models", "methods"):
        (tmp_path / kind).mkdir()
    (tmp_path / "models" / "small.yaml").write_text("inherit: base\nrun_name: small\n")
    (tmp_path / "methods" / "tight.yaml").write_text("delta: -1\n")
    (tmp_path / "base.yaml").write_text("seed: 3\n")
    for module in (names, sys.modules["configs.load"]):
        monkeypatch.setattr(module, "CONFIG_DIR", tmp_path)
    monkeypatch.setattr(names, "RULES", [])
    with pytest.raises(ConfigError, match="^methods/tight.yaml line 1: delta: must be "):
        load(Config, ["--config", "small_tight"])
    (tmp_path / "methods" / "tight.yaml").write_text("delta: 0.01\n")
    assert load(Config, ["--config", "small_tight"]) == Config(run_name="small_tight", seed=3, delta=0.01)
    assert names.config_names() == ["base", "small", "small_tight"]
    (tmp_path / "small_tight.yaml").write_text("inherit: small_tight\nseed: 4\n")
    assert load(Config, ["--config", "small_tight"]) == Config(run_name="small_tight", seed=4, delta=0.01)
    (tmp_path / "models" / "small.yaml").write_text("inherit: small\n")  # itself, which nothing stands behind
    with pytest.raises(ConfigError, match="models/small.yaml inherits from this file in turn"):
        load(Config, ["--config", "small"])


# ---- mappings ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("010", 10),
        ("0.03", 0.03),
        ("1e-6", 1e-6),
        ("true", True),
        ("kl", "kl"),
        ("no", "no"),
        ("nan", "nan"),
        ("null", None),
        ("~", None),
        ("'3'", "3"),
        ('"null"', "null"),
        ("[1, 2.5, a, '4']", [1, 2.5, "a", "4"]),
        ("[]", []),
        ("{level: 3, mode: null}", {"level": 3, "mode": None}),
    ],
)
def test_an_entry_of_a_mapping_has_the_type_that_its_text_says(tmp_path, text, value):
    for config in (
        read(tmp_path, f"args: {{a: {text}}}"),
        read(tmp_path, f"args:\n  a: {text}\n"),
        read(tmp_path, f"args.a: {text}\n"),
        load(Config, ["--args", f"{{a: {text}}}"]),
        load(Config, ["--args.a", text]),
        load(Config, [f"--args.a={text}"]),
    ):
        assert config.args == {"a": value} and type(config.args["a"]) is type(value)
        assert read(tmp_path, to_yaml(config)) == config


def test_a_mapping_is_merged_entry_by_entry(tmp_path):
    (tmp_path / "base.yaml").write_text("args: {a: 1, b: 2, c: 3}\n")
    config = read(tmp_path, "inherit: base.yaml\nargs: {b: 20}\n", "--args.c", "300", "--args.d", "x")
    assert config.args == {"a": 1, "b": 20, "c": 300, "d": "x"}
    assert Config().args == {}  # the default is not shared


@pytest.mark.parametrize("own", ["args: {b: 2}\nclip: none", "clip: none\nargs: {b: 2}", "clip: band\nargs: {b: 2}"])
def test_setting_the_owner_of_a_mapping_resets_inherited_entries_alone(tmp_path, own: str):
    (tmp_path / "base.yaml").write_text("clip: fixed\nargs: {a: 1}\n")
    assert read(tmp_path, f"inherit: base.yaml\n{own}").args == {"b": 2}
    assert read(tmp_path, "inherit: base.yaml\nargs: {b: 2}").args == {"a": 1, "b": 2}
    for argv in (["--clip", "none", "--args.c", "3"], ["--args.c", "3", "--clip", "none"]):
        assert read(tmp_path, f"inherit: base.yaml\n{own}", *argv).args == {"c": 3}


def test_an_entry_of_what_is_not_a_mapping_is_refused():
    with pytest.raises(ConfigError) as caught:
        load(Config, ["--foo.bar", "1", "--delta.x", "1", "--args.", "1", "--args.a", "[[1]]"])
    assert caught.value.problems == [
        "command line: foo.bar: is not an option; see --help",
        "command line: delta.x: is not an option; did you mean delta?",
        "command line: args: must be a mapping {name: value} (got [a list or mapping]); for example args: {}",
    ]


def test_a_change_of_a_mapping_is_named_whole(tmp_path):
    old = yaml.safe_load(to_yaml(read(tmp_path, "args: {a: 1, b: x}")))
    assert diff(old, read(tmp_path, "args: {b: x, a: 1}")) == {}
    assert diff(old, read(tmp_path, "args: {a: 1.0, b: x}")) == {}  # equal numbers
    assert diff(old, read(tmp_path, "args: {a: 1}")) == {"args": ({"a": 1, "b": "x"}, {"a": 1})}
    del old["args"]
    assert diff(old, Config()) == {"args": ("absent", {})}


# ---- the command line, writing, help ----


def test_command_line_texts_need_no_yaml_quoting():
    assert load(Config, ["--run_name", "a: b #c"]).run_name == "a: b #c"
    assert load(Config, ["--run_name=-x=y"]).run_name == "-x=y"
    assert load(Config, ["--reference", "null"]).reference is None
    assert load(Config, ["--reference", '"null"']).reference == "null"
    assert load(Config, ["--seed", "1", "--dry_run"]).dry_run is True


def test_an_option_without_its_value_is_refused_unless_it_is_a_bool():
    with pytest.raises(ConfigError, match=r"run_name: must be a string \(got 'true'\)"):
        load(Config, ["--run_name", "--seed", "1"])
    assert load(Config, ["--args.eager", "--seed", "1"]).args == {"eager": True}


def test_what_is_written_is_read_back_and_changes_are_named(tmp_path):
    config = read(tmp_path, "delta: 0.30000000000000004\ntop_p: 1e-7\nreference: 'null'\nrun_name: 'yes'")
    assert read(tmp_path, to_yaml(config)) == config
    assert "\ndelta: 0.30000000000000004\nclip: band\n" in to_yaml(config)  # a key a line
    plain = yaml.safe_load(to_yaml(config))
    assert plain == {f.name: getattr(config, f.name) for f in fields(config)}
    old = {**plain, "delta": 0.3, "gone": 1}
    del old["seed"]
    assert diff(plain, config) == {}
    assert diff(old, config) == {
        "delta": (0.3, 0.30000000000000004),
        "seed": ("absent", 0),
        "gone": (1, "absent"),
    }


texts = st.text(
    st.characters(exclude_categories=["Cc", "Cs"], include_characters="\n\t"), max_size=30
) | st.sampled_from(
    [
        "null",
        "~",
        "",
        "yes",
        "1e-6",
        "0E0",
        "+1_0.e+5",
        "010",
        "- a",
        "a: b",
        "#",
        "*x",
        "!t",
        " x ",
        "[a]",
        "'",
        '"',
        "\u2028",
        "\ufeff",
    ]
)
numbers = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
entries = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | numbers | texts
mappings = st.dictionaries(texts, entries | st.lists(entries, max_size=3), max_size=4)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(texts, st.lists(texts, max_size=3), st.none() | texts, numbers, st.integers(0, 2**63 - 1), mappings)
def test_any_configuration_survives_writing_and_reading(tmp_path_factory, name, sets, reference, delta, seed, args):
    config = Config(name, seed, False, sets, sets, reference, delta, args=args)
    back = read(tmp_path_factory.mktemp("round"), to_yaml(config))
    assert back == config and back.delta.hex() == config.delta.hex() and repr(back.args) == repr(config.args)


def test_help_has_every_key_with_what_is_known_about_it(capsys):
    text = help_text(Config)
    assert all(f"--{f.name}" in text for f in fields(Config))
    assert "--args  a mapping {name: value}, default {}\n      parameters of clip" in text
    assert text.index("\nRun\n") < text.index("--run_name") < text.index("\nClipping\n") < text.index("--delta")
    assert "--delta (δ)  a number above 0 [nats], default 0.05\n      radius [arXiv 2603.04918]" in text
    with pytest.raises(SystemExit) as caught:
        load(Config, ["--nonsense", "--help"])
    assert caught.value.code == 0 and capsys.readouterr().out == text + "\n"


def run_python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=env, check=False)


def test_help_names_the_program():
    done = run_python("-m", "rewards.check", "--help", cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m rewards.check [")


def test_help_of_a_configuration_names_the_program(tmp_path):
    script = "import sys\nfrom configs import load_or_exit, schema\nload_or_exit(schema.Config, sys.argv[1:])\n"
    (tmp_path / "mine.py").write_text(script)
    for start, name in ((["mine.py"], "mine.py"), (["-m", "mine"], "-m mine")):
        done = run_python(*start, "--help", cwd=tmp_path)
        assert done.returncode == 0
        assert done.stdout.startswith(f"usage: python {name} [--config NAME.yaml] [--key value ...]\n"), done.stderr


def test_the_configuration_is_read_without_the_libraries_that_take_seconds():
    script = "import sys, configs.__main__; print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    assert run_python("-c", script, cwd=ROOT).stdout == "[]\n"


def test_a_script_ends_with_code_2_and_one_line_a_mistake(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys\nfrom configs import load_or_exit, schema\nprint(load_or_exit(schema.Config, sys.argv[1:]).seed)\n"
    )
    done = run_python("script.py", "--seed", "x", "--rul", "band", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "config error: command line: seed: must be an integer from 0 and at most 4294967295 (got 'x'); "
        "for example seed: 0",
        "config error: command line: rul: is not an option; did you mean rule?",
    ]
    second = run_python("script.py", "--seed", "x", cwd=tmp_path, RANK="1", WORLD_SIZE="8")
    assert (second.returncode, second.stderr) == (2, "")  # eight ranks, one message
    done = run_python("script.py", "--seed", "13", "--engine", "hf", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "13\n")
    assert re.fullmatch("warning: engine: hf .*\n", done.stderr)


BASE = """\
run_name: demo
seed: 1
dry_run: false
eval_data: [aime24, amc23]
train_data: math
reference: Qwen/Qwen2.5-3B
delta: 0.05
clip: band
top_p: 0.9
shares: [0.5, 0.25]
"""
TOKENS = [
    ": ",
    "- ",
    "\t",
    "'",
    '"',
    "&a ",
    "*a",
    "!!python/object:os.system ",
    "<<: ",
    "---\n",
    "%YAML 9.9\n",
    "{",
    "]",
]
TOKENS += [
    "nan",
    "-.inf",
    "null",
    "yes",
    "0x1F",
    "1" * 400,
    "\u2028",
    "\0",
    "|\n",
    "? ",
    "#",
    "inherit: x\n",
    "'\ud800'",
]
VALUES = [*TOKENS, "1e-6", "0.5", "7", "band", "true", "text", "[a, b]", "[0.1]"]


def mutate(text: str, rng: random.Random) -> bytes:
    """One or two random edits of a valid file: of characters, tokens, lines, or bytes."""
    for _ in range(rng.choice([1, 1, 2])):
        at, end = sorted(rng.choices(range(len(text) + 1), k=2))
        lines = text.splitlines(keepends=True)
        match rng.randrange(6):
            case 0:
                text = text[:at] + text[at + rng.randint(1, 9) :]
            case 1:
                text = text[:at] + rng.choice(TOKENS) + text[at:]
            case 2:
                text = text[:at] + "".join(rng.choices(string.printable, k=3)) + text[at:]
            case 3:
                text = "".join(rng.sample(lines, len(lines)))
            case 4:
                text = text + text[at:end]
            case _ if lines:
                at = rng.randrange(len(lines))
                lines[at] = f"{lines[at].split(':')[0]}: {rng.choice(VALUES)}\n"
                text = "".join(lines)
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.05 and raw:
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def test_mutated_files_end_in_a_valid_configuration_or_in_clean_lines(tmp_path):
    rng = random.Random(7)
    assert read(tmp_path, BASE).shares == [0.5, 0.25]
    valid = 0
    for _ in range(800):
        text = mutate(BASE, rng)
        try:
            config = read(tmp_path, text)
        except ConfigError as error:
            assert error.problems, text
            for line in error.problems:
                assert len(line) < 600 and "\n" not in line, (text, line)
            continue
        valid += 1
        assert 0 < config.delta < math.inf and type(config.seed) is int and config.seed >= 0, text
        assert config.clip in ("fixed", "band", "none") and type(config.dry_run) is bool, text
        assert all(type(name) is str for name in config.eval_data), text
        assert read(tmp_path, to_yaml(config)) == config, text
    assert 50 < valid < 750  # both ends were reached


def test_mutated_command_lines_end_in_a_valid_configuration_or_in_clean_lines():
    rng = random.Random(8)
    pieces = [*(f"--{f.name}" for f in fields(Config)), "--", "-", "=", "--=", "--config", "[", "[a,b]", "1e-6", "null"]
    pieces += ["'", '"', "{}", "--seed=[1", "\ud800", "\0", "x", "--seed", "--delta=--", "", "[[[", '"\\UFFFFFFFF"']
    for _ in range(500):
        try:
            load(Config, rng.choices(pieces, k=rng.randint(1, 6)))
        except ConfigError as error:
            assert error.problems
