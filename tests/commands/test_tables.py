"""Tables as people and other programs read them: short ids, 80 columns, one line for each row of a pipe."""

from __future__ import annotations

import io
import re
from datetime import datetime
from pathlib import Path

import pytest

from overpaint.commands.common import show_table
from tests.shell import Shell

ID = "0123456789ab" + "c" * 52
WHOLE = re.compile(r"[0-9a-f]{64}")


class FakeTerminal(io.StringIO):
    """A terminal of 80 columns."""

    def isatty(self) -> bool:
        return True


LOG = ["revision", "when", "who", "did", "concept", "strength", "until", "why", "weights"]
LINE = [
    12,
    datetime(2026, 11, 29, 8, 30),
    "alexandra",
    "checkout of safe@11",
    "van gogh",
    1.0,
    "2027-01-31",
    "a takedown",
    ID,
]


def test_a_table_fits_80_columns_and_keeps_ids_and_days_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = FakeTerminal()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", terminal)
    show_table("History of safe", [*LOG, "patch"], [[*LINE, ID]], False, asked=["weights"])
    monkeypatch.undo()
    text = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert max(map(len, text.splitlines())) <= 80
    assert "2026-11-29 08:30" in text
    assert "2027-01-31" in text
    assert ID[:12] in text
    assert not WHOLE.search(text)


def test_digests_are_whole_only_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("History", LOG, [LINE], False, asked=["weights"])
    assert ID[:12] not in capsys.readouterr().out
    show_table("History", LOG, [LINE], False, asked=["weights"], digests=True)
    assert ID in capsys.readouterr().out


def test_a_row_is_one_line_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show_table("Problems", ["part", "problem"], [["blob", "word " * 60], ["array", "x" * 300]], False)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.strip()]) == 5
    assert "x" * 300 in lines[-1]


def test_an_empty_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("Bases", ["name"], [], False)
    assert capsys.readouterr().out == "Bases: none\n"


def test_no_table_of_a_registry_shows_a_whole_id_unasked(tmp_path: Path, base_folder: Path) -> None:
    shell = Shell(tmp_path / "registry")
    shell.ok("base", "add", "tiny", str(base_folder))
    shell.ok("solve", "cat", "--base", "tiny")
    added = shell.ok("patch", "add", "cat", "--expires", "2999-01-31")
    tagged = shell.ok("tag", "add", "pets", "--patch", "cat")
    shown = {
        words: shell.ok(*words)
        for words in (
            ("base", "list"),
            ("base", "show", "tiny"),
            ("concept", "show", "cat"),
            ("patch", "list"),
            ("patch", "show", "cat"),
            ("recipe", "list"),
            ("recipe", "show"),
            ("recipe", "log"),
            ("recipe", "diff", "default@0", "default"),
            ("recipe", "expired", "--on", "2999-01-31"),
            ("tag", "list"),
            ("search", "cat"),
            ("solve", "cat", "--base", "tiny", "--dry-run"),
        )
    }
    assert not [words for words, text in shown.items() if WHOLE.search(text)]
    assert not WHOLE.search(added + tagged)
    id = WHOLE.search(shell.ok("patch", "list", "--digests"))
    assert id is not None
    for words, text in shown.items():
        if words[0] not in ("base", "recipe") or words[1] in ("show", "diff", "expired"):
            assert id[0][:12] in text or words == ("base", "show", "tiny"), words
    undone = shell.ok("undo")
    assert "cat" in undone
    assert "these are the weights of revision 0, bit for bit" in undone
