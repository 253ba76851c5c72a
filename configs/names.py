"""Which files a configuration's name stands for: one, or a model and a method of this folder.

    find("qwen3b_band.yaml", [CONFIG_DIR, Path()])     # [models/qwen3b.yaml, methods/band.yaml]

MODEL_METHOD.yaml and MODEL.yaml are looked up as if they were files of this folder. A file that exists comes first,
so an exception for one model and method is a file of their name that inherits that name. METHOD is a file of methods/
or a rule: the rule alone with its published values, without dual clip.
"""

from collections.abc import Sequence
from pathlib import Path

CONFIG_DIR = Path(__file__).resolve().parent
# Rules that need no file in methods/; those of bandpo/rules.py, which imports torch.
RULES = "abc acpo band_asymmetric bapo ce_gppo cispo clip_cov dgpo gppo gspo kl_cov ripo sapo up".split()


def stems(kind: str) -> list[str]:
    """The names of the files in `kind`: models, methods, or "" for this folder itself."""
    return sorted(path.stem for path in (CONFIG_DIR / kind).glob("*.yaml"))


def composed() -> dict[str, list[Path]]:
    """NAME -> the files to read one after another, for every model, and every model with every method."""
    models = {name: CONFIG_DIR / "models" / f"{name}.yaml" for name in stems("models")}
    methods = {name: CONFIG_DIR / "methods" / f"{name}.yaml" for name in [*stems("methods"), *RULES]}
    pairs = {f"{model}_{method}": [models[model], methods[method]] for model in models for method in methods}
    return {name: [path] for name, path in models.items()} | pairs


def config_names() -> list[str]:
    """Every NAME that `--config NAME.yaml` finds in this folder."""
    return sorted({*stems(""), *composed()})


def find(name: str, folders: Sequence[Path], but: Path | None = None) -> list[Path]:
    """The files that `name` stands for, in the order in which they are read; empty when there are none.

    name: with or without .yaml, a path or looked up in `folders` one after another. but: a file that is no answer; what
    inherits its own name means what it stands in for.
    """
    for path in (folder / name for folder in folders):
        try:
            for candidate in (path, path.with_name(f"{path.name}.yaml")):
                if candidate.is_file() and candidate.resolve() != but:
                    return [candidate.resolve()]
            found = composed().get(path.name.removesuffix(".yaml"))
            if found and path.parent.resolve() == CONFIG_DIR:
                return found
        except (OSError, ValueError):  # what no file system takes: too long, a zero byte, no name at all
            return []
    return []


def label(path: Path) -> str:
    """What messages call a file: models/qwen3b.yaml for one of this folder, else its name alone."""
    return path.relative_to(CONFIG_DIR).as_posix() if path.is_relative_to(CONFIG_DIR) else path.name
