"""Loading: every published layout with its dirt, in small files written here; counts; errors that name the fix."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from data.formats import DAPO_PREFIX, DAPO_SUFFIX, boxed_answer, clean_gold, strip_wrapper


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def golds(report: data.LoadReport) -> dict[str, str]:
    return {problem.problem: problem.gold for problem in report.problems}


def dapo_row(problem: str, gold: str | None, index: str, space: str = "") -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"{DAPO_PREFIX}{space}{problem}{space}{DAPO_SUFFIX}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": gold, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def plain_rows(n: int) -> list[dict[str, Any]]:
    return [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(n)]


GSM8K_CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: main/train-*}, {split: test, path: main/test-*}]
- config_name: socratic
  data_files: [{split: train, path: socratic/train-*}]
---
"""


# --- the published layouts -------------------------------------------------------------------------------------------


def test_dapo_is_deduplicated_unwrapped_and_freed_of_conflicts(tmp_path: Path) -> None:
    rows = [
        dapo_row("Solve $x+1=35$.", "34", "a"),  # begins with letters of the wrapper: lstrip would eat them
        dapo_row("Twice?", "7", "b"),
        dapo_row("求 $1+1$ 的值。", "2", "c"),
        dapo_row("Nothing given.", "", "d"),
        dapo_row("Null given.", None, "e"),
        dapo_row("", "5", "f"),
        dapo_row("Negative.", "-07", "g", space=" "),
    ] * 3 + [dapo_row("Twice?", "8", "b2"), dapo_row("Solve $x+1=35$.", "034", "a2")]
    report = data.load_problems(str(write_parquet(tmp_path / "dapo.parquet", rows)))
    assert golds(report) == {"Solve $x+1=35$.": "34", "求 $1+1$ 的值。": "2", "Negative.": "-7"}
    assert report.dropped == {"empty gold": 6, "empty problem": 3, "conflicting gold": 4, "duplicate": 7}
    assert report.problems[0] == data.Problem("dapo/a", "Solve $x+1=35$.", "34", "dapo", None)
    assert "23 rows -> 3 problems" in report.lines[0] and "4 conflicting gold" in report.lines[0]


def test_dapo_processed_with_and_without_the_wrapper(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Solve it.", "solution": "12", "reward_model": {"ground_truth": "12"}, "source_prompt": []},
        {
            "prompt": f"{DAPO_PREFIX}Wrapped.{DAPO_SUFFIX}",
            "solution": "1,234",
            "reward_model": None,
            "source_prompt": [],
        },
    ]
    report = data.load_problems(str(write_parquet(tmp_path / "p.parquet", rows)))
    assert golds(report) == {"Solve it.": "12", "Wrapped.": "1234"}


def test_a_changed_wrapper_is_reported(tmp_path: Path) -> None:
    row = dapo_row("Find $n$.", "3", "a")
    row["prompt"][0]["content"] = "Please. " + row["prompt"][0]["content"]
    report = data.load_problems(str(write_parquet(tmp_path / "p.parquet", [row])))
    assert any("1 problems ask for an answer format themselves" in line for line in report.lines)


def test_math_keeps_levels_three_to_five_and_counts_the_rest(tmp_path: Path) -> None:
    rows = [
        {"problem": "L3", "solution": "", "answer": r"\frac{1}{2}", "level": 3, "unique_id": "train/algebra/1.json"},
        {"problem": "L5", "solution": "", "answer": "$7$", "level": 5, "unique_id": "train/algebra/2.json"},
        {"problem": "L2", "solution": "", "answer": "1", "level": 2, "unique_id": "train/algebra/3.json"},
        {"problem": "unlevelled", "solution": "", "answer": "1", "level": None, "unique_id": "train/algebra/4.json"},
        {"problem": "L4 empty", "solution": "", "answer": "", "level": 4, "unique_id": "train/number_theory/7115.json"},
    ]
    path = write_parquet(tmp_path / "math.parquet", rows)
    report = data.load_problems(f"math_train_l3_5={path}")
    assert [(p.id, p.gold, p.level) for p in report.problems] == [
        ("math_train_l3_5/train/algebra/1.json", r"\frac{1}{2}", 3),
        ("math_train_l3_5/train/algebra/2.json", "7", 5),
    ]
    assert report.dropped == {"outside levels 3-5": 2, "empty gold": 1}
    assert len(data.load_problems(str(path)).problems) == 4  # a plain path keeps every level


