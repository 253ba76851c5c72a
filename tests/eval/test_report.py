"""The report of eval.report in a real browser: what it shows is what the files of the runs hold.

The runs are made up here (write_run). Without Chromium the tests that need one are skipped; `make browser` installs it.
"""

import base64
import gzip
import json
import math
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import yaml
from browser import CHROMIUM, Page, browser

import eval.report
from eval.report import main, write_report

STEPS = (2, 4)
SEEDS = (0, 1)
TOKENS = 30
HOSTILE = [
    "</script><script>document.title = 'taken'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title = 'taken'\">",
    "a\u2028b\u2029c\0d",
    "half \ud800 a pair",
    "{{ 7 * 7 }} {% raw %} ${1}",
    "&lt;b&gt; &amp; \u202egnirts",
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: make browser installs one")


def sample(rng: np.random.Generator, prompt: str, **known: Any) -> dict[str, Any]:
    """One line of samples/step_*.jsonl with every key, numbers drawn at random."""
    old = -rng.gamma(0.5, 1.5, TOKENS)
    now = np.minimum(old + rng.normal(0, 0.3, TOKENS), 0)
    texts = [str(word) for word in rng.choice([" the", " so", "\n", "12", " \\frac{1}{2}"], TOKENS)]
    correct = bool(rng.random() < 0.5)
    row = {
        "problem": f"Problem {prompt}",
        "answer": "".join(texts),
        "gold": "12",
        "extracted": "12" if correct else "7",
        "reason": "match" if correct else str(rng.choice(["mismatch", "no_answer"])),
        "reward": float(correct) - rng.integers(0, 3) / 4,
        "advantage": round(float(rng.normal()), 4),
        "tokens": TOKENS,
        "correct": correct,
        "truncated": bool(rng.random() < 0.3),
        "prompt_id": prompt,
        "token_texts": texts,
        "token_ids": rng.integers(0, 150_000, TOKENS).tolist(),
        "rollout_logprobs": (old + rng.normal(0, 0.01, TOKENS)).tolist(),
        "old_logprobs": old.tolist(),
        "logprobs": now.tolist(),
        "entropy": rng.gamma(1, 0.5, TOKENS).tolist(),
        "lower": rng.uniform(0.5, 0.9, TOKENS).tolist(),
        "upper": rng.uniform(1.1, 3.0, TOKENS).tolist(),
        "weight": rng.uniform(0, 2, TOKENS).tolist(),
        "clip": [int(sign) for sign in np.sign(now - old) * (np.abs(now - old) > 0.3)],
    }
    return row | known


def write_run(folder: Path, rule: str, seed: int, samples: dict[int, list[dict[str, Any]]] | None = None) -> Path:
    """A run folder of four steps, evaluated at steps 0 and 4; its numbers follow from rule and seed."""
    rng = np.random.default_rng([seed, len(rule)])
    (folder / "samples").mkdir(parents=True)
    rows = []
    for step in range(5):
        row: dict[str, float] = {"step": step}
        if step:
            keys = ("train/entropy", "reward/mean", "ratio/max", "optim/grad_norm", "throughput/tokens_per_s")
            row |= {key: float(rng.gamma(3)) for key in (*keys, "response/length_mean")}
            row |= {f"clip/{side}{p}": float(rng.random()) for side in ("up", "down") for p in ("", "/p<0.01", "/p<=1")}
        if step in (0, 4):
            row |= {"eval/toy/mean@32": float(rng.random()), "eval/toy/mean@32_stderr": 0.03}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"run_name": folder.name, "seed": seed, "rule": rule, "lr": 1e-4, "max_steps": 4}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if samples is None:
        samples = {step: [sample(rng, prompt) for prompt in ("p0", "p1", "p2")] for step in STEPS}
    for step, lines in samples.items():
        file = folder / "samples" / f"step_{step:06d}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two methods of two seeds; one of them with what environment.json holds."""
    root = tmp_path_factory.mktemp("runs")
    folders = [write_run(root / f"{rule}{seed}", rule, seed) for rule in ("fixed", "band") for seed in SEEDS]
    environment = {
        "command": ["python", "train.py", "--lr", "<b>1e-4</b>"],
        "packages": {"torch": "2.13.0"},
        "hardware": {"cpu": "a CPU", "cores": 2, "memory_gib": 16.0, "gpus": [{"name": "a GPU", "memory_gib": 80.0}]},
        "git": {"commit": "abc123", "dirty": True},
    }
    (folders[0] / "environment.json").write_text(json.dumps(environment))
    return folders


