"""The upkeep of a registry on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from overpaint.cli import main
from overpaint.registry import Registry, upkeep
from overpaint.registry.upkeep import verify

from .patch_maker import keep, patch_file
from .store_contract import name_of


@pytest.fixture
def shelf(registry: Registry) -> Registry:
    keep(registry, patch_file("one"))
    return registry


def run(registry: Registry, *words: str) -> Result:
    return CliRunner().invoke(main, ["--registry", str(registry.folder), *words], catch_exceptions=False)


def rows(found: Result) -> list[dict[str, object]]:
    read: list[dict[str, object]] = json.loads(found.stdout)
    return read


def test_verify_reports_success_with_exit_code_0(shelf: Registry) -> None:
    found = run(shelf, "verify")
    assert found.exit_code == 0
    assert "1 patches, 3 blobs" in found.stderr
    assert "all as it was" in found.stderr
    assert rows(run(shelf, "verify", "--json")) == []


def test_verify_names_what_is_wrong_with_exit_code_1(shelf: Registry) -> None:
    record = shelf.patches()[0]
    digest = next(digest for digest in shelf.blobs.digests() if digest != record.id)
    path = shelf.folder / name_of(digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    found = run(shelf, "verify", "--json")
    assert found.exit_code == 1
    (row,) = rows(found)
    assert (row["patch"], row["concept"], row["part"]) == (record.id, "apple", "array")
    assert str(row["tensor"]).startswith("text_encoder/")
    assert digest in str(row["problem"])
    again = run(shelf, "verify")
    assert again.exit_code == 1, "it is in quarantine now, and missing"
    assert record.id[:12] in again.stdout


def test_gc_reports_first_and_removes_then(shelf: Registry) -> None:
    garbage = shelf.blobs.put(b"garbage")
    os.utime(shelf.folder / name_of(garbage), (0, 0))
    young = shelf.blobs.put(b"young")
    dry = run(shelf, "gc", "--dry-run", "--json")
    assert rows(dry) == [{"blob": garbage, "bytes": 7}]
    assert "1 would be removed, 7 bytes" in dry.stderr
    assert shelf.blobs.exists(garbage)
    done = run(shelf, "gc")
    assert done.exit_code == 0
    assert garbage[:12] in done.stdout
    assert "3 blobs are needed; 1 are not, but younger than 14 days" in done.stderr
    assert "1 removed, 7 bytes" in done.stderr
    assert not shelf.blobs.exists(garbage)
    assert shelf.blobs.exists(young)
    assert run(shelf, "gc", "--grace", "0").exit_code == 0
    assert not shelf.blobs.exists(young)
    assert run(shelf, "gc", "--grace", "-1").exit_code == 2


def test_a_backup_comes_back(shelf: Registry, tmp_path: Path) -> None:
    file = str(tmp_path / "copy.db")
    assert "backed up" in run(shelf, "db", "backup", file).stdout
    assert "is there already" in run(shelf, "db", "backup", file).stderr
    keep(shelf, patch_file("two"))
    restored = run(shelf, "db", "restore", file)
    assert restored.exit_code == 0
    assert "before-restore" in restored.stdout
    assert [shelf.blob(record) for record in shelf.patches()] == [patch_file("one")]
    assert run(shelf, "db", "restore", str(tmp_path / "nothing.db")).exit_code == 1


def test_the_same_on_each_kind_of_database(either: Registry) -> None:
    record = keep(either, patch_file("one"))
    garbage = either.blobs.put(b"garbage")
    os.utime(either.folder / name_of(garbage), (0, 0))
    assert verify(either).problems == ()
    assert upkeep.collect(either, upkeep.plan_collection(either)).removed == 1
    either.blobs.discard(record.id)
    (problem,) = verify(either).problems
    assert (problem.patch, problem.concept) == (record.id, "apple")


def test_upkeep_imports_no_torch(shelf: Registry, tmp_path: Path) -> None:
    for words in (["verify"], ["gc"], ["db", "backup", str(tmp_path / "b")], ["push", str(tmp_path / "p")], ["--help"]):
        call = ["--registry", str(shelf.folder), *words]
        code = f"import sys; from overpaint.cli import main; main({call!r}, standalone_mode=False)"
        found = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], capture_output=True)
        assert found.returncode == 0, (words, found.stderr)
