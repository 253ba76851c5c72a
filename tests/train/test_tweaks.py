"""docs/tweaks.md, tried: every block of the page is taken from it, put in place, and trained with for two steps."""

import json
import math
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import ROOT, metrics, without_clock

import train
from data.toy import toy_problems

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]

# Small, and warm enough that a group's answers differ; a tweak must not set any of these, or it would not be tried.
SMALL: dict[str, object] = {
    **{"sharding": "none", "engine": "hf", "precision": "float32", "wandb": "disabled", "verifier_workers": 1},
    **{"prompts_per_step": 4, "samples_per_prompt": 16, "max_steps": 2, "eval_every": 0, "save_every": 0},
    **{"max_prompt_tokens": 96, "max_response_tokens": 16, "micro_batch_tokens": 2048, "chat_template": "false"},
    **{"temperature": 1.6, "lr": 1e-3, "output_dir": "runs"},
}
# What the paper's runs have that the tiny model of the synthetic task cannot use; a tweak may set these.
DEFAULTS = "prompt_template: plain\nreward: math\ntrain_data: toy.jsonl\n"


@dataclass
class Tweak:
    """One section of the page: its variants, the files it writes, the changes it makes to ours."""

    title: str
    variants: list[str] = field(default_factory=list)  # YAML
    files: dict[str, str] = field(default_factory=dict)
    diffs: list[tuple[str, str]] = field(default_factory=list)  # file, lines of ' ', '-', '+'


def read_page(text: str) -> list[Tweak]:
    """The page's sections that have a block."""
    tweaks: list[Tweak] = []
    for section in re.split(r"^##? ", text, flags=re.MULTILINE)[1:]:
        tweak = Tweak(section.splitlines()[0])
        for kind, name, body in re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            if kind == "yaml":
                tweak.variants.append(body)
            elif kind == "diff":
                tweak.diffs.append((name, body))
            else:
                tweak.files[name] = body
        assert tweak.variants, f"section {tweak.title!r} has no YAML block to try"
        tweaks.append(tweak)
    return tweaks


PAGE = {tweak.title: tweak for tweak in read_page((ROOT / "docs" / "tweaks.md").read_text())}
CASES = [(title, i) for title, tweak in PAGE.items() for i in range(len(tweak.variants))]


def arguments(folder: Path, name: str, variant: str, model: str) -> list[str]:
    """train.py's arguments for a variant, its file written to `folder`."""
    given = yaml.safe_load(variant)
    assert not given.keys() & SMALL.keys(), f"{name} sets keys that the test sets too"
    defaults = "".join(line for line in DEFAULTS.splitlines(True) if line.partition(":")[0] not in given)
    head = "" if "inherit" in given else "inherit: qwen3b_band.yaml\n"
    (folder / f"{name}.yaml").write_text(head + defaults + variant)
    argv = ["--config", f"{name}.yaml", "--model", model]
    argv += [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    return argv if "run_name" in given else [*argv, "--run_name", name]


def put_in_place(folder: Path, tweak: Tweak) -> None:
    rows = [{"problem": p.problem, "answer": p.gold} for p in toy_problems("toy_train")[:64]]
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in tweak.files.items():
        (folder / name).write_text(text)


def check_rows(run: Path, variant: str) -> Rows:
    """What holds for every tweak: two steps that learn, with the keys of the page in the resolved configuration."""
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["optim/grad_norm"] > 0 and math.isfinite(row["train/loss"]) for row in rows)
    given, used = yaml.safe_load(variant), yaml.safe_load((run / "config.yaml").read_text())
    for key, value in given.items():
        if isinstance(value, dict):
            assert value.items() <= used[key].items()
        else:
            assert key == "inherit" or used[key] == value
    return rows


