"""What `make demo` adds to the runs that it starts."""

import json
from pathlib import Path

import pytest

import demo


def test_responses_of_the_first_and_the_last_step_are_shown(tmp_path: Path):
    (tmp_path / "samples").mkdir()
    for step in (1, 2, 10):
        rows = [{"problem": f"1 + {i}", "answer": f"{step}\n", "correct": i == 0} for i in range(3)]
        (tmp_path / "samples" / f"step_{step:06d}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert demo.first_and_last_responses(tmp_path, 2) == [
        f"{tmp_path.name}, step 1:",
        '  1 + 0  ->  "1\\n"  (correct)',
        '  1 + 1  ->  "1\\n"  (incorrect)',
        f"{tmp_path.name}, step 10:",
        '  1 + 0  ->  "10\\n"  (correct)',
        '  1 + 1  ->  "10\\n"  (incorrect)',
    ]


@pytest.mark.slow
def test_a_run_that_fails_ends_the_demo_and_its_lines_have_its_name(
    capfd: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit) as stopped:
        demo.train_all(["no_such_config"], 1, ["--run_name", "mine"], threads=1)
    assert str(stopped.value) == "no_such_config stopped with exit code 1; the lines above say why"
    printed = capfd.readouterr().out
    assert "command line: config: no such file (got 'no_such_config.yaml')" in printed
    assert "no_such_config | " in printed and "run_name: is set twice" in printed
