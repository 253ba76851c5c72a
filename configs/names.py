"""Resolution of a configuration's name to files: one file, or a model and a method of this folder.

    find("qwen3b_band.yaml", [CONFIG_DIR, Path()])     # [models/qwen3b.yaml, methods/band.yaml]

MODEL_METHOD.yaml and MODEL.yaml are looked up like files of this folder. An existing file takes precedence. It can
inherit its own name, to change one pair of model and method. METHOD is a file of methods/ or a rule, which then has its
published values and no dual clip.
"""

from collections.abc import Sequence
from pathlib import Path

CONFIG_DIR = Path(__file__).resolve().parent
# Rules of bandpo/rules.py without a file in methods/. Listed here, because importing bandpo/rules.py imports torch.
RULES = "abc acpo band_asymmetric bapo ce_gppo cispo clip_cov dgpo gppo gspo kl_cov ripo sapo up".split()


def stems(kind: str) -> list[str]:
    """List the file stems in `kind`: models, methods, or "" for this folder."""
    return sorted(path.stem for path in (CONFIG_DIR / kind).glob("*.yaml"))


def composed() -> dict[str, list[Path]]:
    """Return NAME -> files in reading order, for every model, and every pair of model and method."""
    models = {name: CONFIG_DIR / "models" / f"{name}.yaml" for name in stems("models")}
    methods = {name: CONFIG_DIR / "methods" / f"{name}.yaml" for name in [*stems("methods"), *RULES]}
    pairs = {f"{model}_{method}": [models[model], methods[method]] for model in models for method in methods}
    return {name: [path] for name, path in models.items()} | pairs


def config_names() -> list[str]:
    """List every NAME that `--config NAME.yaml` finds in this folder."""
    return sorted({*stems(""), *composed()})


def find(name: str, folders: Sequence[Path], but: Path | None = None) -> list[Path]:
    """Return the files of `name` in reading order; [] if there are none.

    name: a path, or a name to look up in `folders` in order; `.yaml` is optional. but: a file to skip, because a file
    that inherits its own name refers to the composed configuration.
    """
    for path in (folder / name for folder in folders):
        try:
            for candidate in (path, path.with_name(f"{path.name}.yaml")):
                if candidate.is_file() and candidate.resolve() != but:
                    return [candidate.resolve()]
            files = composed().get(path.name.removesuffix(".yaml"))
            if files and path.parent.resolve() == CONFIG_DIR:
                return files
        except (OSError, ValueError):  # invalid as a path: too long, a zero byte, empty
            return []
    return []


def label(path: Path) -> str:
    """Return a file's name for messages: models/qwen3b.yaml for a file of this folder, else only the file name."""
    return path.relative_to(CONFIG_DIR).as_posix() if path.is_relative_to(CONFIG_DIR) else path.name
