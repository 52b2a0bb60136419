"""URLs are shown without credentials, in whatever part of them these are."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from overpaint.core.errors import OverpaintError
from overpaint.core.names import printed, printed_url, reported, typed_path
from overpaint.registry.store import open_files, place_store


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/shared/folder@home", "/shared/folder@home"),
        ("s3://bucket/a/path", "s3://bucket/a/path"),
        ("http://[::1]:8000/a@b", "http://[::1]:8000/a@b"),
        ("s3://KEY:SECRET@bucket/path", "s3://***@bucket/path"),
        ("s3://KEY:SEC/RET@bucket/path", "s3://***@bucket/path"),
        ("https://SECRET@host/path", "https://***@host/path"),
        ("http://user:SEC@RET@host", "http://***@host"),
        ("http://user:SEC?RET@host", "http://***@?***"),
        ("https://host/path?X-Signature=SECRET&versionId=3", "https://host/path?X-Signature=***&versionId=3"),
        ("https://host/path?SECRET#SECRET", "https://host/path?***&***"),
        ("simplecache::s3://KEY:SECRET@bucket", "simplecache::s3://***@bucket"),
        ("zip://a.zip::http://u:SECRET@host/b", "zip://a.zip::http://***@host/b"),
        ("postgresql://ann:SECRET@host/db", "postgresql://ann:***@host/db"),
        (
            "postgresql://ann@host/db?password=SECRET&sslmode=require",
            "postgresql://ann@host/db?password=***&sslmode=require",
        ),
    ],
)
def test_a_url_is_shown_without_credentials(url: str, shown: str) -> None:
    assert printed_url(url) == shown


def test_a_text_loses_the_credentials_of_urls_and_those_that_stand_alone() -> None:
    text = 'no bucket "KEY:SECRET@bucket" at http://user:OTHER@host/a?token=THIRD; SECRET is wrong'
    shown = printed(text, "s3://KEY:SECRET@bucket")
    assert not any(secret in shown for secret in ("KEY", "SECRET", "OTHER", "THIRD"))
    assert "http://***@host/a?token=***" in shown


def test_a_place_out_of_reach_is_named_without_its_credentials() -> None:
    files = open_files("http://user:hunter22@127.0.0.1:9/place?signature=hunter33")
    with pytest.raises(OverpaintError) as caught:
        files.write("oci-layout", [b"{}"])
    assert "127.0.0.1:9/place" in str(caught.value)
    assert "hunter" not in f"{caught.value}{files.where}{files!r}"
    with pytest.raises(OverpaintError) as caught:
        open_files("nosuch://user:hunter22@host/place")
    assert "hunter" not in str(caught.value)


def test_a_pointer_with_credentials_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    place_store(tmp_path, "memory://user:hunter22@host/secret")
    assert (tmp_path / "blobs.url").read_text() == "memory://user:hunter22@host/secret\n"
    assert stat.S_IMODE((tmp_path / "blobs.url").stat().st_mode) == 0o600
    assert not list(tmp_path.glob(".tmp-*"))


def test_what_others_report_is_one_printable_line_without_credentials() -> None:
    text = "\x1b[31mno\x07\r\n\tway \u202e" + "s3://ada:secret@bucket " + "x" * 10_000
    shown = reported(text)
    assert shown.startswith("*[31mno* way *s3://***@bucket xxx")
    assert shown.isprintable()
    assert len(shown) < 320
    assert reported("404 topsecret", "https://ada:topsecret@host") == "404 ***"


def test_a_file_url_is_the_path_that_it_names(tmp_path: Path) -> None:
    """As `Path.as_uri` writes it; a folder whose name has a percent sign is found as it is written."""
    assert open_files((tmp_path / "a b").as_uri()).where == str(tmp_path / "a b")
    assert open_files(f"file://{tmp_path}/a b").where == str(tmp_path / "a b")
    (tmp_path / "a%20b").mkdir()
    assert open_files(f"file://{tmp_path}/a%20b").where == str(tmp_path / "a%20b")
    assert open_files(f"{tmp_path}/c%20d").where == str(tmp_path / "c%20d")
    with pytest.raises(OverpaintError, match="too long"):
        open_files(f"file:///{'b' * 5000}")


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_url_is_no_path_and_its_password_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_type: type[str] | type[Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OverpaintError, match="s3:// begins a URL") as caught:
        typed_path(as_type("s3://KEY:SECRET@bucket/x"))
    assert "SECRET" not in str(caught.value)
    (tmp_path / "s3:").mkdir()
    assert typed_path(as_type("s3:/x")) == tmp_path / "s3:" / "x"
    assert typed_path("s3:") == tmp_path / "s3:"
    with pytest.raises(OverpaintError, match="simplecache::s3:// begins a URL") as caught:
        typed_path(as_type("simplecache::s3://KEY:SECRET@bucket/x"))
    assert "SECRET" not in str(caught.value)
    assert typed_path("c:/x") == tmp_path / "c:" / "x"