def samples(run: Path) -> Rows:
    lines = [line for path in sorted((run / "samples").glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


# ---- what shows that a tweak did what its section says ----


def tweaked_delta(run: Path, rows: Rows, base: Rows) -> None:
    assert [row["train/delta"] for row in rows] == [0.03, 0.03]
    assert rows[0]["band/lower_mean"] > base[0]["band/lower_mean"]


def rloo(run: Path, rows: Rows, base: Rows) -> None:
    """r - mean of the 15 others: with rewards of -1 and 1, a multiple of 2/15."""
    values = [row["advantage"] * 15 / 2 for row in samples(run)]
    assert any(values) and all(abs(value - round(value)) < 1e-3 for value in values)


def other_width(run: Path, rows: Rows, base: Rows) -> None:
    assert rows[0]["reward/mean"] == base[0]["reward/mean"]  # the same answers,
    assert rows[0]["band/lower_mean"] != pytest.approx(base[0]["band/lower_mean"], rel=1e-3)  # other intervals


def other_loss(run: Path, rows: Rows, base: Rows) -> None:
    assert rows[0]["reward/mean"] == base[0]["reward/mean"]  # the same samples, another loss
    assert rows[0]["train/loss"] != pytest.approx(base[0]["train/loss"], rel=1e-6)


def other_gradient(run: Path, rows: Rows, base: Rows) -> None:
    other_loss(run, rows, base)
    assert rows[0]["optim/grad_norm"] != pytest.approx(base[0]["optim/grad_norm"], rel=1e-6)


def another_rule(run: Path, rows: Rows, base: Rows) -> None:
    rule = yaml.safe_load((run / "config.yaml").read_text())["rule"]
    shown = other_loss if rule == "cispo" else other_gradient  # CISPO's gradient is Band's where nothing is clipped
    shown(run, rows, base)
    assert "band/upper_mean" not in rows[0]  # all three give weights
    assert (rows[0]["clip/fraction"] > 0) == (rule == "gspo")  # SAPO and CISPO clip nothing


def corrected(run: Path, rows: Rows, base: Rows) -> None:
    """Engine and trainer agree here, so that every weight is 1 and no token is masked."""
    assert rows[0]["rollout/tis_mean"] == pytest.approx(1, abs=1e-5)
    assert rows[0]["train/loss"] == pytest.approx(base[0]["train/loss"], rel=1e-3, abs=1e-6)


def own_reward(run: Path, rows: Rows, base: Rows) -> None:
    scope: dict[str, Any] = {}
    exec(PAGE["Another reward"].files["my_rewards.py"], scope)
    seen = samples(run)
    assert {row["reward"] for row in seen} <= {-1.0, 0.0, 1.0} and len({row["reward"] for row in seen}) > 1
    for row in seen:
        assert row["reward"] == 2 * scope["score"](row["answer"], row["gold"], row["truncated"])["score"] - 1
    assert 0 < rows[0]["reward/found"] < 1  # logged beside the score


def judged(run: Path, rows: Rows, base: Rows) -> None:
    """The server's verdict is the reward."""
    seen = samples(run)
    assert {row["reward"] for row in seen} == {-1.0, 1.0}
    assert all((row["reward"] == 1) == is_convinced(row["answer"]) for row in seen)


def own_data(run: Path, rows: Rows, base: Rows) -> None:
    written = [json.loads(line) for line in PAGE["Another data set"].files["my_problems.jsonl"].splitlines()]
    assert {row["problem"] for row in samples(run)} == {row["problem"] for row in written}


def refilled(run: Path, rows: Rows, base: Rows) -> None:
    left, found = (sum(row["reward/zero_std"] for row in run_rows) for run_rows in (base, rows))
    assert left > found


def rollout_as_old(run: Path, rows: Rows, base: Rows) -> None:
    """Engine and trainer are compared over the first minibatch, not over all of them."""
    assert rows[0]["reward/mean"] == base[0]["reward/mean"]
    assert rows[0]["rollout/kl"] != base[0]["rollout/kl"]


def asymmetric(run: Path, rows: Rows, base: Rows) -> None:
    assert rows[0]["band/upper_mean"] > base[0]["band/upper_mean"]
    assert rows[0]["band/lower_mean"] > base[0]["band/lower_mean"]


def own_rule(run: Path, rows: Rows, base: Rows) -> None:
    """Its interval is symmetric, and so is its mean."""
    assert (
        rows[0]["band/upper_mean"] - 1 == pytest.approx(1 - rows[0]["band/lower_mean"])
        and rows[0]["band/upper_mean"] > 1
    )


def stale(run: Path, rows: Rows, base: Rows) -> None:
    """The second step's samples are the start model's, so the policy that trains on them gives them other weights."""
    assert [row["train/staleness"] for row in rows] == [0, 1] and [row["train/staleness"] for row in base] == [0, 0]
    assert rows[0]["reward/mean"] == base[0]["reward/mean"]
    assert abs(rows[0]["rollout/tis_mean"] - 1) < 1e-4 < abs(rows[1]["rollout/tis_mean"] - 1)


CONFIG_FACTS: dict[str, Callable[[Path, Rows, Rows], None]] = {
    "Tweaks": tweaked_delta,
    "Another advantage": rloo,
    "Another divergence": other_width,
    "Another rule": another_rule,
    "An asymmetric Band": asymmetric,
    "A new rule": own_rule,
    "An entropy bonus": other_gradient,
    "Corrections for the rollout/trainer gap": corrected,
    "Stale rollouts": stale,
    "Another reward": own_reward,
    "An LLM as judge": judged,
    "Another data set": own_data,
    "Dynamic sampling": refilled,
    "Rollout policy as old policy": rollout_as_old,
}
# For changed code: an expression evaluated in the changed copy, and its value worked by hand.
CODE_FACTS: dict[str, tuple[str, object]] = {
    # mean -1/2, so 3/2 and -1/2 off it, times 3/4
    "A new advantage": (
        "train.group_advantages(torch.tensor([[1.0, -1, -1, -1]]), 'hard_first').tolist()",
        [[1.125, -0.375, -0.375, -0.375]],
    ),
    # at p = 1/2, D(1 + x) = 2 x^2 / (4 - x^2) = 0.05
    "A new divergence": (
        "band_bounds(torch.tensor([0.5]).log(), delta=0.05, divergence='le_cam')[1].tolist()",
        pytest.approx([1 + math.sqrt(0.2 / 2.05)], rel=1e-6),
    ),
    "An advantage per token": ("None", None),
    "A metric of tokens": ("None", None),
    "Replay": ("State().best", []),
    "A new prompt": ("TEMPLATES['exam'].user.format(problem='1+1=')", "1+1=\nEnd with your answer in \\boxed{}."),
}


def per_token(rows: dict[str, Rows]) -> None:
    """The same samples as without the change, another gradient."""
    first, other = rows["An advantage per token"][0], rows["base"][0]
    assert first["reward/mean"] == other["reward/mean"]
    assert first["optim/grad_norm"] != pytest.approx(other["optim/grad_norm"], rel=1e-4)


def statistic(rows: dict[str, Rows]) -> None:
    assert all(row["mine/log_ratio_squared"] > 0 for row in rows["A metric of tokens"])


def replay(rows: dict[str, Rows]) -> None:
    """The second step trains on some samples of the first; a resume between them changes nothing."""
    first, second = rows["Replay"]
    assert first["train/staleness"] == 0 < second["train/staleness"] < 0.5
    assert without_clock(rows["resumed"]) == without_clock(rows["Replay"])


def test_every_section_is_tried():
    assert {title for title, tweak in PAGE.items() if not tweak.diffs} == CONFIG_FACTS.keys()
    assert {title for title, tweak in PAGE.items() if tweak.diffs} == CODE_FACTS.keys()


# ---- tweaks of the configuration: here ----


@pytest.fixture(scope="module")
def base(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The run that they vary."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        put_in_place(folder, Tweak("base"))
        assert train.main(arguments(folder, "base", "rule_args: {delta: 0.05}\n", toy_model)) == 0
    return check_rows(folder / "runs" / "base", "rule_args: {delta: 0.05, divergence: kl, ratio_cap: 10.0}\n")


def is_convinced(response: str) -> bool:
    """The verdict of the judge, which is a function of the text here."""
    return zlib.crc32(response.encode()) % 2 == 0


class Judge(BaseHTTPRequestHandler):
    """Answers as a chat completions endpoint does."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        response = body["messages"][0]["content"].partition("\nResponse: ")[2].rpartition("\nIs the response")[0]
        verdict = "Yes, it is." if is_convinced(response) else "No."
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": verdict}}]}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


@pytest.mark.usefixtures("judge")
@pytest.mark.parametrize(("title", "i"), [case for case in CASES if not PAGE[case[0]].diffs])
def test_a_tweak_of_the_configuration(
    title: str, i: int, base: Rows, toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    variant = PAGE[title].variants[i]
    monkeypatch.chdir(tmp_path)
    put_in_place(tmp_path, PAGE[title])
    assert train.main(arguments(tmp_path, "tweak", variant, toy_model)) == 0
    run = tmp_path / "runs" / yaml.safe_load(variant).get("run_name", "tweak")
    CONFIG_FACTS[title](run, check_rows(run, variant), base)


# ---- tweaks of the code: in a copy of the project ----


def apply(diff: str, text: str, where: str) -> str:
    """`text` with the lines of ' ' and '-' replaced by those of ' ' and '+'."""
    lines = diff.splitlines(True)
    before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
    assert text.count(before) == 1, f"docs/tweaks.md shows lines that are not (once) in {where}:\n{before}"
    return text.replace(before, after)


CHANGED = {title: tweak for title, tweak in PAGE.items() if tweak.diffs}


def run_in_a_copy(folder: Path, changed: list[Tweak], model: str, more: list[list[str]]) -> dict[str, Rows]:
    """Metrics by title of runs in a copy of the project with these changes, after which `more` are run there."""
    rooms = ("bandpo", "configs", "data", "eval", "rewards", "trainer")
    for source in [*ROOT.glob("*.py"), *(ROOT / room for room in rooms)]:
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    for tweak in changed:
        for name, diff in tweak.diffs:
            path = folder / name
            path.write_text(apply(diff, path.read_text(), name))
    put_in_place(folder, Tweak("code"))
    names = {f"code_{n}": tweak for n, tweak in enumerate(changed)}
    runs = [arguments(folder, name, tweak.variants[0], model) for name, tweak in names.items()]
    facts = ", ".join(CODE_FACTS[tweak.title][0] for tweak in changed)
    script = (
        "import json, sys, torch, train\n"
        "from bandpo.band import band_bounds\n"
        "from configs.schema import Config\n"
        "from data.prompts import TEMPLATES\n"
        "from trainer.types import State\n"
        f"print('FACTS', json.dumps([{facts}]), flush=True)\n"
        "sys.exit(any([train.main(argv) for argv in json.loads(sys.argv[1])]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([*runs, *more])],
        cwd=folder, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.partition("FACTS ")[2].splitlines()[0])
    assert found == [CODE_FACTS[tweak.title][1] for tweak in changed]
    rows = {}
    for name, tweak in names.items():
        run = yaml.safe_load(tweak.variants[0]).get("run_name", name)
        rows[tweak.title] = check_rows(folder / "runs" / run, tweak.variants[0])
    return rows


def in_two_parts(folder: Path, name: str, model: str) -> list[list[str]]:
    """The run that everything is compared with, stopped after its first step and resumed."""
    words = arguments(folder, name, "rule_args: {delta: 0.05}\n", model)
    at = words.index("--max_steps") + 1
    return [[*words[:at], "1", *words[at + 1 :]], words]


def test_tweaks_of_the_code(base: Rows, toy_model: str, tmp_path: Path):
    """All of them in one copy, which also shows that they do not get in each other's way."""
    rows = run_in_a_copy(tmp_path, list(CHANGED.values()), toy_model, in_two_parts(tmp_path, "resumed", toy_model))
    rows |= {"base": base, "resumed": metrics(tmp_path / "runs" / "resumed")}
    for fact in (per_token, statistic, replay):
        fact(rows)
