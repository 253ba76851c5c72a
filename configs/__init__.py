"""Strict configuration: a frozen dataclass of `knob`s, set from YAML files and the command line (configs/load.py)."""

from configs.load import ConfigError, diff, help_text, knob, load, load_or_exit, to_yaml

__all__ = ["ConfigError", "diff", "help_text", "knob", "load", "load_or_exit", "to_yaml"]