@pytest.fixture(scope="module")
def written(runs: list[Path]) -> Path:
    out = runs[0].parent / "report.html"
    write_report(runs, out)
    return out


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture
def page(chromium: Page, written: Path) -> Iterator[Page]:
    """The page of `runs`, opened anew; nothing may have gone wrong in it, nor may it have asked any network."""
    chromium.open(written)
    yield chromium
    assert chromium.said == []


def answers(runs: list[Path]) -> list[dict[str, Any]]:
    """Every line of samples/ with its run and step, in the order of the page's own numbering."""
    return [
        {**json.loads(line), "run": number, "step": step}
        for number, run in enumerate(runs)
        for step in STEPS
        for line in (run / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
    ]


def metric(run: Path, key: str, step: int) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[step])[key]


def digits(value: float, count: int = 4) -> float:
    return float(f"{value:.{count}g}")


def tip(page: Page) -> dict[str, str]:
    """The box beside a token: its numbers by name; {} while it is hidden."""
    return page.evaluate(
        "document.getElementById('tip').hidden ? {} : Object.fromEntries("
        "[...document.querySelectorAll('#tip tr')].map((row) => [...row.children].map((cell) => cell.textContent)))"
    )


def expected_tip(row: dict[str, Any], i: int) -> dict[str, Any]:
    upper = "∞" if row["upper"][i] is None else digits(row["upper"][i])
    return {
        "old probability p": digits(math.exp(row["old_logprobs"][i])),
        "ratio r": digits(math.exp(row["logprobs"][i] - row["old_logprobs"][i])),
        "interval": (digits(row["lower"][i]), upper),
        "gradient weight w": digits(row["weight"][i]),
        "entropy": digits(row["entropy"][i]),
        "rollout probability": digits(math.exp(row["rollout_logprobs"][i])),
        "token id": row["token_ids"][i],
    }


def read(shown: dict[str, str]) -> dict[str, Any]:
    low, high = shown["interval"].strip("[]").split(", ")
    numbers = {key: float(text.removesuffix(" nats")) for key, text in shown.items() if key != "interval"}
    return numbers | {"interval": (float(low), high if high == "∞" else float(high))}


def clip_of(row: dict[str, Any], i: int) -> str:
    return {1: "up", -1: "down", 0: ""}[row["clip"][i]]


def table(page: Page, title: str) -> list[list[str]]:
    """The values under one curve: label, value, range of each line."""
    return page.evaluate(
        f"[...document.querySelectorAll('figure')].find((f) => f.firstChild.textContent.startsWith({title!r}))"
        ".querySelectorAll('.readout tr').values().map((row) => [...row.children].map((c) => c.textContent)).toArray()"
    )


# Curves


@needs_browser
def test_curves_show_the_metrics_of_any_step(page: Page, runs: list[Path]) -> None:
    def check(step: int) -> None:
        for title, key, scale in (
            ("Policy entropy", "train/entropy", 1),
            ("Mean reward", "reward/mean", 1),
            ("Ratio, largest", "ratio/max", 1),
            ("Gradient norm", "optim/grad_norm", 1),
            ("Throughput", "throughput/tokens_per_s", 1),
            ("p<0.01", "clip/up/p<0.01", 100),
        ):
            lines = table(page, title)
            assert [line[0] for line in lines] == ["fixed", "band"]
            for line, of_group in zip(lines, (runs[:2], runs[2:]), strict=True):
                values = [scale * metric(run, key, step) for run in of_group]
                assert float(line[1].removesuffix(" %")) == pytest.approx(fmean(values), rel=1e-3)
                low, high = map(float, line[2].split(" to "))
                assert (low, high) == pytest.approx((min(values), max(values)), rel=1e-2)

    first = "document.querySelector('svg.chart')"
    check(4)  # as the page opens, at the last step
    page.evaluate(f"{first}.focus()")
    page.press("ArrowLeft")
    check(3)
    said = page.evaluate(f"{first}.getAttribute('aria-valuetext')")
    assert said.startswith(f"step 3: fixed {digits(fmean(metric(run, 'train/entropy', 3) for run in runs[:2]))} ")
    # mean@k was last evaluated before the first step, and the page says so.
    mean = 100 * fmean(metric(run, "eval/toy/mean@32", 0) for run in runs[:2])
    assert table(page, "toy mean@32")[0][1] == f"{digits(mean):g} %" and "at step 0" in table(page, "toy mean@32")[0][2]
    page.point(first)  # its middle, steps run from 0 to 4
    check(2)


