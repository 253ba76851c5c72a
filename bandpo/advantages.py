"""What an answer is worth beside the other answers to its prompt."""

from torch import Tensor


def group_advantages(rewards: Tensor, kind: str) -> Tensor:
    """(B, G) advantages of (B, G) floating rewards, each row a group of at least two.

    group_std   (r - mean) / (std + 1e-6), std with G - 1: GRPO, arXiv 2402.03300
    group_mean  r - mean: Dr. GRPO, arXiv 2503.20783
    rloo        r - mean of the others: arXiv 2402.14740
    maxrl       (r - mean) / mean, 0 where no answer is right: MaxRL, arXiv 2602.02710, algorithm 1; for rewards from
                0 to 1: on groups of G it climbs log p to order G - 1, and a prompt rarely solved weighs the most

    Raises ValueError for an unknown kind, and for a negative reward with maxrl.
    """
    mean = rewards.mean(dim=1, keepdim=True)
    centred = rewards - mean
    if kind == "group_std":
        return centred / (rewards.std(dim=1, keepdim=True) + 1e-6)
    if kind == "group_mean":
        return centred
    if kind == "rloo":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    if kind != "maxrl":
        raise ValueError(f"advantage: {kind!r} is not known; use group_std, group_mean, rloo or maxrl")
    if (rewards < 0).any():
        raise ValueError(
            f"advantage: maxrl divides by the mean reward, which must not be negative, and a reward is "
            f"{rewards.min():.4g}; use rewards from 0 to 1 (reward_wrong: 0), or another advantage"
        )
    return centred / mean.where(mean > 0, 1.0)
