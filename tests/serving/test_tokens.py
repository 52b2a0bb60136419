"""Tokens of a server: digests in a file, roles that include each other, revoked at once."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from overpaint.cli import main
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.serving.access import BadTokens, TokenFile
from overpaint.workspace.workspace import Workspace


def test_a_token_is_found_by_its_text_and_stored_as_a_digest(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path)
    text = tokens.add("Ada", "generate", ["safe"])
    assert text not in tokens.path.read_text()
    found = TokenFile(tmp_path).find(text)
    assert found is not None
    assert (found.owner, found.role, found.recipes) == ("Ada", "generate", ("safe",))
    assert tokens.find(text + "x") is None
    assert tokens.find("") is None
    assert tokens.find("\ud800") is None
    if os.name != "nt":
        assert stat.S_IMODE(tokens.path.stat().st_mode) == 0o600


def test_a_role_includes_those_below_it(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path)
    found = tokens.find(tokens.add("Ada", "generate"))
    assert found is not None
    assert found.allows("read")
    assert found.allows("generate")
    assert not found.allows("change")


def test_a_revoked_token_is_refused_by_whoever_read_the_file_before(tmp_path: Path) -> None:
    tokens, other = TokenFile(tmp_path), TokenFile(tmp_path)
    first, second, third = tokens.add("Ada", "read"), tokens.add("Ada", "change"), tokens.add("Bob", "read")
    found = other.find(first)
    assert found is not None
    tokens.revoke(found.id)
    assert other.find(first) is None
    assert [each.role for each in tokens.revoke("Ada")] == ["change"]
    assert other.find(second) is None
    assert other.find(third) is not None
    with pytest.raises(NotFound, match="Bob"):
        tokens.revoke("Bop")


def test_a_damaged_file_of_tokens_lets_nobody_in(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path)
    text = tokens.add("Ada", "read")
    tokens.path.write_text(tokens.path.read_text().replace('"read"', '"root"'))
    for content in (tokens.path.read_bytes(), b"{", b"[]", b"\xff"):
        tokens.path.write_bytes(content)
        with pytest.raises(OverpaintError, match="cannot be read"):
            tokens.find(text)


WIDENED: list[dict[str, Any]] = [
    {"recipes": "safe"},
    {"recipes": ""},
    {"recipes": {}},
    {"recipes": [""]},
    {"recipes": [["safe"]]},
    {"recipes": None},
    {"role": ["change"]},
    {"role": "root"},
    {"owner": 5},
    {"owner": None},
    {"created": 0},
    {"sha256": "\u00e9" + 63 * "0"},
    {"sha256": 64 * "0" + "\n"},
    {"sha256": ""},
    {"sha256": [0]},
]
"""Wrong values of a stored token."""


@pytest.mark.parametrize("wrong", WIDENED, ids=str)
def test_a_stored_token_of_wrong_types_allows_nothing(tmp_path: Path, wrong: dict[str, Any]) -> None:
    tokens = TokenFile(tmp_path)
    text = tokens.add("Ada", "generate", ["safe"])
    (stored,) = json.loads(tokens.path.read_text())["tokens"]
    for listed in ([{**stored, **wrong}], [{name: stored[name] for name in stored if name not in wrong}], [5]):
        tokens.path.write_text(json.dumps({"tokens": listed}, ensure_ascii=False))
        with pytest.raises(BadTokens, match=r"tokens.json cannot be read \(token 1 needs an owner"):
            tokens.find(text)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b'{"tokens": null}', b'{"tokens": "abc"}', b"[" * 100_000, b"\xff"]
)
def test_a_file_that_is_no_list_of_tokens_is_named_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    tokens = TokenFile(tmp_path)
    tokens.path.write_bytes(content)
    with pytest.raises(BadTokens, match=r"tokens\.json cannot be read"):
        tokens.tokens()


@pytest.mark.skipif(os.name == "nt", reason="access rights of POSIX")
def test_a_file_that_everybody_may_write_is_refused_until_its_rights_are_mended(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path)
    text = tokens.add("Ada", "read")
    tokens.path.chmod(0o666)
    with pytest.raises(BadTokens, match=r"every user of this machine may write .*`chmod o-w .*tokens.json`"):
        tokens.find(text)
    tokens.path.chmod(0o660)
    assert tokens.find(text) is not None


def test_tokens_are_made_listed_and_revoked_by_commands(workspace: Workspace) -> None:
    def overpaint(*words: str) -> str:
        done = CliRunner().invoke(main, ["--registry", str(workspace.registry.folder), "token", *words])
        assert done.exit_code == 0, done.output
        return done.stdout

    text = overpaint("new", "Ada", "--role", "generate", "--recipe", "cat").strip()
    found = TokenFile(workspace.registry.folder).find(text)
    assert found is not None
    listed = overpaint("list")
    assert found.id in listed
    assert "Ada" in listed
    assert text not in listed
    assert "revoked" in overpaint("revoke", found.id)
    assert overpaint("list").strip() == "Tokens: none"