@needs_browser
def test_one_seed_has_its_standard_error(chromium: Page, runs: list[Path]) -> None:
    write_report(runs[:1], out := runs[0].parent / "one.html")
    chromium.open(out)
    mean = 100 * metric(runs[0], "eval/toy/mean@32", 4)
    assert table(chromium, "toy mean@32") == [["fixed", f"{digits(mean):g} %", "± 3"]]


@needs_browser
def test_other_metrics_are_drawn_when_unfolded(page: Page) -> None:
    assert page.evaluate("document.querySelectorAll('details figure').length") == 0
    page.evaluate("document.querySelector('#panels details').open = true")
    page.wait("document.querySelector('#panels details figure figcaption')?.textContent.startsWith('Response length')")


@needs_browser
def test_a_click_on_a_curve_lists_the_answers_of_its_step(page: Page) -> None:
    page.click("document.querySelector('svg.chart')")
    assert page.evaluate("document.getElementById('filter').step.value") == "2"
    assert page.evaluate("document.getElementById('count').textContent") == "12 of 24 answers"


# The list of answers


@needs_browser
def test_filters_leave_what_they_say(page: Page, runs: list[Path]) -> None:
    rows = answers(runs)
    words = rows[5]["answer"][:9].upper()
    for wanted, keeps in (
        ({}, lambda row: True),
        ({"step": "2"}, lambda row: row["step"] == 2),
        ({"run": "3"}, lambda row: row["run"] == 3),
        ({"correct": "false"}, lambda row: not row["correct"]),
        ({"reason": "no_answer"}, lambda row: row["reason"] == "no_answer"),
        ({"truncated": "true"}, lambda row: row["truncated"]),
        ({"low": "0.25", "high": "0.75"}, lambda row: 0.25 <= row["reward"] <= 0.75),
        ({"text": words}, lambda row: words.lower() in row["answer"].lower()),
        ({"text": "problem P1", "correct": "true"}, lambda row: row["prompt_id"] == "p1" and row["correct"]),
    ):
        page.evaluate(
            f"(() => {{ const f = document.getElementById('filter'); f.reset(); const w = {json.dumps(wanted)};"
            "for (const key in w) f.elements[key].value = w[key];"
            "f.elements.text.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        shown = page.evaluate("[...document.querySelectorAll('#list tbody tr')].map((row) => Number(row.id.slice(4)))")
        assert sorted(shown) == [i for i, row in enumerate(rows) if keeps(row)], wanted
        assert page.evaluate("document.getElementById('count').textContent") == f"{len(shown)} of {len(rows)} answers"


@needs_browser
def test_a_row_shows_the_answer_of_the_file(page: Page, runs: list[Path]) -> None:
    for i, row in enumerate(answers(runs)):
        cells = page.evaluate(f"[...document.getElementById('row-{i}').children].map((cell) => cell.textContent)")
        kinds = [clip_of(row, k) for k in range(TOKENS)]
        clipped = [f"{sign} {kinds.count(kind)}" for sign, kind in (("▲", "up"), ("▼", "down")) if kind in kinds]
        assert cells[:5] == [
            *(row["problem"], runs[row["run"]].name, str(row["step"])),
            *("correct" if row["correct"] else "incorrect", row["reason"]),
        ]
        assert (float(cells[5]), float(cells[6])) == (row["reward"], digits(row["advantage"]))
        assert cells[7:] == [str(TOKENS) + " cut" * row["truncated"], " ".join(clipped) or "0"]


# An opened answer


def open_answer(page: Page, part: str) -> None:
    page.evaluate("document.getElementById('opened').replaceChildren()")
    page.evaluate(f"location.hash = {part!r}")
    page.wait("document.querySelector('#opened .answer') !== null")


@needs_browser
def test_filter_open_hover_and_read_a_token(page: Page, runs: list[Path]) -> None:
    """The way of a reader, with the mouse: the wrong answers, the first of them, a token of it."""
    page.evaluate("document.getElementById('filter').correct.value = 'false'")
    page.evaluate("document.getElementById('filter').dispatchEvent(new Event('input'))")
    number = int(page.evaluate("document.querySelector('#list tbody tr').id.slice(4)"))
    row = answers(runs)[number]
    assert not row["correct"]
    page.click(f"document.querySelector('#row-{number} a')")
    page.wait("document.querySelector('#opened .answer') !== null")
    assert (
        page.evaluate("document.querySelector('.answer h3').textContent")
        == f"{runs[row['run']].name}, step {row['step']}"
    )
    facts = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-fact]')].map((e) => [e.dataset.fact, e.textContent]))"
    )
    assert facts.pop("truncated") == ("yes" if row["truncated"] else "no")
    assert {key: facts[key] for key in ("reason", "gold", "extracted")} == {
        k: row[k] for k in ("reason", "gold", "extracted")
    }
    assert all(float(facts[key]) == pytest.approx(row[key]) for key in ("reward", "advantage", "tokens"))
    for i in range(0, TOKENS, 4):
        page.point(f"document.getElementById('t0-{i}')")
        assert read(tip(page)) == expected_tip(row, i)
        x, y = page.evaluate("['cx', 'cy'].map((at) => Number(document.querySelector('.map circle').getAttribute(at)))")
        p, r = math.exp(row["old_logprobs"][i]), math.exp(row["logprobs"][i] - row["old_logprobs"][i])
        # From 0.0001 to 1 over 400 units, and from 4 down to a quarter over 190.
        assert x == pytest.approx(44 + 100 * max(0, 4 + math.log10(p)), abs=0.2)
        assert y == pytest.approx(8 + 190 / 4 * min(max(2 - math.log2(r), 0), 4), abs=0.2)
    page.point("document.querySelector('h1')")
    assert tip(page) == {}


