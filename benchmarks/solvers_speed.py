"""Closed-form steps at Stable Diffusion's size, d = 768 and 77 tokens: SepME's null space, and the edits, without encoding.

Embeddings are random numbers with one common begin-of-text, which is the hardest case: they have full rank. The symbolic
elimination that SepME's authors use (`sympy.Matrix.nullspace`) is measured on a much smaller stack where SymPy is installed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables import arguments, save, show
from overpaint.solvers.closed_form.edits import free_of, least_squares, revived

WIDTH, LENGTH = 768, 77


def prompts(count: int, width: int = WIDTH, length: int = LENGTH) -> Tensor:
    """Embeddings [count, length, width] of prompts that share begin-of-text."""
    rng = torch.Generator().manual_seed(count)
    begin = 30 * torch.randn(1, 1, width, generator=rng)
    return torch.cat([begin.expand(count, -1, -1), torch.randn(count, length - 1, width, generator=rng)], 1)


def timed(rounds: int, work: Callable[[], Any]) -> float:
    """The median of `rounds` runs, in seconds, after one that is not counted."""
    work()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def rows(rounds: int) -> Iterator[Sequence[Any]]:
    """Step, size, seconds, and the bar where there is one."""
    for others in (1, 5, 9):
        stack = prompts(1 + others)
        free = free_of(stack)[0].shape[1]
        bar = 1.0 if others == 5 else None
        yield (
            f"SepME null space, {others} other concepts",
            f"{free} free",
            timed(rounds, lambda s=stack: free_of(s)),
            bar,
        )
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(WIDTH, 2 * WIDTH, generator=rng, dtype=torch.float64)
    moment = root @ root.T / WIDTH
    for concepts in (1, 100, 1000):
        keys = torch.randn(WIDTH, concepts, generator=rng, dtype=torch.float64)
        ways = torch.randn(WIDTH, concepts, generator=rng, dtype=torch.float64)
        solve = lambda k=keys, w=ways: least_squares(k, w, moment)  # noqa: E731
        edit, _ = solve()
        yield f"UCE, {concepts} last tokens jointly", f"rank {edit.up.shape[1]}", timed(rounds, solve), None
    edit, _ = least_squares(keys[:, :1], ways[:, :1], moment)
    eye, many = torch.eye(WIDTH, dtype=torch.float64), keys[:, :LENGTH]
    yield (
        "RECE, embeddings that revive",
        f"{LENGTH} keys",
        timed(rounds, lambda: revived(edit, moment, eye, many)),
        None,
    )
    if find_spec("sympy") is not None:
        import sympy

        small = prompts(1, 24, 8)[0].double().tolist()
        yield "the same symbolically", "8 x 24", timed(1, lambda: sympy.Matrix(small).nullspace()), None


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=3, help="how often each step is timed")
    chosen = parser.parse_args()
    columns = ("step", "what", "seconds", "bar")
    title = f"Closed forms at d = {WIDTH}, {LENGTH} tokens, {torch.get_num_threads()} threads"
    save(chosen.json, show(title, columns, list(rows(chosen.rounds))))


if __name__ == "__main__":
    main()
