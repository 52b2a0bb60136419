"""Files in the memory of this process: for tests, and for trying things out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from overpaint.registry.store.files import FileInfo, Files, checked_parts, too_long


class MemoryFiles(Files):
    """Files that are gone when the object is."""

    where = "memory"

    def __init__(self) -> None:
        self._content: dict[str, tuple[bytes, float]] = {}

    def read(self, name: str, *, limit: int | None = None) -> bytes | None:
        data, _ = self._content.get(_checked(name), (None, 0.0))
        if data is not None and limit is not None and len(data) > limit:
            raise too_long(name, len(data), limit)
        return data

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None:
        self._content[_checked(name)] = b"".join(chunks), time.time()

    def info(self, name: str) -> FileInfo | None:
        if _checked(name) not in self._content:
            return None
        data, modified = self._content[name]
        return FileInfo(name, len(data), modified)

    def refresh(self, name: str) -> bool:
        if _checked(name) not in self._content:
            return False
        self._content[name] = self._content[name][0], time.time()
        return True

    def walk(self, folder: str) -> Iterator[FileInfo]:
        below = f"{_checked(folder)}/"
        for name, (data, modified) in list(self._content.items()):
            if name.startswith(below):
                yield FileInfo(name, len(data), modified)

    def move(self, name: str, to: str) -> None:
        self._content[_checked(to)] = self._content.pop(_checked(name))

    def remove(self, name: str) -> None:
        self._content.pop(_checked(name), None)


def _checked(name: str) -> str:
    checked_parts(name)
    return name
