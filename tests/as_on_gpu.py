"""Runs a program on a CPU with the code that vLLM runs on a GPU: `python tests/as_on_gpu.py train.py --config ...`

A GPU takes vLLM's second model runner, whose kernels are Triton's; vLLM's CPU build takes the first and repacks
matrices. Here Triton interprets the same kernels, slowly, and matrices stay as they are. Triton is in a folder of its
own outside the environment (`make .venv/triton`), since vLLM's CPU build is made to run without it.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRITON = ROOT / ".venv" / "triton"


class Backend:
    class driver:
        @staticmethod
        def is_active() -> bool:
            return True


def prepare() -> None:
    """Before the first import of vLLM."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    sys.path[:0] = [str(ROOT), str(TRITON)]
    from triton.backends import backends  # pyright: ignore[reportMissingImports]

    backends.clear()
    backends["cpu"] = Backend
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False


if __name__ == "__main__":
    prepare()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
