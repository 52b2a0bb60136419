"""Pictures that wait: grouped by what is applied, in a fair order, within limits."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from overpaint.serving.drawing import MOST_IN_A_ROW, Drawn, PatchSet, PictureQueue, PictureRequest, QueueFull, Stopping


class Easel:
    """Draws nothing, once `go` is set, and remembers in which order it was asked to."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.began, self.go = threading.Event(), threading.Event()

    def draw(self, wanted: PictureRequest) -> Drawn:
        self.began.set()
        assert self.go.wait(10)
        if wanted.prompt == "broken":
            raise ValueError("broken")
        self.order.append(wanted.prompt)
        return Drawn(np.zeros((1, 1, 3), np.uint8), "", PatchSet(()), wanted, 1.0)


@pytest.fixture
def easel() -> Easel:
    return Easel()


@pytest.fixture
def queue(easel: Easel) -> Iterator[PictureQueue]:
    queue = PictureQueue(easel.draw, 200)
    queue.start()
    yield queue
    easel.go.set()
    queue.stop()


def wanted(key: str, count: int = 1) -> list[tuple[PictureRequest, PatchSet]]:
    """Pictures under one patch."""
    return [(PictureRequest(key, 0), PatchSet(((key, 1.0),)))] * count


def test_pictures_under_the_same_patches_are_drawn_together(queue: PictureQueue, easel: Easel) -> None:
    futures = [future for key in "abcabcabc" for future in queue.put(wanted(key))]
    easel.go.set()
    for future in futures:
        future.result(10)
    assert "".join(easel.order) == "aaabbbccc"


def test_nobody_waits_longer_than_a_run_of_each_set_before(queue: PictureQueue, easel: Easel) -> None:
    futures = [*queue.put(wanted("a", 2 * MOST_IN_A_ROW)), *queue.put(wanted("b", 2)), *queue.put(wanted("c"))]
    easel.go.set()
    for future in futures:
        future.result(10)
    order = "".join(easel.order)
    assert order.index("b") <= 2 * MOST_IN_A_ROW
    late = PictureQueue(easel.draw, 200)
    waiting = [late.put(wanted("a", MOST_IN_A_ROW)), late.put(wanted("b")), late.put(wanted("a", MOST_IN_A_ROW))]
    easel.order.clear()
    late.start()
    for futures in waiting:
        for future in futures:
            future.result(10)
    assert "".join(easel.order).index("b") == MOST_IN_A_ROW
    late.stop()


def test_a_full_queue_takes_all_pictures_of_a_request_or_none(easel: Easel) -> None:
    queue = PictureQueue(easel.draw, 3)
    queue.put(wanted("a", 2))
    with pytest.raises(QueueFull, match="2 pictures wait already, and at most 3 may") as refused:
        queue.put(wanted("b", 2))
    assert refused.value.seconds >= 1
    assert len(queue) == 2
    queue.put(wanted("b"))


def test_what_nobody_waits_for_any_more_is_not_drawn(queue: PictureQueue, easel: Easel) -> None:
    first, second, third = (queue.put(wanted(key))[0] for key in "abc")
    assert easel.began.wait(10)
    assert second.cancel()
    easel.go.set()
    first.result(10), third.result(10)
    assert easel.order == ["a", "c"]


def test_one_that_fails_leaves_the_others_alone(queue: PictureQueue, easel: Easel) -> None:
    broken, sound = queue.put(wanted("broken"))[0], queue.put(wanted("a"))[0]
    easel.go.set()
    with pytest.raises(ValueError, match="broken"):
        broken.result(10)
    assert sound.result(10).wanted.prompt == "a"


def test_stopping_finishes_what_is_drawn_and_answers_who_waits(queue: PictureQueue, easel: Easel) -> None:
    drawing = queue.put(wanted("a"))[0]
    assert easel.began.wait(10)
    waiting = queue.put(wanted("b"))[0]
    threading.Timer(0.2, easel.go.set).start()
    queue.stop()
    assert drawing.result(0).wanted.prompt == "a"
    with pytest.raises(Stopping):
        waiting.result(0)
    with pytest.raises(Stopping):
        queue.put(wanted("a"))
    assert not queue.is_alive
