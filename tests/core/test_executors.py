from __future__ import annotations

import pytest

from overpaint.core.errors import OverpaintError
from overpaint.core.executors import InProcess, Piece, Resources, open_executor

from .executor_pieces import double, fail, refuse


def test_pieces_in_this_process_come_one_after_the_other() -> None:
    results = InProcess().results([Piece(str(i), double, (i,)) for i in range(3)], 10, Resources())
    assert [(result.index, result.value) for result in results] == [(0, 0), (1, 10), (2, 20)]


def test_a_refused_piece_is_a_result_and_the_others_go_on() -> None:
    pieces = [Piece("refused", refuse), Piece("fine", double, (1,))]
    results = list(InProcess().results(pieces, 1, Resources()))
    assert [(result.value, result.error) for result in results] == [(None, "this piece is refused"), (1, "")]


def test_a_fault_in_this_process_is_not_hidden() -> None:
    with pytest.raises(KeyError):
        list(InProcess().results([Piece("faulty", fail)], None, Resources()))


def test_progress_names_the_piece_that_runs() -> None:
    reports: list[str] = []
    list(
        InProcess().results(
            [Piece("solving cat", double, (1,))], 1, Resources(), lambda a, b, text: reports.append(text)
        )
    )
    assert reports == ["solving cat"]


def test_an_unknown_place_is_refused_in_a_sentence() -> None:
    with pytest.raises(OverpaintError, match=r"got 'slurm' as the place to run on; ray is a cluster"):
        open_executor("slurm")
    assert isinstance(open_executor(), InProcess)


def test_a_cluster_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def late(**settings: object) -> None:
        raise Exception("The current node timed out during startup.\nSee the log.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(OverpaintError, match="no Ray cluster can be used at this machine: The current node timed out"):
        open_executor("ray")
