"""What `make demo` adds to the runs that it starts."""

import pytest

import demo

pytestmark = pytest.mark.slow


def test_a_run_that_fails_ends_the_demo_and_its_lines_have_its_name(
    capfd: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit) as stopped:
        demo.train_all(["no_such_config"], 1, threads=1)
    assert str(stopped.value) == "no_such_config stopped with exit code 1; the lines above say why"
    assert (
        "no_such_config | config error: command line: config: no such file (got 'no_such_config.yaml')"
        in capfd.readouterr().out
    )