@needs_browser
def test_every_token_is_its_text_with_its_mark(page: Page, runs: list[Path]) -> None:
    for number, row in enumerate(answers(runs)[:8]):
        open_answer(page, f"answer={number}")
        shown = page.evaluate(
            "[...document.querySelectorAll('.tokens .token')].map((t) => [t.textContent, t.classList[1] ?? ''])"
        )
        assert [text.replace("↵", "") for text, _ in shown] == row["token_texts"]
        assert [mark for _, mark in shown] == [clip_of(row, i) for i in range(TOKENS)]


@needs_browser
def test_tokens_by_keyboard(page: Page, runs: list[Path]) -> None:
    rows = answers(runs)
    number = next(i for i, row in enumerate(rows) if sum(clip_of(row, k) != "" for k in range(3, TOKENS)) > 1)
    clipped = [k for k in range(TOKENS) if clip_of(rows[number], k)]
    page.evaluate(f"document.querySelector('#row-{number} a').focus()")
    page.press("Enter")
    page.wait("document.querySelector('.tokens') !== null")
    page.evaluate("document.querySelector('.tokens').focus()")
    for key, at in (("n", clipped[0]), ("n", clipped[1]), ("ArrowLeft", clipped[1] - 1), ("ArrowRight", clipped[1])):
        page.press(key)
        active = page.evaluate("document.querySelector('.tokens').getAttribute('aria-activedescendant')")
        assert active == f"t0-{at}" and read(tip(page)) == expected_tip(rows[number], at)
    spoken = page.evaluate(f"document.getElementById('t0-{clipped[1]}').ariaLabel")
    assert f"clipped {clip_of(rows[number], clipped[1])}" in spoken
    assert f"ratio r {expected_tip(rows[number], clipped[1])['ratio r']}" in spoken
    page.press("Escape")
    assert tip(page) == {}


@needs_browser
def test_two_runs_side_by_side(page: Page, runs: list[Path]) -> None:
    rows = answers(runs)
    open_answer(page, "answer=1")
    offered = page.evaluate("[...document.getElementById('beside').options].slice(1).map((o) => Number(o.value))")
    same = [i for i, row in enumerate(rows) if row["prompt_id"] == rows[1]["prompt_id"] and i != 1]
    assert offered == sorted(same, key=lambda i: abs(rows[i]["step"] - rows[1]["step"]))  # the nearest steps first
    other = offered[-1]
    page.evaluate(f"document.getElementById('beside').value = '{other}'")
    page.evaluate("document.getElementById('beside').dispatchEvent(new Event('change'))")
    page.wait("document.querySelectorAll('.answer').length === 2")
    for slot, number in enumerate((1, other)):
        page.point(f"document.getElementById('t{slot}-7')")
        assert read(tip(page)) == expected_tip(rows[number], 7)


