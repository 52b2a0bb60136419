"""`docs/teams.md` works as it stands: its blocks are run in order, on a PostgreSQL server and an S3 server of our own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner

from overpaint.cli import main

from .postgres_server import USER, Server

PAGE = Path(__file__).parents[2] / "docs" / "teams.md"
BLOCK = re.compile(r"```sh\n# (administrator|owner|ada|bob)(: this is refused)?\n(.*?)```", re.DOTALL)

EMPTIED = """
    DROP SCHEMA public CASCADE;
    CREATE SCHEMA public AUTHORIZATION pg_database_owner;
    GRANT USAGE ON SCHEMA public TO public
"""
"""What leaves a database as `createdb` makes it."""


class Person:
    """Runs the lines of a page: `overpaint` within this process, other programs as they are."""

    def __init__(self, server: Server, bucket: str, base: Path, folder: Path) -> None:
        self.environment = {"HOME": str(folder), "PGHOST": str(server.folder), "PGUSER": USER}
        self.replaced = {"s3://team-patches": bucket, "./model": str(base)}
        self.folder = folder

    def run(self, line: str) -> tuple[int, str]:
        """The exit code of a line and what it said."""
        for old, new in self.replaced.items():
            line = line.replace(old, new)
        words = [re.sub(r"\$(\w+)", lambda name: self.environment[name[1]], word) for word in shlex.split(line)]
        words = [self.environment["PGHOST"] if word == "db.example.com" else word for word in words]
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self.environment[name] = value.replace("@db.example.com/", "@/") + f"&host={self.environment['PGHOST']}"
            return 0, ""
        if words[0] == "overpaint":
            found = CliRunner().invoke(main, words[1:], env=self.environment)
            return found.exit_code, found.output
        if words[:3] == ["aws", "s3", "sync"]:
            copy(words[3], words[4], self.folder)
            return 0, ""
        done = subprocess.run(
            words, cwd=self.folder, env={**os.environ, **self.environment}, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr


def copy(source: str, target: str, folder: Path) -> None:
    """What `aws s3 sync` does between a bucket and a folder that has nothing else."""
    s3, local = fsspec.filesystem("s3"), folder / next(each for each in (source, target) if each.startswith("./"))
    if source.startswith("s3://"):
        s3.get(source, str(local), recursive=True)
        return
    for path in local.rglob("*"):
        if path.is_file():
            s3.pipe_file(f"{target}/{path.relative_to(local)}", path.read_bytes())


def blocks() -> Iterator[tuple[str, bool, list[str]]]:
    """Who runs what, and whether it is refused."""
    for who, fails, text in BLOCK.findall(PAGE.read_text("utf-8")):
        yield who, bool(fails), [line for line in text.splitlines() if line.strip()]


def test_the_page_for_teams_works_as_it_stands(
    server: Server, bucket: str, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    people: dict[str, Person] = {}
    restoring = 0
    for who, refused, lines in blocks():
        person = people.setdefault(who, Person(server, bucket, base_folder, tmp_path))
        for line in lines:
            if line.startswith("aws s3 sync ./blobs-backup"):  # all is lost
                restoring += 1
                fsspec.filesystem("s3").rm(f"{bucket}/registry", recursive=True)
                server.run(EMPTIED, database="overpaint")
            code, output = person.run(line)
            assert (code != 0) == refused, f"{who}: {line}\n{output}"
            assert not refused or "read-only for this user" in output, output
    assert restoring == 1
    assert {"administrator", "owner", "ada", "bob"} == set(people)
    code, output = people["bob"].run("overpaint recipe log safe")
    assert (code, "takedown of Monday" in output) == (0, True)
