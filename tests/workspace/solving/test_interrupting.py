"""Ctrl-C in a real process: exit code 130, one sentence, a registry that is whole, and a second run that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import overpaint
from overpaint.registry.upkeep import verify
from overpaint.workspace.solving import deferring_interrupts
from overpaint.workspace.workspace import Workspace

RUN = """
import sys
from overpaint.solvers import SOLVERS
SOLVERS["lingering"] = "tests.workspace.solving.lingering:Lingering"
from overpaint.cli import main
main()
"""


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C as a shell's foreground has it: a job that was started in the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def command(registry: Path, file: Path, marker: Path) -> subprocess.Popen[str]:
    """`overpaint solve` in a process of its own, as a shell starts one."""
    words = ["--registry", str(registry), "solve", "--from", str(file), "--base", "tiny", "--json"]
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LINGERING": str(marker)},
        cwd=Path(__file__).parents[3],
    )


def test_ctrl_c_leaves_a_whole_registry_and_the_next_run_goes_on(workspace: Workspace, tmp_path: Path) -> None:
    file, marker = tmp_path / "concepts.yaml", tmp_path / "marker"
    file.write_text("defaults: {solver: lingering}\nconcepts: [cat, dog, sun]")
    process = command(tmp_path / "registry", file, marker)
    deadline = time.monotonic() + 300
    while not marker.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never came to the second concept"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert (
        said.strip().splitlines()[-1]
        == "interrupted: 1 of 3 are solved and stored; run the same command again for the rest"
    )
    assert out == ""
    registry = overpaint.open(tmp_path / "registry").registry
    assert [patch.concept for patch in registry.patches()] == ["cat"]
    assert verify(registry).problems == ()
    assert list(registry.blobs.leftovers()) == []

    rest = command(tmp_path / "registry", file, marker)
    out, said = rest.communicate(timeout=300)
    assert rest.returncode == 0, said
    assert [(row["concept"], row["solved"]) for row in json.loads(out)] == [
        ("cat", "before"),
        ("dog", "now"),
        ("sun", "now"),
    ]


def store(done: list[str], interrupts: int) -> None:
    with deferring_interrupts():
        for _ in range(interrupts):
            signal.raise_signal(signal.SIGINT)
        done.append("stored")


def test_what_is_being_stored_is_stored_before_ctrl_c_counts() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        store(done, interrupts=1)
    assert done == ["stored"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        store(done, interrupts=2)
    assert done == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_while_storing_is_reported() -> None:
    with pytest.raises(OSError, match="full"), deferring_interrupts():
        raise OSError("full")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_handler_of_ctrl_c_is_left_alone() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with deferring_interrupts():
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_stores_without_ado() -> None:
    done: list[str] = []

    def work() -> None:
        with deferring_interrupts():
            done.append("stored")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["stored"]
