"""A repository on the Hugging Face Hub as the place of a layout: `hf://USER/REPO[@REVISION]`, by `huggingface_hub`.

What is written is kept on this machine until the list of contents is: then all of it becomes one commit, on top of the
commit that was read, or none.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from overpaint.core.errors import OverpaintError
from overpaint.core.names import reported
from overpaint.registry.files import FileInfo, Unreachable, checked_parts, too_long
from overpaint.registry.sharing.documents import Descriptor, members_of, read_document

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(
    rf"(?i:hf)://(?P<repo>(?!(?:datasets|spaces|buckets)/){_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?"
)
CARD = "README.md"
LONGEST_CARD = 1 << 20
OURS = b"library_name: overpaint"
"""By this a card is known as one that a push wrote, and may write again."""

Beside: TypeAlias = Callable[[Sequence[Descriptor]], Mapping[str, bytes]]
"""The files, by name, that a commit has beside a layout with these entries."""


def is_hub(location: str | Path) -> bool:
    """Whether a location is `hf://USER/REPO`; a folder in a repository, or one of data sets, is read by `fsspec`."""
    return isinstance(location, str) and _REPOSITORY.fullmatch(location) is not None


@dataclass(frozen=True)
class _Commit:
    """A commit of a repository, and the size of each file in it; no commit where there is no repository."""

    oid: str
    sizes: Mapping[str, int]


class HubFiles:
    """The layout in a repository on the Hub.

    The login is huggingface_hub's (`hf auth login`, or HF_TOKEN), the Hub that of HF_ENDPOINT. A repository that is not there
    is made by a push, as a private one. `beside` gives the card and what other programs load.
    """

    documents = "blobs/sha256"

    def __init__(self, url: str, *, beside: Beside = lambda entries: {}) -> None:
        match = _REPOSITORY.fullmatch(url)
        assert match is not None, "see is_hub"
        self._repo, self._revision = match["repo"], match["revision"] or "main"
        self.where = url
        self._beside = beside
        self._lock = threading.Lock()
        self._known: _Commit | None = None
        self._connected: HfApi | None = None
        self._folder: Path | None = None
        self._pending: dict[str, Path] = {}

    def read(self, name: str, *, limit: int | None = None) -> bytes | None:
        size = self._size(name)
        if size is None:
            return None
        if limit is not None and size > limit:
            raise too_long(f"{name} in {self.where}", size, limit)
        return self._pending[name].read_bytes() if name in self._pending else self._download(name)

    def info(self, name: str) -> FileInfo | None:
        size = self._size(name)
        return None if size is None else FileInfo(name, size, 0.0)

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None:
        with self._lock:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="overpaint-hub-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder.joinpath(*checked_parts(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        self._pending[name] = path
        if name == "index.json":
            self._commit()

    def exclusive(self) -> AbstractContextManager[bool]:
        """Nobody can be kept waiting by the Hub."""
        return nullcontext(False)

    def _size(self, name: str) -> int | None:
        if name in self._pending:
            return self._pending[name].stat().st_size
        return self._commit_read().sizes.get(name)

    def _commit_read(self) -> _Commit:
        """The commit that the revision stands for when it is first asked for; all is read from that one."""
        from huggingface_hub.errors import RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        with self._lock:
            if self._known is None:
                with self._plain():
                    try:
                        oid = self._api.model_info(self._repo, revision=self._revision).sha
                        tree = self._api.list_repo_tree(self._repo, recursive=True, revision=oid)
                        self._known = _Commit(
                            str(oid), {each.path: each.size for each in tree if isinstance(each, RepoFile)}
                        )
                    except RepositoryNotFoundError as error:
                        if _status(error) == 401:  # it is not there, or not for everybody
                            raise self._no_login() from None
                        self._known = _Commit("", {})
            return self._known

    def _download(self, name: str) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        commit = self._commit_read()
        size = commit.sizes[name]
        url = hf_hub_url(self._repo, name, revision=commit.oid, endpoint=self._api.endpoint)
        headers = build_hf_headers(token=self._api.token)
        data = bytearray()
        with self._plain(), get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            for piece in response.iter_bytes(1 << 20):
                data += piece
                if len(data) > size:
                    raise too_long(f"{name} in {self.where}", len(data), size)
        return bytes(data)

    def _commit(self) -> None:
        """Commit what was written, unless the branch has moved since it was read: the layout then looks again, and merges."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import HfHubHTTPError

        index, before = self._pending["index.json"].read_bytes(), self._commit_read()
        unchanged = len(self._pending) == 1 and before.sizes.get("index.json") == len(index)
        if unchanged and self._download("index.json") == index:
            return
        files: dict[str, Path | bytes] = {**self._pending}
        files |= self._beside(members_of(read_document(index, self.where), self.where))
        card = before.sizes.get(CARD, 0)
        if CARD in files and card and (card > LONGEST_CARD or OURS not in self._download(CARD)):
            del files[CARD]  # somebody's own words stay
        with self._plain():
            if not before.oid:
                self._api.create_repo(self._repo, private=True, exist_ok=True)
                before = _Commit(str(self._api.model_info(self._repo).sha), {})
            operations = [
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in sorted(files.items())
            ]
            try:
                self._api.create_commit(
                    self._repo,
                    operations,
                    commit_message="Patches by Overpaint",
                    revision=self._revision,
                    parent_commit=before.oid,
                )
            except HfHubHTTPError as error:
                if error.response.status_code != 412:
                    raise
                del self._pending["index.json"]
            else:
                self._pending.clear()
        self._known = None

    @property
    def _api(self) -> HfApi:
        if self._connected is None:
            try:
                from huggingface_hub import HfApi
            except ImportError:
                raise OverpaintError(
                    "hf:// needs the package huggingface_hub; run `pip install 'overpaint[hub]'`"
                ) from None
            self._connected = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="overpaint")
        return self._connected

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Turn what the Hub and its client say into one error."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalTokenNotFoundError,
            RevisionNotFoundError,
        )

        try:
            yield
        except RevisionNotFoundError:
            raise Unreachable(
                f"{self.where} has no revision {self._revision!r}; name a branch, a tag or a commit of it"
            ) from None
        except (GatedRepoError, LocalTokenNotFoundError):
            raise self._no_login() from None
        except HfHubHTTPError as error:
            if _status(error) in (401, 403):
                raise self._no_login() from None
            reason = reported(f"{_status(error)} {error.server_message or ''}".strip())
            raise Unreachable(f"{self.where} refused this ({reason}); nothing was committed there") from None
        except OverpaintError:
            raise
        except Exception as error:  # of whichever HTTP client this version of huggingface_hub has
            reason = reported(str(error)) or type(error).__name__
            raise Unreachable(f"{self.where} cannot be used ({reason}); check the address and the network") from None

    def _no_login(self) -> Unreachable:
        return Unreachable(
            f"the Hub does not let this user do that in {self.where}; log in with `hf auth login` as somebody who may, with a "
            "token that may write where you push. Nothing was committed"
        )


def _status(error: Any) -> int:
    return int(getattr(error.response, "status_code", 0) or 0)
