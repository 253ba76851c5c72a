"""Imports of large libraries, which are most of a start: as quick as they can be.

@quick_imports()
def load_task(...):
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Few garbage collections meanwhile: imports make no garbage, and looking for it is a sixth of their time."""
    usual = gc.get_threshold()
    gc.set_threshold(100_000)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