def test_math_with_the_gold_in_the_solution(tmp_path: Path) -> None:
    rows = [
        {
            "problem": "a",
            "level": "Level 4",
            "type": "Algebra",
            "solution": r"first \boxed{1}, so \boxed{\frac{1}{2}}.",
        },
        {"problem": "b", "level": "Level ?", "type": "Algebra", "solution": r"thus \boxed 2."},
        {"problem": "c", "level": "Level 1", "type": "Algebra", "solution": "no box"},
    ]
    path = str(write_parquet(tmp_path / "hendrycks.parquet", rows))
    report = data.load_problems(path)
    assert [(p.problem, p.gold, p.level) for p in report.problems] == [("a", r"\frac{1}{2}", 4), ("b", "2", None)]
    assert report.dropped == {"empty gold": 1}
    assert golds(data.load_problems(path, answer_column="solution"))["c"] == "no box"  # the user's word for it


def test_gsm8k_takes_the_number_after_the_last_hashes(tmp_path: Path) -> None:
    rows = [
        {"question": "Apples?", "answer": "He has <<2*9=18>>18.\n#### 18"},
        {"question": "Money?", "answer": "Much.\n#### 1,234,567"},
        {"question": "Debt?", "answer": "#### not yet\n#### -5"},
    ]
    report = data.load_problems(str(write_parquet(tmp_path / "gsm.parquet", rows)))
    assert golds(report) == {"Apples?": "18", "Money?": "1234567", "Debt?": "-5"}


def test_aime_golds_lose_their_zeros_and_keep_their_ids(tmp_path: Path) -> None:
    rows = [{"id": 60 + i, "problem": f"P{i}", "solution": "", "answer": f"{i:03d}", "url": ""} for i in (0, 25, 204)]
    report = data.load_problems(f"aime24={write_parquet(tmp_path / 'x.parquet', rows)}")
    assert [(p.id, p.gold) for p in report.problems] == [("aime24/60", "0"), ("aime24/85", "25"), ("aime24/264", "204")]
    assert report.lines[1:] == [
        "warning: aime24: 3 rows, not the 30 published; the upload or this copy has changed",
        "warning: aime24: 3 problems, not the 30 published; the upload or this copy has changed",
    ]


def test_the_published_count_gives_no_warning(tmp_path: Path) -> None:
    rows = [{"id": i, "question": f"Q{i}", "answer": float(i) - 1, "url": ""} for i in range(40)]
    report = data.load_problems(f"amc23={write_parquet(tmp_path / 'amc.parquet', rows)}")
    assert len(report.lines) == 1 and "40 rows -> 40 problems" in report.lines[0]
    assert [p.gold for p in report.problems[:3]] == ["-1", "0", "1"]


def test_minerva_takes_the_first_of_several_variants(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "answer": ["4.5e33\n", r"4.5 \times 10^{33}"]},
        {"question": "b", "answer": ["", "SRAC=LRAC"]},
        {"question": "c", "answer": []},
    ]
    report = data.load_problems(str(write_parquet(tmp_path / "minerva.parquet", rows)))
    assert golds(report) == {"a": "4.5e33", "b": "SRAC=LRAC"}
    assert report.dropped == {"empty gold": 1}
    assert any("2 problems with several variants in 'answer'" in line for line in report.lines)


