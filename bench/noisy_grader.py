"""A reward that is wrong three times in ten, for docs/atlas.md. Also an example of a reward of one's own."""

from zlib import crc32


def noisy(completion: str, gold: str, prompt: str) -> float:
    """Whether the boxed answer is right, turned round for three in ten of all pairs of prompt and answer."""
    right = completion.rpartition("\\boxed{")[2] == f"{gold}}}"
    turned = crc32(f"{prompt}{completion}".encode()) % 10 < 3
    return float(right != turned)
