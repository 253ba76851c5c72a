"""List the configurations of this folder; needs no GPU, model or network.

python -m configs                                            # models, methods and other files
python -m configs --options                                  # every option, as in docs/configs.md
python train.py --config NAME.yaml --dry_run                 # check a config, print batch sizes and memory
WORLD_SIZE=8 python train.py --config NAME.yaml --dry_run    # the same for a run on 8 processes
"""

import sys

from configs.load import option_list
from configs.names import CONFIG_DIR, RULES, stems
from configs.schema import Config


def first_sentence(kind: str, name: str) -> str:
    """Return the first sentence of a file's comment."""
    line = (CONFIG_DIR / kind / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("# ").partition(". ")[0].rstrip(".")


def listing() -> str:
    """List models, methods and other files with the first sentence of each."""
    lines = ["train.py --config MODEL_METHOD.yaml, or any other of these names"]
    for title, kind in (("models", "models"), ("methods", "methods"), ("other", "")):
        lines += ["", title, *(f"  {name:<18} {first_sentence(kind, name)}" for name in stems(kind))]
    lines += ["", "rules as methods, with their published values", f"  {', '.join(RULES)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(option_list(Config) if sys.argv[1:] == ["--options"] else listing())
