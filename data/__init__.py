"""Problems, prompts and their order, for train.py and eval/. Imports neither torch nor other packages of this project.

registry.py: known sets and leaks. formats.py: columns and gold cleaning. tables.py: files and the hub. load.py:
filtering and counts. prompts.py: templates and stop ids. order.py: shuffling. toy.py: synthetic task. arithmetic.py:
generated problems in English. smollm2.py: pretrained model of the demo.
"""

from data.load import LoadReport, load_problems, shared_problems
from data.order import epoch_length, epoch_order, next_problems
from data.problem import Problem
from data.prompts import TEMPLATES, PromptBuilder, asks_answer_line, build_prompts, stop_token_ids, vocabulary_size
from data.registry import SETS, check_leaks, check_names, set_name
from data.tables import HubUnreachable

__all__ = [
    "SETS",
    "TEMPLATES",
    "HubUnreachable",
    "LoadReport",
    "Problem",
    "PromptBuilder",
    "asks_answer_line",
    "build_prompts",
    "check_leaks",
    "check_names",
    "epoch_length",
    "epoch_order",
    "load_problems",
    "next_problems",
    "set_name",
    "shared_problems",
    "stop_token_ids",
    "vocabulary_size",
]
