"""The files of the model that a run starts from: read before any weight is, and named by a hash.

    config = read_config(model, trust_remote_code=False)    # ValueError, one line, for files that cannot be
    check_weights(model, config, trust_remote_code=False)   # whole, and of the shapes that the configuration says
    files_hash(model)                                       # other files under the same name are another model

Only headers of weights are read, so that a model of any size takes a moment.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from configs.schema import Config
from data.tables import read_json_object

JSON_FILES = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "model.safetensors.index.json"
).split()
SAFE, TORCH = "model.safetensors", "pytorch_model.bin"
SAMPLE_BYTES = 4096  # of each weight, from its beginning
SCALED = ("linear", "dynamic")  # kinds of RoPE whose factor lengthens max_position_embeddings; others have it inside


def read_config(model: str, *, trust_remote_code: bool) -> Any:
    """The transformers configuration of a folder or hub id.

    Raises ValueError naming the file for one that is not JSON, and for a configuration with a value of a wrong kind.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = _folder(model)
    for path in (folder / name for name in JSON_FILES):
        if path.is_file():
            read_json_object(path)
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (StrictDataclassError, ValueError, OSError) as error:
        raise ValueError(f"model: {folder / 'config.json'}: {_in_a_line(error)}") from None


def read_tokenizer(model: str, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or hub id. Raises ValueError when its files are not those of one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:  # of whatever tokenizer this is
        told = f"{type(error).__name__}: {_in_a_line(error)}"
        raise ValueError(f"model: {model}: its tokenizer cannot be read ({told}); get its files again") from None


def check_context(cfg: Config, config: Any) -> None:
    """Raise ValueError when prompt and response together are longer than the model can read."""
    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]  # one for all layers, or one a kind
    context *= max([kind.get("factor") or 1 for kind in kinds if kind.get("rope_type") in SCALED], default=1)
    whole = cfg.max_prompt_tokens + cfg.max_response_tokens
    if whole > context:
        raise ValueError(
            f"max_response_tokens: {cfg.max_response_tokens} with max_prompt_tokens {cfg.max_prompt_tokens} makes "
            f"{whole:,} tokens, the context of {cfg.model} is {int(context):,}; lower one of the two"
        )


def check_weights(model: str, config: Any, *, trust_remote_code: bool) -> None:
    """Raise ValueError when a folder's weights are not there, not whole, or not those that `config` describes.

    Of a hub id, what is not in the cache yet is passed over. Where names differ both ways, loading may rename them
    (a mixture of experts), and shapes alone are compared.
    """
    import torch
    from transformers import AutoModelForCausalLM

    files, is_local = weight_files(model), Path(model).is_dir()
    if is_local and not files:
        raise ValueError(f"model: {model} has no weights, neither {SAFE} nor {TORCH} nor an index of them")
    absent = [file for file in files if not file.is_file()]
    if absent and is_local:
        raise ValueError(f"model: {absent[0]}, which the index names, is not there; get the model's files again")
    stored: dict[str, list[int]] = {}
    for file in files if not absent else ():
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as tensors:
                    stored |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ValueError(f"model: {file} is not a whole safetensors file ({error}); get it again") from None
    if not stored:
        return
    try:
        with torch.device("meta"):
            described: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, RuntimeError, ArithmeticError) as error:  # of whatever model this is
        told = f"config.json describes no model that can be built ({type(error).__name__}: {_in_a_line(error)})"
        raise ValueError(f"model: {model}: {told}") from None
    needed = {name: list(weight.shape) for name, weight in described.named_parameters()}  # a tied head is not listed
    for name, shape in needed.items():
        if stored.get(name, shape) != shape:
            raise ValueError(
                f"model: {model}: {name} has the shape {stored[name]} in its file and {shape} by config.json "
                f"(vocab_size {config.get_text_config().vocab_size}, hidden_size "
                f"{config.get_text_config().hidden_size}); the two do not belong together"
            )
    missing = [name for name in needed if name not in stored]
    extra = [name for name in stored if name not in needed and "rotary" not in name]
    unread = described._keys_to_ignore_on_load_unexpected or ()
    layers = [name for name in extra if ".layers." in name and not any(re.search(each, name) for each in unread)]
    if missing and not extra:
        raise ValueError(f"model: {model} lacks {len(missing)} weights, such as {missing[0]}; get its files again")
    if layers and not missing:
        raise ValueError(
            f"model: {model} has {len(layers)} weights that config.json does not describe, such as {layers[0]}; the "
            "two do not belong together"
        )


def files_hash(model: str) -> str:
    """Short hash of a folder's configuration and weights; of a hub id the commit that is in the cache.

    Of each weights file: name, size, header and the first SAMPLE_BYTES of every weight. Neither dates nor the folder's
    own name count, so a copy is the same model. A change that keeps the beginning of every weight is not seen.
    """
    folder = _folder(model)
    if not Path(model).is_dir():
        return folder.name[:16]  # the snapshot's
    config = read_json_object(folder / "config.json")
    config = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(model):
        with path.open("rb") as file:
            found.update(f"{path.name} {path.stat().st_size}".encode())
            starts = [0, max(0, path.stat().st_size - SAMPLE_BYTES)]
            if path.suffix == ".safetensors":
                length = int.from_bytes(file.read(8), "little")
                header = file.read(length)
                found.update(header)
                weights = [each for name, each in json.loads(header).items() if name != "__metadata__"]
                starts = sorted(8 + length + each["data_offsets"][0] for each in weights)
            for start in starts:
                file.seek(start)
                found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()[:16]


def weight_files(model: str) -> list[Path]:
    """The files that hold the weights, as an index or their usual name says; they need not be there."""
    folder = _folder(model)
    for single in (SAFE, TORCH):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            names = read_json_object(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError(f"model: {index} has no weight_map from weights to files; get the file again")
            return [folder / name for name in sorted(set(names.values()))]
    return []


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).partition(" Errors:")[0].split())[:250]


def _folder(model: str) -> Path:
    """Where the files are: the folder itself, or the hub's snapshot in the cache."""
    from transformers.utils.hub import cached_file

    if Path(model).is_dir():
        return Path(model)
    path = cached_file(model, "config.json")
    assert path is not None, "raises where there is none"
    return Path(path).parent
