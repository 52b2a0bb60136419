"""Progress in a terminal: one line as wide as it is, which goes when the work ends; next to nothing in a log."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from overpaint.commands.common import Terminal

TEXT = "drawing a rather long description of what is being done: van gogh [blue] 3/8"


class Screen(io.StringIO):
    """A terminal of 40 columns that keeps every frame it ever showed."""

    WIDTH = 40

    def __init__(self) -> None:
        super().__init__()
        self.lines = [""]
        self.row = self.column = 0
        self.frames: list[list[str]] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", text):
            if piece == "\n":
                self._down()
                self.column = 0
            elif piece == "\r":
                self.column = 0
            elif piece == "\x1b[2K":
                self.lines[self.row] = ""
            elif piece.endswith("A"):
                self.row -= int(piece[2:-1] or 1)
            elif not piece.startswith("\x1b"):
                if self.column == self.WIDTH:
                    self._down()
                    self.column = 0
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + piece + line[self.column + 1 :]
                self.column += 1
        self.frames.append(list(self.lines))
        return len(text)

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")

    @property
    def left(self) -> list[str]:
        return [line.rstrip() for line in self.lines if line.strip()]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)
    return Screen()


def terminal_on(screen: Screen) -> Terminal:
    return Terminal(Console(file=screen, force_terminal=True, width=Screen.WIDTH, color_system=None))


def test_progress_takes_one_line_of_a_narrow_terminal_and_leaves_no_trail(screen: Screen) -> None:
    with terminal_on(screen) as terminal:
        for step in range(6):
            terminal.progress(step, 5, TEXT)
            time.sleep(0.3)
    drawn = [frame for frame in screen.frames if any(line.strip() for line in frame)]
    assert drawn
    assert max(sum(bool(line.strip()) for line in frame) for frame in drawn) == 1
    assert any("drawing" in line and re.search(r"[1-4]/5 +\d+:\d\d", line) for frame in drawn for line in frame)
    assert screen.left == []


def test_another_piece_of_work_begins_its_time_anew(screen: Screen) -> None:
    with terminal_on(screen) as terminal:
        terminal.progress(4, 5, "solving")
        terminal.progress(0, 100, "drawing")
        assert terminal._bar is not None
        (task,) = terminal._bar.tasks
        assert (task.completed, task.total, task.description, task.speed) == (0, 100, "drawing", None)


def test_a_note_stands_where_the_progress_was(screen: Screen, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_on(screen) as terminal:
        terminal.progress(1, 5, TEXT)
        terminal.note("a damaged picture was drawn again")
        assert screen.left == []
    assert capsys.readouterr().err == "a damaged picture was drawn again\n"


def test_a_pipe_sees_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Terminal() as terminal:
        for step in range(200):
            now += 1.0
            terminal.progress(step, 200, "drawing")
    assert capsys.readouterr().err == "60/200 drawing\n121/200 drawing\n182/200 drawing\n"
