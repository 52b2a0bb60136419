"""Prompts that begin alike, packed so that a causal text encoder reads what they share once.

In a causal encoder an embedding depends on the tokens up to its own alone. So "a photo of a cat" and "a photo of a dog" have
all but their ends in common: together they are a tree, and a row of tokens in which every token sees its ancestors, at the
position that it has in its prompt, gives the embeddings of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedPrompts:
    """Rows of tokens that hold the beginnings of some prompts, each token once in a row; int64, with `sees` as an exception.

    `tokens`, `positions` [rows, width]: what is read, and where in its prompt it stands. `sees` [rows, width, width], bool:
    whether a token (second place) is read by another (first place). `rows` [prompts]: where a prompt is; `columns`
    [prompts, length]: where in its row its embeddings are, 0 past those that were asked for.
    """

    tokens: Tensor
    positions: Tensor
    sees: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], limit: int) -> PackedPrompts:
        """Pack the token ids of prompts into rows of at most `limit`, which is no less than the longest prompt."""
        order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
        ordered = [prompts[i] for i in order]
        shared = [0, *(_shared(one, other) for one, other in pairwise(ordered))]
        rows = _rows(ordered, shared, limit)
        longest = max(map(len, prompts))
        width = max(sum(len(new) for _, new in row) for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.int64, device="cpu")
        positions = torch.zeros_like(tokens)
        sees = torch.eye(width, dtype=torch.bool, device="cpu").repeat(len(rows), 1, 1)
        places = torch.zeros(len(prompts), dtype=torch.int64, device="cpu")
        columns: list[list[int]] = []
        for number, row in enumerate(rows):
            path: list[int] = []
            used = 0
            for kept, new in row:
                path = [*path[:kept], *range(used, used + len(new))]
                for depth, token in enumerate(new, kept):
                    tokens[number, used], positions[number, used] = token, depth
                    sees[number, used, path[: depth + 1]] = True
                    used += 1
                places[order[len(columns)]] = number
                columns.append(path + [0] * (longest - len(path)))
        back = sorted(range(len(order)), key=order.__getitem__)
        return cls(tokens, positions, sees, places, torch.tensor(columns, dtype=torch.int64, device="cpu")[back])


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


Row = list[tuple[int, Sequence[int]]]
"""Prompts of one row, in order: how many tokens each shares with the one before it, and its others."""


def _rows(prompts: Sequence[Sequence[int]], shared: Sequence[int], limit: int) -> list[Row]:
    """As few rows as the limit allows, and these as narrow as so many can be: all are computed as wide as the widest."""
    rows = list(_filled(prompts, shared, limit))
    low, high = max(map(len, prompts)), limit
    while low < high:
        middle = (low + high) // 2
        narrower = list(_filled(prompts, shared, middle))
        if len(narrower) > len(rows):
            low = middle + 1
        else:
            rows, high = narrower, middle
    return rows


def _filled(prompts: Sequence[Sequence[int]], shared: Sequence[int], limit: int) -> Iterator[Row]:
    """Rows of at most so many tokens, each filled before the next one is begun."""
    row, used = Row(), 0
    for prompt, kept in zip(prompts, shared, strict=True):
        if row and used + len(prompt) - kept > limit:
            yield row
            row, used = Row(), 0
        row.append((kept if row else 0, prompt[kept if row else 0 :]))
        used += len(row[-1][1])
    yield row
