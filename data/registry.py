"""Known data sets, and pairs of training and evaluation sets that are known to leak.

To add a set, add an entry to SETS. Its columns must be listed in data/formats.py.
Row counts are those of the published upload. A different count gives a warning, which reveals a changed upload.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class SetSpec:
    """Location of a set on the hub, and its expected size.

    config: configuration name on the hub; None: the only one.
    split: split name; several evaluation sets were uploaded as "train".
    rows: published rows of that split. problems: number after cleaning (data/load.py); None: not published.
    levels: MATH levels to keep; None: all.
    """

    hub_id: str
    split: str
    rows: int
    use: Literal["train", "eval"]
    config: str | None = None
    levels: tuple[int, ...] | None = None
    problems: int | None = None


SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")  # of supported files
SETS: dict[str, SetSpec] = {
    # 17,917 problems uploaded 100 times over: 17,398 distinct prompts, 7 of them with two different golds.
    "dapo_math_17k": SetSpec("BytedTsinghua-SIA/DAPO-Math-17k", "train", 1_791_700, "train", problems=17_391),
    # The same set, deduplicated by others, with one of the two golds. "all" is English and Chinese.
    "dapo_math_17k_processed": SetSpec("open-r1/DAPO-Math-17k-Processed", "train", 17_398, "train", config="all"),
    "dapo_math_17k_processed_en": SetSpec("open-r1/DAPO-Math-17k-Processed", "train", 14_116, "train", config="en"),
    # PRM800K's split: 7,500 train + 4,500 test problems of MATH. Of MATH's test problems, only MATH-500 is disjoint.
    "math_train_l3_5": SetSpec("nlile/hendrycks-MATH-benchmark", "train", 12_000, "train", levels=(3, 4, 5)),
    "gsm8k_train": SetSpec("openai/gsm8k", "train", 7_473, "train", config="main"),
    "aime24": SetSpec("HuggingFaceH4/aime_2024", "train", 30, "eval", problems=30),
    "aime25": SetSpec("yentinglin/aime_2025", "train", 30, "eval", problems=30),
    # A subset of AI-MO/aimo-validation-amc (83 rows, also called "AMC").
    "amc23": SetSpec("math-ai/amc23", "test", 40, "eval", problems=40),
    "math500": SetSpec("HuggingFaceH4/MATH-500", "test", 500, "eval", problems=500),
    "gsm8k_test": SetSpec("openai/gsm8k", "test", 1_319, "eval", config="main", problems=1_319),
    "minerva": SetSpec("math-ai/minervamath", "test", 272, "eval"),
    "olympiadbench": SetSpec("Hothan/OlympiadBench", "train", 674, "eval", config="OE_TO_maths_en_COMP"),
}


# (training set, held-out set, reason): patterns to search in lower-case set names without - _ and spaces.
LEAKS: tuple[tuple[str, str, str], ...] = (
    (
        r"mathtrainl35|hendrycksmathbenchmark|math12k",
        r"mathtest|math5000|hendrycksmath|competitionmath|mathlighteval",
        "the 12,000-row MATH split holds 4,500 of the 5,000 MATH test problems; evaluate on math500 instead",
    ),
    (r"bigmath", r"math500|mathtest|math5000", "Big-Math has more MATH rows than MATH's train split"),
    (r"deepscaler", r"amc|aime(19|20[01]|202[0-3])", "DeepScaleR is built from AIME 1983-2023 and AMC"),
    (r"gsm8k(?!.*train)", r"gsm8k", "a copy of GSM8K with 8,792 rows is train and test merged"),
    (r"aimovalidationamc|aimoamc", r"amc23", "AI-MO's 83 AMC rows contain the 40 of amc23"),
    (r"aimovalidationaime", r"aime24", "AI-MO's AIME validation rows contain AIME 2024"),
)


def split_name(name: str) -> tuple[str, str | None, str | None]:
    """Split "PLACE", "PLACE:SPLIT" or "PLACE:CONFIG:SPLIT" into (place, config, split). PLACE: hub id or path."""
    place, *rest = [name] if Path(name).expanduser().exists() else name.split(":")
    return place, rest[0] if len(rest) > 1 else None, rest[-1] if rest else None


def is_hub_id(place: str) -> bool:
    """Return True for ORG/NAME, unless the path or the folder ORG exists, or it ends with a suffix of SUFFIXES."""
    owner = place.partition("/")[0]
    taken = Path(place).exists() or Path(owner).is_dir() or place.endswith(SUFFIXES)
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place)) and not taken


def set_name(name: str) -> str:
    """Return the name of a set in `Problem.source` and in metrics.

    Examples: "aime24" for "aime24" and "aime24=/data/x.parquet", the name of the file or folder for a path, "name_test"
    for "org/name:test".
    """
    left = name.partition("=")[0]
    path = Path(name)
    return left if left in SETS else (path.stem if path.suffix in SUFFIXES else path.name).replace(":", "_")


def check_names(key: str, sets: Sequence[str]) -> None:
    """Raise ValueError if two sets have the same `set_name`."""
    first: dict[str, str] = {}
    for each in sets:
        name = set_name(each)
        if name in first:
            clash = f"{first[name]} and {each} would both be {name} in logs and metrics"
            raise ValueError(f"{key}: {clash}; remove one or rename its file")
        first[name] = each


def check_leaks(train_sets: str | list[str], eval_sets: str | list[str]) -> list[str]:
    """Return one warning line per known overlap between training and evaluation sets, by name.

    Raises ValueError for a benchmark that is in both, since its score would be meaningless. `shared_problems`
    (data/load.py) compares the loaded texts.
    """
    trains = [train_sets] if isinstance(train_sets, str) else train_sets
    held_outs = [eval_sets] if isinstance(eval_sets, str) else eval_sets
    lines = []
    for train in trains:
        spec = SETS.get(set_name(train))
        if spec and spec.use == "eval":
            if set_name(train) in map(set_name, held_outs):
                raise ValueError(
                    f"train_data: {train!r} is in eval_data too: its score would measure memory. Take it out of one."
                )
            lines.append(f"warning: train_data: {train} is an evaluation set; never report its score for this run")
        for held_out in held_outs:
            plain = [re.sub(r"[-_ ]", "", name.lower()) for name in (train, held_out)]
            lines += [
                f"warning: {train} (train) leaks into {held_out} (eval): {why}"
                for *patterns, why in LEAKS
                if all(map(re.search, patterns, plain))
            ]
    return lines