def test_olympiad_golds_single_and_multiple(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "question": "one", "final_answer": ["$2,024$"], "is_multiple_answer": False},
        {"id": 2, "question": "two joined", "final_answer": ["100,200"], "is_multiple_answer": True},
        {"id": 3, "question": "dollars", "final_answer": ["$1$,$2$ , $3$"], "is_multiple_answer": True},
        {"id": 4, "question": "two rows", "final_answer": ["1", "2"], "is_multiple_answer": False},
        {"id": 5, "question": "none", "final_answer": [], "is_multiple_answer": True},
    ]
    report = data.load_problems(str(write_parquet(tmp_path / "o.parquet", rows)))
    assert golds(report) == {"one": "2024", "two joined": "100, 200", "dollars": "1, 2, 3", "two rows": "1, 2"}
    assert report.dropped == {"empty gold": 1} and report.problems[0].id == "o/1"


def test_plain_files_of_every_kind_read_alike(tmp_path: Path) -> None:
    import datasets

    rows = plain_rows(5)
    write_parquet(tmp_path / "a" / "set.parquet", rows)
    write_jsonl(tmp_path / "set.jsonl", rows)
    (tmp_path / "set.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "set.jsonl").read_bytes())
    (tmp_path / "set.csv").write_text(
        "\ufeffproblem,answer\n" + "".join(f"{r['problem']},{r['answer']}\n" for r in rows)
    )
    expected = data.load_problems(str(tmp_path / "a" / "set.parquet")).problems
    assert [p.gold for p in expected] == ["1", "2", "3", "4", "5"]
    others = ["set.jsonl", "bom.jsonl", "set.json", "set.csv", "set", "set/data-00000-of-00001.arrow"]
    for other in others:
        report = data.load_problems(str(tmp_path / other))
        assert [(p.problem, p.gold) for p in report.problems] == [(p.problem, p.gold) for p in expected], other


def test_gold_column_may_be_called_gold_and_mixed_types_are_fine_in_json(tmp_path: Path) -> None:
    rows = [
        {"problem": "a", "gold": 3, "id": "first", "level": 2},
        {"problem": "b", "gold": "4.0"},
        {"problem": "c\u2028d", "gold": 5.0},
        {"problem": "e"},
    ]
    report = data.load_problems(str(write_jsonl(tmp_path / "mine.jsonl", rows)))
    assert [(p.id, p.gold, p.level) for p in report.problems] == [
        ("mine/first", "3", 2),
        ("mine/1", "4", None),
        ("mine/2", "5", None),
    ]
    assert report.dropped == {"empty gold": 1}


def test_ids_stay_unique_when_the_file_repeats_them(tmp_path: Path) -> None:
    rows = [{"problem": p, "answer": "1", "id": 7} for p in ("a", "b", "c")]
    report = data.load_problems(str(write_jsonl(tmp_path / "m.jsonl", rows)))
    assert [p.id for p in report.problems] == ["m/7", "m/7#1", "m/7#2"]


USER = {"role": "user", "content": "What is 1 + 1?"}
WORKED = r"It is \boxed{2}."


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 1 + 1?", "label": "2"},
        {"prompt": "What is 1 + 1?", "answer": 2},
        {"prompt": [USER], "label": 2.0},
        {"prompt": [USER], "solution": "$2$"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 1?"}]}], "answer": "2"},
        {"problem": "What is 1 + 1?", "answer": "2", "solution": "so 3", "prompt": "other", "messages": [USER]},
        {"question": "What is 1 + 1?", "answer": "one and one\n#### 2"},
        {"problem": "What is 1 + 1?", "expected_answer": "2", "generated_solution": "3"},
        {"problem": "What is 1 + 1?", "solution": WORKED},
        {"question": "What is 1 + 1?", "ground_truth": "02"},
        {"data_source": "openai/gsm8k", "prompt": [USER], "reward_model": {"ground_truth": "2", "style": "rule"}},
        {"messages": [USER], "ground_truth": "2"},
        {"messages": [USER, {"role": "assistant", "content": WORKED}]},
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_layouts_met_in_the_wild(tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    path = tmp_path / f"set.{kind}"
    (write_parquet if kind == "parquet" else write_jsonl)(path, [row])
    (problem,) = data.load_problems(str(path)).problems
    assert (problem.problem, problem.gold, problem.messages) == ("What is 1 + 1?", "2", ())
    assert problem.row == row


def test_columns_are_named_by_the_user(tmp_path: Path) -> None:
    row = {"problem": "Not this.", "answer": "9", "ask": "What is 1 + 1?", "truth": {"value": "2"}}
    path = str(write_parquet(tmp_path / "set.parquet", [row]))
    report = data.load_problems(path, prompt_column="ask", answer_column="truth.value")
    assert golds(report) == {"What is 1 + 1?": "2"}
    absent: list[dict[str, Any]] = [{"prompt_column": "asked"}, {"answer_column": "truth_value"}]
    for keys in absent:
        with pytest.raises(ValueError, match="columns problem, answer, ask, truth hold no .*set prompt_column"):
            data.load_problems(path, **keys)
    known = write_parquet(tmp_path / "known.parquet", [{"problem": "a", "answer": "1"}])
    assert data.load_problems(f"aime24={known}", prompt_column="ask").problems  # a known set has its own columns


def test_the_row_reaches_the_reward_in_json_types(tmp_path: Path) -> None:
    import datetime

    row = {"problem": "a", "answer": "1", "tests": [{"in": "1", "out": None}], "day": datetime.date(2026, 1, 2)}
    path = str(write_parquet(tmp_path / "set.parquet", [row]))
    (problem,) = data.load_problems(path).problems
    assert problem.row == row | {"day": "2026-01-02"}
    assert data.load_problems(path, keep_rows=False).problems[0].row == {}
    assert data.load_problems("toy_eval").problems[0].row == {}


def test_conversations_keep_all_turns(tmp_path: Path) -> None:
    system, prefix = {"role": "system", "content": "Be brief. "}, {"role": "assistant", "content": "<think>\nSo"}
    rows = [{"prompt": [system, USER], "label": 2}, {"prompt": [USER, prefix], "label": 2}]
    rows += [
        {"prompt": [USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Twice?"}], "label": 4}
    ]
    rows += [{"prompt": [system, USER], "label": 2}]
    report = data.load_problems(str(write_jsonl(tmp_path / "set.jsonl", rows)))
    assert [list(problem.messages) for problem in report.problems] == [row["prompt"] for row in rows[:3]]
    assert [problem.problem for problem in report.problems] == ["What is 1 + 1?"] * 2 + ["What is 1 + 1?\n\nTwice?"]
    assert report.dropped == {"duplicate": 1}
    assert any("3 problems are conversations, rendered as they stand" in line for line in report.lines)


@pytest.mark.parametrize(
    "turn", ["text", {"role": "user"}, {"content": "a"}, {"role": "user", "content": [{"image": 1}]}]
)
def test_a_turn_without_text_is_refused(tmp_path: Path, turn: Any) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", [{"prompt": [USER, turn], "answer": "1"}])
    with pytest.raises(ValueError, match="row 1: column 'prompt' holds .*; a turn with role and text is expected"):
        data.load_problems(str(path))


# --- cleaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("025", "25"),
        ("000", "0"),
        ("-0", "0"),
        ("+5", "5"),
        ("27.0", "27"),
        (27.0, "27"),
        (1e16, "10000000000000000"),
        (42, "42"),
        ("1,000,000", "1000000"),
        ("1,00", "1,00"),
        ("0,111", "0,111"),
        ("0.50", "0.50"),
        ("27.05", "27.05"),
        (" $ 12 $ \n", "12"),
        ("$$5$$", "5"),
        ("$1$ and $2$", "$1$ and $2$"),
        (r"\$18.90", r"\$18.90"),
        (r"$5\$", r"$5\$"),
        ("(3,4]", "(3,4]"),
        ("52_8", "52_8"),
        (r"90^\circ", r"90^\circ"),
        ("$$", ""),
        ("  ", ""),
        (float("nan"), ""),
        (None, ""),
    ],
)
def test_clean_gold(raw: Any, clean: str) -> None:
    assert clean_gold(raw) == clean


@given(st.integers(-(10**30), 10**30), st.integers(0, 3), st.booleans(), st.booleans(), st.booleans())
def test_every_spelling_of_an_integer_becomes_the_same(
    n: int, zeros: int, commas: bool, point: bool, dollar: bool
) -> None:
    digits = f"{abs(n):,}" if commas else "0" * zeros + str(abs(n))
    text = ("-" if n < 0 else "") + digits + (".0" if point else "")
    assert clean_gold(f" ${text}$ " if dollar else text) == str(n)


@given(st.text(max_size=40))
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    assert clean_gold(clean_gold(text)) == clean_gold(text)


@given(st.text(alphabet="Solve the fowngmabpy.\n Rr", max_size=60).map(str.strip))
def test_the_wrapper_comes_off_whole(problem: str) -> None:
    assert strip_wrapper(DAPO_PREFIX + problem + DAPO_SUFFIX) == problem
    assert strip_wrapper(DAPO_PREFIX + " " + problem + " " + DAPO_SUFFIX) == problem
    assert strip_wrapper(problem) == problem


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1} then \boxed{34}", "34"),
        (r"\boxed{\sqrt{\frac{1}{2}}} done", r"\sqrt{\frac{1}{2}}"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \\\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \\\end{pmatrix}"),
        (r"\fbox{9}", "9"),
        (r"$\boxed 2$", "2"),
        (r"\boxed{never closed", ""),
        (r"\boxedness", ""),
        ("", ""),
    ],
)
def test_the_answer_is_in_the_last_box(text: str, inside: str) -> None:
    assert boxed_answer(text, "Find x.") == inside


@pytest.mark.parametrize(
    ("problem", "text", "gold"),
    [
        ("Find all values of $x$.", r"so $x=\boxed{-2}$. If $y<0$, then $x=\boxed{1}$.", "-2, 1"),
        ("Solve for $x$.", r"$x=\boxed{-2}$ or $x=\boxed{1}$.", "-2, 1"),
        ("Solve for $x$.", r"The roots are $\boxed{-2}$, $\boxed{0}$ and $\boxed{1}$.", "-2, 0, 1"),
        ("Find $x$.", r"First $x=\boxed{-2}$, so that $y=\boxed{1}$.", "1"),
        ("Find the sum of all values of $x$.", r"so $x=\boxed{-2}$. Then the sum is $\boxed{1}$.", "1"),
        ("How many solutions are there?", r"Of the $\boxed{4}$ only $\boxed{3}$ are real.", "3"),
        ("Find all values of $x$.", r"so $x=\boxed{7}$. The other case: again $\boxed{7}$.", "7"),
        ("Find $x$.", r"so $\boxed{7}$. Note: with $y$ it is $\boxed{8}$.", "7"),
        ("Find all values.", r"so $\boxed{7}$ and $\boxed{9}$. Note that $\boxed{8}$ is none.", "7, 9"),
    ],
)
def test_several_boxes(problem: str, text: str, gold: str) -> None:
    assert boxed_answer(text, problem) == gold


# --- mixtures, splits, leaks -----------------------------------------------------------------------------------------


def test_a_mixture_keeps_order_and_adds_the_counts(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", [*plain_rows(3), *plain_rows(1)])
    second = write_jsonl(
        tmp_path / "second.jsonl", [{"problem": "What is 0 + 1?", "answer": "one"}, *plain_rows(5)[3:]]
    )
    report = data.load_problems([str(first), str(second)])
    assert [p.source for p in report.problems] == ["first"] * 3 + ["second"] * 3
    assert report.dropped == {"duplicate": 1}
    assert report.lines[-1].startswith("note: 1 problems are in more than one")
    assert len({p.id for p in report.problems}) == 6


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", plain_rows(1))
    with pytest.raises(ValueError, match="would both be a .*rename"):
        data.load_problems([str(path), str(path)])


def test_a_folder_with_several_splits_is_never_mixed(tmp_path: Path) -> None:
    hub_clone = tmp_path / "gsm8k"
    for config in ("main", "socratic"):
        for split, n in (("train", 3), ("test", 2)):
            rows = [{"question": f"{config} {split} {i}", "answer": f"#### {i}"} for i in range(n)]
            write_parquet(hub_clone / config / f"{split}-00000-of-00001.parquet", rows)
    assert [p.problem for p in data.load_problems(f"gsm8k_test={hub_clone}").problems] == ["main test 0", "main test 1"]
    assert [p.problem for p in data.load_problems(f"{hub_clone / 'main'}:test").problems] == [
        "main test 0",
        "main test 1",
    ]
    assert len(data.load_problems(str(hub_clone / "main")).problems) == 3
    with pytest.raises(ValueError, match=r"gsm8k/main: has the splits train, test, not dev; write .*gsm8k/main:SPLIT"):
        data.load_problems(str(hub_clone / "main"), prefer="dev")
    (hub_clone / "README.md").write_text(GSM8K_CARD)
    assert [p.problem for p in data.load_problems(f"{hub_clone}:main:test").problems] == ["main test 0", "main test 1"]
    with pytest.raises(ValueError, match="Config name is missing.*'main', 'socratic'.*write FOLDER:CONFIG:SPLIT"):
        data.load_problems(str(hub_clone))


def test_a_saved_dataset_dict_needs_a_split(tmp_path: Path) -> None:
    import datasets

    rows = [{"question": "a", "answer": "#### 1"}]
    both = datasets.DatasetDict()
    both["train"], both["test"] = datasets.Dataset.from_list(rows * 2), datasets.Dataset.from_list(rows)
    both.save_to_disk(str(tmp_path / "saved"))
    assert "1 rows" in data.load_problems(f"gsm8k_test={tmp_path / 'saved'}").lines[0]
    with pytest.raises(ValueError, match="saved: has the splits train, test, not validation"):
        data.load_problems(str(tmp_path / "saved"), prefer="validation")
    assert "2 rows" in data.load_problems(str(tmp_path / "saved")).lines[0]
    assert "1 rows" in data.load_problems(f"{tmp_path / 'saved'}:test").lines[0]
    assert "2 rows" in data.load_problems(str(tmp_path / "saved" / "train")).lines[0]


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    import datasets

    rows = [{"question": "a", "answer": "#### 1"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(ValueError, match="train_data: .*one: has the split None, not test; remove it"):
        data.load_problems(f"{tmp_path / 'one'}:test")
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match=r"a.jsonl: a file has no splits \(got test\); remove it"):
        data.load_problems(f"{tmp_path / 'a.jsonl'}:test")


def test_a_folder_of_shards_is_read_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "part-1.parquet", plain_rows(4)[2:])
    write_parquet(tmp_path / "d" / "part-0.parquet", plain_rows(2))
    assert [p.gold for p in data.load_problems(str(tmp_path / "d")).problems] == ["1", "2", "3", "4"]


def test_toy_sets_are_generated() -> None:
    report = data.load_problems("toy_train")
    assert len(report.problems) > 100 and isinstance(report.problems[0], data.Problem)
    assert len({p.id for p in report.problems}) == len(report.problems)


def test_leaks_are_named() -> None:
    assert data.check_leaks(["dapo_math_17k", "math_train_l3_5"], ["aime24", "aime25", "amc23", "math500"]) == []
    assert data.check_leaks("gsm8k_train", "gsm8k_test") == []
    (line,) = data.check_leaks(["math_train_l3_5"], ["/data/MATH-test.parquet"])
    assert line.startswith("warning: math_train_l3_5 (train) leaks into /data/MATH-test.parquet") and "math500" in line
    assert len(data.check_leaks("/x/DeepScaleR-Preview-Dataset", ["amc23", "math500"])) == 1
    assert len(data.check_leaks("Big-Math-RL-Verified.parquet", "math500")) == 1
    assert len(data.check_leaks("aime25", "aime24")) == 1  # a benchmark as training set is said aloud
    assert data.check_leaks("openai/gsm8k:main:train", "openai/gsm8k:main:test") == []
    assert data.check_leaks("org/name", "org/name") == []  # two splits, whose texts are compared
    with pytest.raises(ValueError, match="aime24.*eval_data too"):
        data.check_leaks(["gsm8k_train", "aime24=/copy.parquet"], "aime24")


def test_shared_problems_ignores_case_and_spaces() -> None:
    train = [data.Problem("t/0", "What is  $1+1$?", "2", "t", None)]
    held_out = [data.Problem(f"e/{i}", text, "2", "e", None) for i, text in enumerate(("what is $1 + 1$?", "Other"))]
    assert data.shared_problems(train, held_out) == ["e/0"]


# --- what cannot be read ---------------------------------------------------------------------------------------------


def test_unknown_sets_list_the_known(tmp_path: Path) -> None:
    for name in ("amc25", "amc25=" + str(tmp_path), f"amc25={tmp_path}/a.jsonl"):
        with pytest.raises(ValueError, match="unknown set 'amc25.*dapo_math_17k.*olympiadbench.*NAME=PATH"):
            data.load_problems(name)


@pytest.mark.parametrize("name", ["nowhere.parquet", "aime24=nowhere.parquet"])
def test_a_missing_path(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nowhere.parquet: no such file"):
        data.load_problems(name)


def test_a_missing_column_names_file_columns_and_layouts(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "bad.parquet", [{"problem": "a", "reply": "1"}])
    with pytest.raises(ValueError, match=r"bad\.parquet: columns problem, reply hold no .*\(problem\) with an answer"):
        data.load_problems(str(path))
    level = write_parquet(tmp_path / "nolevel.parquet", [{"problem": "a", "answer": "1"}])
    with pytest.raises(ValueError, match=r"nolevel\.parquet: math_train_l3_5 needs column 'level'"):
        data.load_problems(f"math_train_l3_5={level}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": 5, "answer": "1"}, "column 'problem' holds int '5'; text is expected"),
        ({"problem": "a", "answer": {"x": 1}}, "column 'answer': the gold answer is dict"),
        ({"problem": "a", "answer": True}, "column 'answer': the gold answer is bool"),
        ({"prompt": "a", "reward_model": "1"}, "column 'reward_model' must be a struct with a field 'ground_truth'"),
        ({"prompt": [{"role": "system", "content": "a"}], "solution": "1"}, "column 'prompt' holds no user turn"),
        ({"prompt": 7, "solution": "1"}, "column 'prompt' holds int"),
    ],
)
def test_a_wrong_dtype_names_file_row_and_column(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_parquet(tmp_path / "typed.parquet", [row])
    with pytest.raises(ValueError, match=r"typed\.parquet, row 1: .*Correct or remove") as caught:
        data.load_problems(str(path))
    assert message in str(caught.value)


def test_corrupt_files_are_named(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "good.parquet", plain_rows(2000)).read_bytes()
    for name, content, message in [
        ("empty.parquet", b"", "not a readable parquet file.*fetch or write it again"),
        ("cut.parquet", good[: len(good) // 2], "not a readable parquet file"),
        ("scrambled.parquet", good[:4] + bytes(200) + good[204:], "not a readable parquet file"),
        ("bad.arrow", b"not arrow", "not an Arrow stream"),
        ("bad.jsonl", b'{"problem": "a", "answer": "1"}\n{"problem": \n', "line 2: not JSON"),
        ("bad.json", b'[{"problem": "a",\n]', "line 2: not JSON"),
        ("list.jsonl", b'"text"\n', "record 1: str found"),
        ("latin.jsonl", '{"problem": "a"}\n{"problem": "é"}'.encode("latin-1"), "line 2: not UTF-8"),
        ("deep.jsonl", b'{"problem": "a"}\n' + b"[" * 100_000, "line 2: not JSON .nested too deeply"),
        ("deep.json", b"[" * 100_000, "nested too deeply"),
        (
            "half.jsonl",
            rb'{"problem": "a \ud800", "answer": "1"}',
            "row 1: 'utf-8' codec can't encode character.*ud800",
        ),
        ("half2.jsonl", rb'{"problem": "a", "answer": "\udfff"}', "row 1: 'utf-8' codec can't encode"),
        ("half3.jsonl", rb'{"problem": "a", "answer": "1", "id": "\udfff"}', "row 1: 'utf-8' codec can't encode"),
        ("latin.csv", "problem,answer\né,1".encode("latin-1"), "line 2: not UTF-8"),
        (
            "wide.csv",
            b"problem,answer\na,1\nb,2,3",
            "line 3: not CSV .the heading has 2 columns",
        ),
        ("narrow.csv", b"problem,answer\na", "line 2: not CSV .the heading has 2 columns"),
        ("open.csv", b'problem,answer\n"a,1', "line 1: not CSV"),
        ("set.xls", b"a,b", "unknown kind of file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            data.load_problems(str(tmp_path / name))


def test_bytes_that_are_no_text_name_their_row(tmp_path: Path) -> None:
    import datasets

    problems = pyarrow.array([b"a", b"b", b"\xff\xfe"]).cast(pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"problem": problems, "answer": pyarrow.array(["1", "2", "3"])})
    pyarrow.parquet.write_table(table, tmp_path / "bytes.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    for name in ("bytes.parquet", "saved"):
        with pytest.raises(ValueError, match=f"{name}, row 3: not UTF-8 text"):
            data.load_problems(str(tmp_path / name))


@pytest.mark.promise("integers of more than 4,300 digits, in data")
def test_whole_numbers_beyond_what_python_converts(tmp_path: Path) -> None:
    digits = "7" * 5000
    path = tmp_path / "long.jsonl"
    path.write_text(f'{{"problem": "a", "answer": {digits}, "level": {digits}}}\n')
    (problem,) = data.load_problems(str(path)).problems
    assert (problem.gold, problem.level) == (digits, None)


def test_a_damaged_saved_folder_is_named(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(plain_rows(2000)).save_to_disk(str(tmp_path / "saved"))
    arrow = tmp_path / "saved" / "data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:100])
    for path, message in ((tmp_path / "saved", "not a whole `save_to_disk` folder"), (arrow, "not an Arrow stream")):
        with pytest.raises(ValueError, match=f"{path.name}: {message}"):
            data.load_problems(str(path))


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    none = write_parquet(tmp_path / "none.parquet", plain_rows(1))
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(none).slice(0, 0), none)
    with pytest.raises(ValueError, match=r"none\.parquet: no problem left of 0 rows"):
        data.load_problems(str(none))
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"problem": "a", "answer": ""}])
    with pytest.raises(ValueError, match=r"no problem left of 1 rows \(dropped: 1 empty gold\)"):
        data.load_problems(str(empty))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder doesn't contain any data files"):
        data.load_problems(str(tmp_path / "folder"))
    shards = tmp_path / "shards"
    write_parquet(shards / "a.parquet", plain_rows(1))
    write_parquet(shards / "b.parquet", [{"question": "a", "answer": "1"}])
    with pytest.raises(ValueError, match=r"b\.parquet: columns .* differ"):
        data.load_problems(str(shards))
