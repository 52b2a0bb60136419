"""Files behind any URL that `fsspec` knows: S3 and its kin, a server, another program's storage."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from ftplib import FTP
from typing import Any

from overpaint.core.errors import OverpaintError
from overpaint.core.urls import printed_url, reported
from overpaint.registry.store.files import FileInfo, Files, checked_parts, too_long

# An object store shows an object when all of it is there. Elsewhere a file is visible while it is being written, so
# there it is written under another name first.
WHOLE_AT_ONCE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "memory"}
EXTRAS = {"s3": 'pip install "overpaint[s3]"', "s3a": 'pip install "overpaint[s3]"'}
TIMES = ("mtime", "LastModified", "last_modified", "modified", "updated", "created")


class Unreachable(OverpaintError):
    """A place behind a URL that does not answer, or refuses."""


class RemoteFiles(Files):
    """The files below a URL. Credentials come from where the URL's own package looks for them."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        scheme = scheme.lower()
        self._url = url = f"{scheme}://{rest}"
        self.where = printed_url(url).rstrip("/")
        self._at_once = scheme in WHOLE_AT_ONCE
        try:
            import fsspec  # type: ignore[import-untyped]

            # Listings are never taken from a cache: other programs write here too.
            if scheme == "ftp":  # what fsspec's destructor closes, also where no connection came about
                fsspec.get_filesystem_class(scheme).ftp = FTP()
            self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            hint = EXTRAS.get(scheme, "install the package that `fsspec` names for it")
            reason = reported(str(error), url)
            raise OverpaintError(f"{scheme}:// cannot be reached ({reason}); {hint}, or name a folder") from None
        except Exception as error:  # some packages connect as soon as they are asked for
            raise self._unreachable(error) from None
        self._root = str(root).rstrip("/")

    def read(self, name: str, *, limit: int | None = None) -> bytes | None:
        path = self._path(name)
        with self._looking_for(name):
            if limit is not None:
                nbytes = self._fs.info(path)["size"]
                if nbytes is None:  # a server that does not say
                    with self._fs.open(path, "rb") as file:
                        data = bytes(file.read(limit + 1))
                    if len(data) <= limit:
                        return data
                    nbytes = len(data)
                if nbytes > limit:
                    raise too_long(f"{self.where}/{name}", nbytes, limit)
            return bytes(self._fs.cat_file(path))
        return None

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None:
        data = b"".join(chunks)
        path = self._path(name)
        temporary = path if self._at_once else f"{path}.tmp-{secrets.token_hex(8)}"
        with self._plain(name):
            self._make_folder(path)
            self._fs.pipe_file(temporary, data)
            written = int(self._fs.info(temporary)["size"])
            if written != len(data):
                raise OSError(f"{written} bytes are there instead of {len(data)}")
            if not self._at_once:
                self._fs.mv(temporary, path)

    def info(self, name: str) -> FileInfo | None:
        with self._looking_for(name):
            info = self._fs.info(self._path(name))
            if info["type"] == "file":
                return FileInfo(name, int(info["size"]), self._modified(info))
        return None

    def refresh(self, name: str) -> bool:
        return self.info(name) is not None  # what an object store has acknowledged is durable

    def walk(self, folder: str) -> Iterator[FileInfo]:
        entries: dict[str, Any] = {}
        # An object store lists everything in one go; elsewhere a folder that cannot be listed would be left out.
        all_or_nothing = {} if self._at_once else {"on_error": "raise"}
        with self._looking_for(folder):
            entries = self._fs.find(self._path(folder), detail=True, **all_or_nothing)
        for path, entry in entries.items():
            name = str(path).removeprefix(self._root).strip("/")
            yield FileInfo(name, int(entry["size"]), self._modified(entry))

    def move(self, name: str, to: str) -> None:
        target = self._path(to)
        with self._plain(name):
            self._make_folder(target)
            self._fs.mv(self._path(name), target)

    def remove(self, name: str) -> None:
        with self._looking_for(name):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return "/".join([self._root, *checked_parts(name)])

    def _make_folder(self, path: str) -> None:
        if not self._at_once:  # an object store has none, and s3fs would make a bucket
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _modified(self, entry: dict[str, Any]) -> float:
        for key in TIMES:
            value = entry.get(key)
            if isinstance(value, datetime):
                return value.timestamp()
            if isinstance(value, (int, float)):
                return float(value)
        moment: datetime = self._fs.modified(entry["name"])
        return moment.timestamp()

    @contextmanager
    def _plain(self, name: str) -> Iterator[None]:
        """Turn what the many packages behind `fsspec` raise into one error."""
        try:
            yield
        except OverpaintError:
            raise
        except Exception as error:  # each package has errors of its own, with no common root
            raise self._unreachable(error, f" for {name}") from None  # the cause may hold the credentials

    @contextmanager
    def _looking_for(self, name: str) -> Iterator[None]:
        """The same, where a file that is not there is no error."""
        with self._plain(name):
            try:
                yield
            except FileNotFoundError as error:
                if not _is_missing(error.__cause__):
                    raise (error.__cause__ or error) from None

    def _unreachable(self, error: Exception, purpose: str = "") -> Unreachable:
        reason = reported(str(error), self._url) or type(error).__name__
        if isinstance(error, NotImplementedError):
            reason = "this kind of place can only be read"
        return Unreachable(
            f"{self.where} cannot be used{purpose} ({reason}); check the address, the network and your credentials"
        )


def _is_missing(cause: BaseException | None) -> bool:
    """Whether a place said that a file is missing: `fsspec` says so too when nobody answered, or with another refusal."""
    if type(cause).__module__.startswith("aiohttp"):
        return getattr(cause, "status", None) == 404
    return isinstance(cause, FileNotFoundError) or not isinstance(cause, (OSError, ValueError, asyncio.TimeoutError))