@needs_browser
def test_marks_and_colours_by_hand(chromium: Page, tmp_path: Path) -> None:
    """Ratios 1.4, 0.7 and 1 in [0.8, 1.2], the first once more without an upper bound; old p 0.001, 1, 0.1 and 0.5."""
    old = [math.log(p) for p in (0.001, 1.0, 0.1, 0.5)]
    moved = [old[0] + math.log(1.4), old[1] + math.log(0.7), old[2], old[3] + math.log(1.4)]
    lists = {
        **{"token_texts": list("abcd"), "token_ids": [1, 2, 3, 4], "rollout_logprobs": old, "old_logprobs": old},
        **{"logprobs": moved, "entropy": [0, 1, 2, 3], "lower": [0.8] * 4, "upper": [1.2, 1.2, 1.2, None]},
        "weight": [0, 1, 2, 4],
    }
    rng = np.random.default_rng(0)
    clips = ([1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 0])
    lines = [sample(rng, "p", advantage=a, clip=clip, **lists) for a, clip in zip((1.0, -1.0, 0.0), clips, strict=True)]
    write_report([write_run(tmp_path / "run", "band", 0, {1: lines})], tmp_path / "report.html")
    chromium.open(tmp_path / "report.html")
    for number, marks in enumerate((["up", "", "", ""], ["", "down", "", ""], ["", "", "", ""])):
        open_answer(chromium, f"answer={number}")
        assert (
            chromium.evaluate("[...document.querySelectorAll('.tokens .token')].map((t) => t.classList[1] ?? '')")
            == marks
        )

    def painted(choice: str) -> list[str]:
        chromium.evaluate(f"document.getElementById('colour').value = '{choice}'")
        chromium.evaluate("document.getElementById('colour').dispatchEvent(new Event('change'))")
        return chromium.evaluate(
            "[...document.querySelectorAll('.tokens .token')].map((t) => getComputedStyle(t).backgroundColor)"
        )

    def shares(colours: list[str]) -> list[float]:
        return [float(c.rsplit(",", 1)[1].strip(" )")) / 0.72 for c in colours]

    assert shares(painted("p")) == pytest.approx([1, 0, 1 / 3, math.log10(2) / 3], abs=0.01)
    assert shares(painted("r")) == pytest.approx([math.log2(1.4), -math.log2(0.7), 0, math.log2(1.4)], abs=0.01)
    assert painted("r")[0].startswith("rgba(0, 114, 178") and painted("r")[1].startswith("rgba(213, 94, 0")
    assert shares(painted("entropy")) == pytest.approx([0, 0.5, 1, 1], abs=0.01)
    assert shares(painted("width")) == pytest.approx([math.log10(4) / 2] * 3 + [1], abs=0.01)
    assert shares(painted("weight")) == pytest.approx([0, 0.5, 1, 1], abs=0.01)
    assert painted("none") == ["rgba(0, 0, 0, 0)"] * 4
    chromium.point("document.getElementById('t0-3')")
    assert tip(chromium)["interval"] == "[0.8, ∞]"


@needs_browser
def test_a_rule_without_interval_is_marked_by_its_weights(chromium: Page, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    row = sample(rng, "p", weight=[0.0] + [0.5] * (TOKENS - 1), clip=[-1] + [0] * (TOKENS - 1))
    del row["lower"], row["upper"]
    write_report([write_run(tmp_path / "run", "sapo", 0, {1: [row]})], tmp_path / "report.html")
    chromium.open(tmp_path / "report.html", "#answer=0")
    marks = chromium.evaluate("[...document.querySelectorAll('.tokens .token')].map((t) => t.classList[1] ?? '')")
    assert marks == ["down"] + [""] * (TOKENS - 1)
    chromium.point("document.getElementById('t0-0')")
    assert tip(chromium)["interval"] == "none" and tip(chromium)["gradient weight w"] == "0"
    assert "no interval" in chromium.evaluate("document.querySelector('.answer figcaption').textContent")


CONTRAST = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, alpha = 1], below) => [r, g, b].map((c, i) => alpha * c + (1 - alpha) * below[i]);
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05;
  const paper = rgb(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll('.tokens .token, .hint, .answer dt, .answer header span, #list td')].map((e) => {
    const style = getComputedStyle(e), ground = light(over(rgb(style.backgroundColor), paper));
    const ratio = light(rgb(style.color)) / ground;
    return Math.max(ratio, 1 / ratio);
  });
})()"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_keeps_its_contrast(page: Page, runs: list[Path], scheme: str) -> None:
    """At least 4.5 to 1 (WCAG 2.2, AA) for words and for tokens in any colour."""
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    light = page.evaluate("getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'")
    assert light == (scheme == "light")
    for number in (0, 1):
        open_answer(page, f"answer={number}")
        for choice in ("p", "r", "entropy", "width", "weight"):
            page.evaluate(f"document.getElementById('colour').value = '{choice}'")
            page.evaluate("document.getElementById('colour').dispatchEvent(new Event('change'))")
            assert min(page.evaluate(CONTRAST)) >= 4.5, choice
    page.send("Emulation.setEmulatedMedia", features=[])


