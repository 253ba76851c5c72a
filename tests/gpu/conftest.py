"""The acceptance on a GPU: `make gpu`, or a part of it, `make gpu PART=kernels`.

Everything here is skipped without a GPU. `REHEARSE=1` runs what can run on a CPU or over stub CUDA libraries, at small
sizes, to try the tests themselves.
Figures are printed in a table at the end and appended to build/gpu.jsonl.
"""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
REHEARSE = os.environ.get("REHEARSE") == "1"
FIGURES: list[dict[str, object]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" not in item.path.parts:
            continue
        item.add_marker(pytest.mark.gpu)
        if not (torch.cuda.is_available() or REHEARSE):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def full_size() -> bool:
    """Whether tests take the sizes of Qwen2.5-3B."""
    return torch.cuda.is_available() and not REHEARSE


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, float | str, str], None]:
    """Keeps a measured number: figure("sync, 3B-sized embedding", 0.21, "s")."""

    def keep(name: str, value: float | str, unit: str) -> None:
        hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        FIGURES.append({"figure": name, "value": value, "unit": unit, "on": hardware, "test": request.node.name})
        (ROOT / "build").mkdir(exist_ok=True)
        with (ROOT / "build" / "gpu.jsonl").open("a") as file:
            file.write(json.dumps(FIGURES[-1]) + "\n")

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("figures")
        for row in FIGURES:
            value = f"{row['value']:.4g}" if isinstance(row["value"], float) else row["value"]
            terminalreporter.write_line(f"{row['figure']:<60} {value} {row['unit']}")
