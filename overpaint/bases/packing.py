"""Prompts that begin alike, packed so that a causal text encoder reads what they share once.

In a causal encoder an embedding depends on the tokens up to its own alone. So "a photo of a cat" and "a photo of a dog" have
all but their ends in common: together they are a tree, and a row of tokens in which every token sees its ancestors, at the
position that it has in its prompt, gives the embeddings of both. And where embeddings are asked for from the subject on, what
stands before it is read once for all subjects: of its tokens, the keys and values of every attention layer are kept
(`PrefixStates`), and later rows attend to them as to tokens of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Prefix = tuple[int, ...]
"""Token ids with which a prompt begins."""


@dataclass(frozen=True, eq=False)
class PackedPrompts:
    """Rows of tokens that hold some prompts, each token that they share once in a row.

    `tokens`, `positions`, int64 [rows, width]: what is read, and where in its prompt it stands. `sees`, bool [rows, width, read
    before + width]: which tokens (last place) a token (second place) reads. `rows`, int64 [prompts]: where a prompt is;
    `columns`, int64 [prompts, length]: where in its row its embeddings are; a 0 before its start or past its end means nothing.
    """

    tokens: Tensor
    positions: Tensor
    sees: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[Prefix], limit: int, starts: Sequence[int] = (), before: PrefixStates | None = None
    ) -> PackedPrompts:
        """Pack the token ids of prompts into rows of at most `limit`, which is no less than the longest prompt.

        Of each prompt, `starts` tokens are a prefix that was read `before`; they are in no row.
        """
        split = [
            (prompt[:start], prompt[start:])
            for prompt, start in zip(prompts, starts or [0] * len(prompts), strict=True)
        ]
        order = sorted(range(len(split)), key=split.__getitem__)
        rows = _rows([split[i] for i in order], limit)
        known, width = before.count if before else 0, max(sum(len(new) for _, _, new in row) for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.int64, device="cpu")
        positions = torch.zeros_like(tokens)
        sees = torch.zeros(len(rows), width, known + width, dtype=torch.bool, device="cpu")
        sees[:, :, known:] = torch.eye(width, dtype=torch.bool, device="cpu")  # what fills a row sees itself
        places = torch.zeros(len(split), dtype=torch.int64, device="cpu")
        columns = torch.zeros(len(split), max(map(len, prompts)), dtype=torch.int64, device="cpu")
        prompt = iter(order)
        for number, row in enumerate(rows):
            path: list[int] = []
            used = 0
            for prefix, kept, new in row:
                path = [*path[:kept], *range(used, used + len(new))]
                earlier = before.columns[prefix] if before else []
                for depth, token in enumerate(new, kept):
                    tokens[number, used], positions[number, used] = token, len(prefix) + depth
                    sees[number, used, [*earlier, *(known + column for column in path[: depth + 1])]] = True
                    used += 1
                which = next(prompt)
                places[which] = number
                columns[which, len(prefix) : len(prefix) + len(path)] = torch.tensor(path, device="cpu")
        return cls(tokens, positions, sees, places, columns)


Row = list[tuple[Prefix, int, Sequence[int]]]
"""Prompts of one row, in order: the prefix of each, how many more tokens it shares with the one before it, and its others."""


def _rows(prompts: Sequence[tuple[Prefix, Sequence[int]]], limit: int) -> list[Row]:
    """As few rows as the limit allows, and these as narrow as so many can be: all are computed as wide as the widest."""
    shared = [0, *(_shared(one, other) for one, other in pairwise(prompts))]
    rows = list(_filled(prompts, shared, limit))
    low, high = max(len(rest) for _, rest in prompts), limit
    while low < high:
        middle = (low + high) // 2
        narrower = list(_filled(prompts, shared, middle))
        if len(narrower) > len(rows):
            low = middle + 1
        else:
            rows, high = narrower, middle
    return rows


def _shared(one: tuple[Prefix, Sequence[int]], other: tuple[Prefix, Sequence[int]]) -> int:
    """How many tokens two prompts begin with alike after the same prefix."""
    if one[0] != other[0]:
        return 0
    return common_prefix(one[1], other[1])


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _filled(prompts: Sequence[tuple[Prefix, Sequence[int]]], shared: Sequence[int], limit: int) -> Iterator[Row]:
    """Rows of at most so many tokens, each filled before the next one is begun."""
    row: Row = []
    used = 0
    for (prefix, rest), kept in zip(prompts, shared, strict=True):
        if row and used + len(rest) - kept > limit:
            yield row
            row, used = [], 0
        kept = kept if row else 0
        row.append((prefix, kept, rest[kept:]))
        used += len(rest) - kept
    yield row


KeysAndValues = tuple[Tensor, Tensor]
"""Of one attention layer: [rows, heads, tokens, width of a head] each."""


class PrefixStates:
    """Of every attention layer the keys and values of some prefixes' tokens; `columns` has each prefix's tokens among them.

    `forward` reads them in one row of at most `limit` tokens, which has room for all `prefixes`.
    """

    def __init__(self, prefixes: Sequence[Prefix], limit: int, forward: Callable[[PackedPrompts], Any]) -> None:
        packed = PackedPrompts.of(prefixes, limit)
        paths = packed.columns.tolist()
        self.columns: Mapping[Prefix, list[int]] = {
            prefix: path[: len(prefix)] for prefix, path in zip(prefixes, paths, strict=True)
        }
        self.count = packed.tokens.shape[1]
        self._layers: list[KeysAndValues] = []

        def keep(key: Tensor, value: Tensor) -> KeysAndValues:
            self._layers.append((key.clone(), value.clone()))
            return key, value

        with _turned(keep):
            forward(packed)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(each.nbytes for pair in self._layers for each in pair)

    @contextmanager
    def read_before(self) -> Iterator[None]:
        """Within the block, every row of tokens that one forward pass reads attends to these tokens first."""
        layers = iter(self._layers)

        def extended(key: Tensor, value: Tensor) -> KeysAndValues:
            before = next(layers)
            both = (
                torch.cat([kept.expand(len(own), -1, -1, -1), own], 2)
                for kept, own in zip(before, (key, value), strict=True)
            )
            return next(both), next(both)

        with _turned(extended):
            yield


ATTENTION = "overpaint"
"""What transformers calls the attention below."""
_turn: ContextVar[Callable[[Tensor, Tensor], KeysAndValues] | None] = ContextVar("turn", default=None)


@contextmanager
def _turned(turn: Callable[[Tensor, Tensor], KeysAndValues]) -> Iterator[None]:
    """Within the block, models that are `attending` attend to what `turn` makes of each layer's keys and values."""
    token = _turn.set(turn)
    try:
        yield
    finally:
        _turn.reset(token)


@contextmanager
def attending(layers: nn.ModuleList) -> Iterator[None]:
    """Within the block, the layers of a text encoder attend by the mask that they are given, and as `PrefixStates` asks."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    first: Any = layers[0]
    config = first.self_attn.config
    former = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = former


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    if turn := _turn.get():
        key, value = turn(key, value)
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None