# What a model may write, and broken files


@needs_browser
def test_hostile_answers_are_text(chromium: Page, tmp_path: Path) -> None:
    lists = {"token_texts": HOSTILE}
    rng = np.random.default_rng(0)
    plain = sample(rng, "p")
    for key in {*eval.report.TOKEN_LISTS, "lower", "upper"} - {"token_texts"}:
        lists[key] = plain[key][: len(HOSTILE)]
    lines = [
        sample(rng, text, answer=text, problem=text, gold=text, extracted=text, reason=text, **lists)
        for text in HOSTILE
    ]
    run = write_run(tmp_path / "run", "band", 0, {1: lines})
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"run_name": HOSTILE[0], "model": HOSTILE[2]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(json.dumps({"command": HOSTILE[:3], "platform": HOSTILE[3]}))
    write_report([run], tmp_path / "report.html")
    for number, text in enumerate(HOSTILE):
        chromium.open(tmp_path / "report.html", f"#answer={number}")
        for place in ("pre[aria-label=Problem]", ".answer details pre", "[data-fact=gold]", "[data-fact=reason]"):
            assert chromium.evaluate(f"document.querySelector('{place}').textContent") == text
        shown = chromium.evaluate("[...document.querySelectorAll('.tokens .token')].map((t) => t.textContent)")
        assert shown == HOSTILE
        assert chromium.evaluate("document.title") == f"{HOSTILE[0]} – bandpo"
        assert chromium.evaluate("document.querySelectorAll('script').length") == len(HOSTILE) + 2
        assert chromium.evaluate("document.querySelectorAll('img').length") == 0
        assert chromium.said == []


@needs_browser
def test_a_script_that_is_not_ours_would_not_run(chromium: Page, written: Path, tmp_path: Path) -> None:
    """The second line behind escaping: the page's policy lets the browser run our script alone, and ask no network."""
    broken = written.read_text().replace(
        "<main>", "<script>document.title = 'taken'</script><img src='https://x.invalid'><main>"
    )
    (tmp_path / "broken.html").write_text(broken)
    chromium.open(tmp_path / "broken.html")
    assert chromium.evaluate("document.title") != "taken" and "Content Security Policy" in str(chromium.said)
    assert "blocked: csp" in chromium.said


