"""Every random number of a training as a pure function of (seed, stage, step): a resumed run draws the same ones.

Always drawn on the CPU, so that a seed means the same on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import gcd

import torch


def generator(seed: int, stage: int, step: int, purpose: str) -> torch.Generator:
    """A generator of its own for one use in one step."""
    return torch.Generator().manual_seed(number(seed, stage, step, purpose))


def number(seed: int, stage: int, step: int, purpose: str) -> int:
    """63 bits that depend on all arguments."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def noise(shape: tuple[int, ...], seed: int, stage: int, step: int, purpose: str = "noise") -> torch.Tensor:
    """Standard normal, float32."""
    return torch.randn(shape, generator=generator(seed, stage, step, purpose))


def timesteps(count: int, levels: int, seed: int, stage: int, step: int, *, purpose: str = "timesteps") -> torch.Tensor:
    """``count`` whole numbers in [0, ``levels``), each uniform by itself, one in each of ``count`` equal parts.

    A batch that covers all noise levels has a steadier gradient than one that drew them by chance (the low-discrepancy
    sampler of Kingma et al. 2021, "Variational diffusion models").
    """
    random = generator(seed, stage, step, purpose)
    parts = torch.randperm(count, generator=random)
    return ((parts + torch.rand(count, generator=random)) * levels / count).long().clamp(max=levels - 1)


def shares(count: int, seed: int, stage: int, step: int, *, purpose: str) -> torch.Tensor:
    """``count`` numbers in [0, 1), each uniform by itself, one in each of ``count`` equal parts; (count,), float32."""
    random = generator(seed, stage, step, purpose)
    parts = torch.randperm(count, generator=random)
    return (parts + torch.rand(count, generator=random)) / count


def pictures_of_step(
    pictures: int, batch: int, seed: int, stage: int, step: int, *, purpose: str = "order"
) -> list[int]:
    """Which pictures a step sees: every picture once an epoch, in an order of the epoch's own.

    Args:
        pictures: how many there are.
        batch: how many a step takes.
        seed: the run's.
        stage: 1 or 2.
        step: counted from 0 within the stage.
        purpose: pictures of another purpose come in another order.
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(position, pictures)
        if epoch not in orders:
            orders[epoch] = torch.randperm(pictures, generator=generator(seed, stage, epoch, purpose)).tolist()
        chosen.append(orders[epoch][index])
    return chosen


def group_of_step(sizes: Sequence[int], seed: int, stage: int, step: int) -> tuple[int, int]:
    """Which group of pictures a step sees, and how many steps before it saw that group.

    A round of steps sees each group as often as its share of the pictures says, in an order of the round's own; it is
    the shortest round that can. So every picture comes as often as every other, and no step mixes groups.

    Args:
        sizes: how many pictures each group has, at least one.
        seed: the run's.
        stage: 1 or 2.
        step: counted from 0 within the stage.
    """
    shares = [size // gcd(*sizes) for size in sizes]
    turns = [group for group, share in enumerate(shares) for _ in range(share)]
    number_of_round, position = divmod(step, len(turns))
    order = torch.randperm(len(turns), generator=generator(seed, stage, number_of_round, "groups"))
    before = [turns[turn] for turn in order[: position + 1].tolist()]
    group = before.pop()
    return group, number_of_round * shares[group] + before.count(group)
