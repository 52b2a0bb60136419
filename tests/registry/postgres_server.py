"""A real PostgreSQL server in a temporary folder, reached by a socket in it: no port, no password, no trace."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from urllib.parse import quote

USER = "overpaint"
GUEST = "guest"
PASSWORD = "p@ss:w/rd"
"""Of the guest, the only one who needs one; with every character that a URL must spell otherwise."""

# A test's server need not survive a power cut.
SETTINGS = "-c fsync=off -c full_page_writes=off -c listen_addresses='' -c max_connections=60 -c shared_buffers=16MB"


def programs() -> Path | None:
    """The folder with `initdb` and `pg_ctl`, which Debian keeps off the PATH; None where there is no server."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = shutil.which("initdb") or (installed and str(installed[-1]))
    return Path(found).parent if found else None


class Server:
    """A running server and the databases that were made on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = count(1)

    def create(self, options: str = "") -> str:
        """Make an empty database and return its name."""
        name = f"registry_{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name} {options}")
        return name

    def url(self, name: str, blobs: Path, *, user: str = USER, password: str = "") -> str:
        """What `Registry.open` takes."""
        who = f"{user}:{quote(password, safe='')}" if password else user
        return f"postgresql://{who}@/{name}?host={quote(str(self.folder), safe='')}&blobs={quote(str(blobs), safe='')}"

    def run(self, sql: str, *, database: str = "postgres") -> None:
        """Run statements as the owner of the server."""
        import psycopg

        with psycopg.connect(host=str(self.folder), dbname=database, user=USER, autocommit=True) as connection:
            connection.execute(sql.encode())  # text would have to be a literal


# Waits for the end of its input, which comes when the tests close it or die; then nothing of the server stays.
WATCH = 'while read -r line; do :; done; "$1" -D "$2/data" -m immediate stop; rm -rf "$2"'


@contextmanager
def running(bin: Path) -> Iterator[Server]:
    """A server that runs as long as the block, or as long as this process if that is killed."""
    folder = Path(tempfile.mkdtemp(prefix="overpaint-pg-", dir="/tmp"))  # a socket's path has at most 107 bytes
    owner, data = _owner(), str(folder / "data")
    if owner:
        shutil.chown(folder, owner)
    watch = ["sh", "-c", WATCH, "watch", str(bin / "pg_ctl"), str(folder)]
    silent = subprocess.DEVNULL
    with subprocess.Popen(watch, cwd="/", stdin=subprocess.PIPE, stdout=silent, stderr=silent, user=owner):
        _call(owner, folder, bin / "initdb", "-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync")
        (folder / "data" / "pg_hba.conf").write_text(f"local all {GUEST} scram-sha-256\nlocal all all trust\n")
        options = f"{SETTINGS} -c unix_socket_directories='{folder}'"
        _call(owner, folder, bin / "pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        server = Server(folder)
        server.run(f"CREATE ROLE {GUEST} LOGIN PASSWORD '{PASSWORD}'")
        yield server


def _owner() -> str | None:
    """Somebody who is not root, because the server refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {user.pw_name for user in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _call(owner: str | None, folder: Path, *words: str | Path) -> None:
    # Output goes to a file: pg_ctl's child would keep a pipe open for as long as it runs.
    with tempfile.TemporaryFile() as output:
        found = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, user=owner)
        output.seek(0)
        assert found.returncode == 0, f"{words[0]}: {output.read().decode('utf-8', 'replace')}"