@needs_browser
def test_a_page_that_cannot_be_drawn_says_so(chromium: Page, written: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.html").write_text(written.read_text().replace('id="index">H4sI', 'id="index">'))
    chromium.send("Page.navigate", url=(tmp_path / "cut.html").as_uri())
    chromium.wait("document.querySelector('[role=alert]')?.textContent.startsWith('The page could not be drawn (')")


def cards(written: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", " ", written.read_text().split('<div class="cards">')[1].split("</main>")[0]))


@pytest.mark.promise("malformed lines in labelled data, stored responses, metrics and samples")
def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good, short = sample(rng, "a"), sample(rng, "b")
    short["weight"] = short["weight"][:-1]
    run = write_run(tmp_path / "run", "band", 0, {1: [good, short]})
    with open(run / "samples" / "step_000001.jsonl", "a") as file:
        file.write('{"answer": 3}\n' + "1" * 5000 + '\n{"answer": "cut o')
    (run / "environment.json").write_text("{")
    write_report([run], tmp_path / "report.html")
    text = cards(tmp_path / "report.html")
    assert "step_000001.jsonl: no JSON object with problem, answer, " in text and "in line 3, 4, 5; left out" in text
    assert "step_000001.jsonl: token lists of different lengths; a response is left out" in text
    assert "environment.json: not JSON" in text
    assert (tmp_path / "report.html").read_text().count('id="tokens-') == 1


def test_not_a_number_is_a_dash_and_never_breaks_the_page(tmp_path: Path) -> None:
    row = sample(np.random.default_rng(0), "p", reward=math.nan)
    row["logprobs"][3], row["entropy"][4], row["upper"][5] = math.nan, math.inf, math.inf
    lists = eval.report._token_lists(row)
    assert lists["r"][3] is lists["entropy"][4] is lists["upper"][5] is None
    write_report([write_run(tmp_path / "run", "band", 0, {1: [row]})], tmp_path / "report.html")  # JSON knows no NaN


def test_the_card_says_what_the_run_was(written: Path) -> None:
    first, *_, last = cards(written).split("<article")[0].split("to step 4")[1:]
    assert "python train.py --lr <b>1e-4</b>" in first and "torch 2.13.0" in first
    assert "cpu a CPU, cores 2, memory_gib 16.0, gpus name a GPU, memory_gib 80.0" in first
    assert "commit abc123, dirty True" in first and "environment.json" in last
    told = re.findall(r'(<tr[^>]*>)<th scope="row">(\w+)</th><td>([^<]*)</td><td>([^<]*)</td>', written.read_text())
    assert ("<tr>", "lr", "0.0001", "1e-06") in told  # not the default, the same in all runs
    assert ('<tr class="differs">', "rule", "fixed", "band") in told
    assert ('<tr class="differs">', "rule", "band", "band") in told  # the default, and not so in the other run
    assert not [key for _, key, *_ in told if key == "temperature"]  # the default in all runs


def test_a_page_that_would_be_too_large_thins_its_steps(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    run = write_run(tmp_path / "run", "band", 0, {step: [sample(rng, "p")] for step in range(1, 8)})
    size = max(file.stat().st_size for file in (run / "samples").iterdir())
    for room, steps in ((7, [1, 2, 3, 4, 5, 6, 7]), (4, [1, 3, 5, 7]), (3, [1, 4, 7]), (2, [3, 7]), (0, [7])):
        monkeypatch.setattr(eval.report, "MAX_SAMPLE_BYTES", room * size)
        assert eval.report._steps_that_fit([eval.report._sample_files(run)]) == steps
    write_report([run], tmp_path / "report.html")
    assert "Answers of 1 of 7 steps are in this page" in (tmp_path / "report.html").read_text()


def test_mistakes_are_one_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, told in (
        ([], "the following arguments are required: runs"),
        ([tmp_path / "nothing"], "is not a run folder"),
        ([runs[0] / "samples"], f"did you mean {runs[0]}?"),
        ([runs[0], "--steps", "2", "3"], "steps: [3] have no answers; there are answers of [2, 4]"),
        ([runs[0], "--steps", "two"], "argument --steps: invalid int value: 'two'"),
        ([runs[0], "--out", tmp_path], "Is a directory"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(word) for word in argv])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and told in line
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m eval.report ")


def test_where_the_page_goes_when_nobody_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [write_run(tmp_path / rule, rule, 0) for rule in ("fixed", "band")]
    main([str(both[0])])
    main([str(run) for run in both])
    pages = [both[0] / "report.html", tmp_path / "report.html"]
    assert all(page.exists() for page in pages)
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == list(map(str, pages))


def test_a_null_is_left_out_of_the_curves_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "band", 0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[3] |= {"train/entropy": None, "mine/never": None}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "not a finite number: mine/never from step 3, train/entropy from step 3" in text
    packed = re.search(r'id="index"[^>]*>([^<]+)<', text)
    assert packed
    index = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    steps = {panel["key"]: panel["curves"][0]["steps"] for part in index["sections"] for panel in part["panels"]}
    assert steps["train/entropy"] == [1, 2, 4] and steps["reward/mean"] == [1, 2, 3, 4] and "mine/never" not in steps


@needs_browser
def test_a_run_without_anything_is_a_page(chromium: Page, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("rule: band\n")
    write_report([tmp_path / "run"], tmp_path / "report.html")
    chromium.open(tmp_path / "report.html")
    assert "These runs have logged no answers" in chromium.evaluate("document.body.innerText")
    assert chromium.said == []
