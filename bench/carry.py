"""Packs what vLLM needs for a GPU machine that has PyTorch and transformers, no network, and takes files in pieces.

    python -m bench.carry --out build/carry     # here: downloads wheels, cuts large ones, sorts all into loads
    bash join.sh /tmp/carried /tmp/site         # there, once all loads lie in /tmp/carried: installs to /tmp/site
    PYTHONPATH=/tmp/site python3 -m pytest -v tests/gpu

Wheels are taken at the releases of requirements.txt and requirements-cpu.txt, without their dependencies: torch and
transformers of that machine stay. A load is a folder below --load_mib.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What an image with PyTorch, transformers, accelerate and pytest lacks. vLLM imports most of them when it starts.
PACKAGES = """
vllm cbor2 pyzmq msgspec oss-harmony openai pydantic pydantic_core annotated-types typing-inspection jiter distro
sniffio pybase64 cachetools llguidance xgrammar apache-tvm-ffi==0.1.11 fastapi starlette partial-json-parser httpx2
httpcore2 truststore datasets math-verify latex2sympy2_extended antlr4-python3-runtime blake3 py-cpuinfo gguf
compressed-tensors prometheus-fastapi-instrumentator prometheus_client python-json-logger setproctitle loguru
lm-format-enforcer interegular outlines_core lark mistral_common pydantic-extra-types pycountry depyf astor
watchfiles uvloop httptools ijson model-hosting-container-standards jmespath supervisor docstring_parser mcp
mcp-types sse-starlette uvicorn pydantic-settings anthropic jsonschema jsonschema-specifications referencing rpds-py
dill multiprocess xxhash anyio python-multipart email-validator dnspython tiktoken einops PyJWT cloudpickle
""".split()
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35)]
PLATFORMS += ["manylinux1_x86_64", "manylinux2014_x86_64"]
JOIN = """#!/usr/bin/env bash
# bash join.sh FOLDER_WITH_ALL_LOADS TARGET
set -euo pipefail
cd "$1"
for first in $(find . -name '*.part000' -printf '%f\\n'); do
  name=${first%.part000}
  cat $(find . -name "$name.part*" -printf '%f %p\\n' | sort | cut -d' ' -f2) > "$name"
done
find . -name '*.part*' -delete
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \\
  --target "$2" $(find . -name '*.whl')
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "carry")
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    parser.add_argument("--piece_mib", type=int, default=50)
    parser.add_argument("--load_mib", type=int, default=55)
    options = parser.parse_args()
    wheels = options.out / "wheels"
    download(options.packages, wheels, options.python)
    for number, load in enumerate(sort(cut(wheels, options.piece_mib << 20), options.load_mib << 20)):
        folder = options.out / f"load_{number:02d}"
        folder.mkdir()
        for file in load:
            shutil.move(file, folder / file.name)
        print(f"{folder}: {len(load)} files, {sum(f.stat().st_size for f in folder.iterdir()) / 2**20:.0f} MiB")
    (options.out / "join.sh").write_text(JOIN)


def download(packages: list[str], folder: Path, python: str) -> None:
    """Wheels for that Python on Linux, at the releases that the requirements name."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    pins = {}
    for file in ("requirements-cpu.txt", "requirements.txt"):
        for name, release in re.findall(r"^([\w.-]+)(?:\[\S+\])?==(\S+)", (ROOT / file).read_text(), re.MULTILINE):
            pins[name.lower()] = release
    wanted = [f"{name}=={pins[name.lower()]}" if name.lower() in pins else name for name in packages]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    line = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *target, "-d", str(folder), *wanted]
    subprocess.run(line, check=True)


def cut(folder: Path, piece_bytes: int) -> list[Path]:
    """The files of the folder, larger ones in pieces NAME.part000, NAME.part001, ..."""
    for file in [file for file in folder.iterdir() if file.stat().st_size > piece_bytes]:
        with file.open("rb") as stream:
            for number, piece in enumerate(iter(lambda: stream.read(piece_bytes), b"")):
                (folder / f"{file.name}.part{number:03d}").write_bytes(piece)
        file.unlink()
    return sorted(folder.iterdir(), key=lambda file: -file.stat().st_size)


def sort(files: list[Path], load_bytes: int) -> list[list[Path]]:
    """The files, largest first, each in the first load that has room."""
    loads: list[list[Path]] = []
    for file in files:
        size = file.stat().st_size
        fits = (load for load in loads if sum(f.stat().st_size for f in load) + size <= load_bytes)
        load = next(fits, None)
        if load is None:
            loads.append([file])
        else:
            load.append(file)
    return loads


if __name__ == "__main__":
    main()
