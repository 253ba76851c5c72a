"""preflight.py: names of models, the compiler that Triton needs; choices of the GPU path, its errors and warnings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

from data import HubUnreachable
from trainer.preflight import check_compiler, check_model
from trainer.rollout import EngineError, engine_errors


@pytest.mark.parametrize("model", ["here/model", "build/toy_model", "./a/b", "/a/b", "~/a", "gpt2", "a b/c"])
def test_a_path_without_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(
        ValueError, match=f"model: {model} is not a folder that exists, nor a hub id .*; correct the path"
    ):
        check_model(model)


def test_a_hub_id_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model in ("owner/model", "Owner_1/Model-2.5.x"):
        with pytest.raises(HubUnreachable, match=f"model: {model} could not be fetched"):
            check_model(model)


def test_a_compiler_with_pythons_headers_passes():
    check_compiler()


@pytest.mark.parametrize("compiler, reason", [("/nonexistent/cc", "No such file"), ("no_headers", "Python.h")])
def test_without_a_compiler_or_headers_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str
):
    """The real compiler, without the folder in which Python.h is."""
    if compiler == "no_headers":
        compiler = str(tmp_path / "cc")
        Path(compiler).write_text("#!/bin/sh\nexec gcc -fsyntax-only -nostdinc -xc -\n")
        Path(compiler).chmod(0o755)
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(ValueError, match=f"engine: vllm compiles .*{reason}.*; install gcc and python3-dev"):
        check_compiler()


def test_a_failed_compilation_is_an_engine_error_that_names_the_package():
    """As from Triton's first launch."""
    with pytest.raises(EngineError, match="sampling: Command .* returned non-zero .*; install gcc and python3-dev"):
        with engine_errors("the engine failed while sampling"):
            subprocess.run(["false"], check=True)


WARNING = """
import os, torch
from configs import load
from configs.schema import Config
from trainer.start import start_processes
os.environ |= {"ACCELERATE_USE_CPU": "true"}
start_processes(load(Config, ["--config", "demo_band"]))
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
try:
    torch.distributed.all_gather_into_tensor(torch.zeros(1), torch.zeros(1))
except RuntimeError:  # not every gloo has it
    pass
print("called")
"""


@pytest.mark.slow
def test_the_deprecated_collective_of_accelerate_prints_no_warning():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default::FutureWarning"}
    done = subprocess.run(
        [sys.executable, "-c", WARNING], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.endswith("called\n"), done.stderr
    assert "all_gather_into_tensor" not in done.stderr
