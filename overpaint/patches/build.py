"""Build: a custom checkpoint with a composition baked in, of the base's own form, beside which nothing leaks.

A diffusers folder gives a folder, a single file a single file, unless the other form is asked for (`conversion`); layout,
dtypes and untouched bytes stay. Weight files are streamed, second copies of a patched weight are left out with notice
(`duplicate_weights`), the recipe and the digests are recorded in the headers (`build_record`), and everything appears whole
or not at all.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.checkpoint import TensorLocation, open_weights
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import BrokenFile, SafetensorsFile, raw_bytes, tensor_digest
from overpaint.bases.virtual_checkpoint import VirtualCheckpoint
from overpaint.core.atomic import atomic_output, refuse_taken, write_new
from overpaint.core.encoding import KEY, TensorEntry, combined_digest, header_bytes
from overpaint.core.errors import OverpaintError
from overpaint.core.names import typed_path
from overpaint.core.reporting import Progress, silent
from overpaint.patches.build_record import metadata_with, record_of, with_digests
from overpaint.patches.compose import CompositionPlan, Term, plan
from overpaint.patches.conversion import Form, configuration, converted, form_of, index_bytes
from overpaint.patches.duplicate_weights import Survey, survey

# A weight file written again with some tensors replaced and others left out, in one pass, at the speed of a copy.
#
# The header comes first: everything in it has a known length, so its digests are filled in at the end. Tensors follow in
# file order. What is between two changed tensors is copied by the kernel as one piece, and a file system that can share
# blocks shares them; memory holds one changed tensor at a time.


CHUNK = 8 << 20
BLOCK = 4096
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Rewrite:
    """How a file is written again: where each tensor to replace is, by canonical name, and the keys to leave out."""

    source: SafetensorsFile
    replaced: Mapping[str, TensorLocation]
    dropped: frozenset[str] = field(default_factory=frozenset)

    def header(self, record: Mapping[str, Any]) -> bytes:
        """The new header with its length in front. Records that differ in digests alone give equal lengths."""
        kept = ((key, e.dtype, e.shape) for key, e in self.source.entries.items() if key not in self.dropped)
        # Whole blocks apart from where they were, bytes can be shared or copied page by page.
        start, metadata = self.source.data_start - 8, metadata_with(self.source.metadata, record)
        return header_bytes(metadata, kept, multiple=BLOCK, rest=start % BLOCK, sort=False)

    def write(self, target: Path, record: Mapping[str, Any], value: Callable[[str], Tensor]) -> dict[str, str]:
        """Write a new file; returns the digest of each new value by canonical name, which `write_record` needs."""
        digests = {}
        with ExitStack() as opened:
            source = self.source
            reader = None
            if not isinstance(source, VirtualCheckpoint):
                reader = opened.enter_context(source.path.open("rb", buffering=0))
            writer = opened.enter_context(target.open("xb", buffering=0))
            head = self.header(record)
            write_all(writer, head, 0)
            position = len(head)
            for name, start, size in self._pieces():
                if name is not None:
                    tensor = value(name)
                    assert tensor.nbytes == size, name
                    digests[name] = tensor_digest(name, tensor)
                    write_all(writer, raw_bytes(self.replaced[name].stored(tensor)), position)
                elif isinstance(source, VirtualCheckpoint):
                    copy_gathered(source, writer, start, position, size)
                elif reader is not None:
                    copy_range(reader, writer, start, position, size)
                position += size
        return digests

    def write_record(self, target: Path, record: Mapping[str, Any]) -> None:
        """Write the header again, with a record that has the true digests in place of equally long ones."""
        head = self.header(record)
        with target.open("r+b", buffering=0) as writer:
            assert writer.read(8) == head[:8]
            write_all(writer, head, 0)

    def _pieces(self) -> Iterator[tuple[str | None, int, int]]:
        """The bytes to write in order: a changed tensor's name, or None for a run of bytes to copy; start and size."""
        gone: list[tuple[str | None, TensorEntry]] = [(None, self.source.entries[key]) for key in self.dropped]
        gone += [(name, place.entry) for name, place in self.replaced.items()]
        position = self.source.data_start
        for name, entry in sorted(gone, key=lambda item: (item[1].start, item[1].size)):
            if entry.start > position:
                yield None, position, entry.start - position
            if name is not None:
                yield name, entry.start, entry.size
            position = entry.start + entry.size
        end = max((entry.start + entry.size for entry in self.source.entries.values()), default=position)
        if end > position:
            yield None, position, end - position


def copy_file(source: Path, target: Path) -> None:
    """A whole file as it is, under a new name."""
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        copy_range(reader, writer, 0, 0, os.fstat(reader.fileno()).st_size)


def copy_gathered(source: VirtualCheckpoint, target: BinaryIO, start: int, at: int, size: int) -> None:
    """What `copy_range` does, from a file that is not there."""
    for piece in source.pieces(start, size):
        write_all(target, raw_bytes(piece), at)
        at += len(piece)


def copy_range(source: BinaryIO, target: BinaryIO, start: int, at: int, size: int) -> None:
    """Copy bytes between unbuffered files within the kernel, or by hand where it cannot. Raises BrokenFile at an early end."""
    end = start + size
    by_kernel = hasattr(os, "copy_file_range")
    while start < end:
        moved, ask = 0, end - start
        if start % BLOCK == at % BLOCK:
            # Up to a block's beginning, then whole blocks, then the rest: only whole blocks can be shared.
            ask = min(-start % BLOCK, ask) or ask - ask % BLOCK or ask
        if by_kernel:
            try:
                moved = os.copy_file_range(source.fileno(), target.fileno(), ask, start, at)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
        if not moved:
            by_kernel = False
            source.seek(start)
            data = source.read(min(ask, CHUNK))
            if not data:
                raise BrokenFile("a weight file of the base ended early; it is cut short: download the base again")
            write_all(target, data, at)
            moved = len(data)
        start, at = start + moved, at + moved


def write_all(target: BinaryIO, data: bytes | memoryview, at: int) -> None:
    """Write every byte at a position of an unbuffered file; one call may write fewer."""
    view = memoryview(data)
    target.seek(at)
    while view:
        view = view[target.write(view[:CHUNK]) :]


UNKNOWN = "0" * 64
"""Stands in a header for a digest that is not known before the tensors are written."""


@dataclass(frozen=True)
class Built:
    """What was built: where, the digest of its weights, and the base's files and tensors that were left out."""

    path: Path
    digest: str
    left_out: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The folder that was built, or that the single file is in."""
        return self.path if self.path.is_dir() else self.path.parent


@own_torch_settings()
def build(
    base: Base,
    terms: Iterable[Term],
    out: Path,
    *,
    card: str = "",
    record: Mapping[str, Any] | None = None,
    notice: Callable[[str], None] = lambda text: None,
    form: Form | None = None,
    progress: Progress = silent,
) -> Built:
    """Write the base with `terms` baked in to the new folder or file `out`, whole or not at all.

    `form` is `single-file` or `diffusers`; None for that of the base. In another form than its own, the base's weights are
    written anew, and what is no weight of its components is left out.

    `card` becomes README.md in a folder; beside a single file it becomes a file of the same name that ends in `.md`,
    which is where user interfaces look for a description. `record` (JSON: recipe, concepts) goes into the header of every
    file that is written anew. Without terms the result is the base, byte for byte, or a pickle's tensors as safetensors;
    optional components that the base does not have whole leave the index. `notice` is called for what was left out.

    Raises AlreadyExists when `out` is there, BadDelta when a patch does not fit, BrokenBase when the base's files change
    meanwhile, NotConvertible when the base has no place in that form, OverpaintError when nothing can be written or the disk
    is full. Then nothing is left behind.
    """
    out, terms = typed_path(out), list(terms)
    made = base if form in (None, form_of(base)) else converted(base, form)
    beside = out.with_suffix(".md") if card and made.is_single_file else None
    _refuse_name(base, made, out)
    for path in (out, *([beside] if beside else [])):
        refuse_taken(path)
    composition = plan(made, terms)
    carried = survey(base, composition.names) if made is base else Survey(tuple(made.containers), {}, {})
    absent = [] if made.is_single_file else base.absent_components
    around = {} if made.is_single_file else configuration(base) if made is not base else _index(base)
    with atomic_output(out) as scratch:
        targets = {
            file: scratch if made.is_single_file else scratch / file.relative_to(made.path)
            for file in carried.kept
            if made.is_single_file or file.relative_to(made.path).parts[0] not in absent
        }
        digest = _write(made, composition, carried, targets, record_of(base, terms, record or {}), progress)
        _write_around(scratch, around)
        if card and beside is None:
            (scratch / "README.md").write_text(card, "utf-8")
        # The digests may have been remembered from another day; what was composed from has to be what they say.
        base.check_digests(composition.names)
        _refuse_changed(base)
    if beside is not None:
        _put_beside(beside, card, out)
    for text in carried.notices():
        notice(text)
    for name in absent:
        notice(f"left out {name}, which the base's index names and of which not everything is there; it draws without")
    left = _left_out(base, carried) if made is base else tuple(_left_behind(base, made, notice))
    return Built(out, digest, (*absent, *left))


def _index(base: Base) -> dict[str, Path | bytes]:
    """A folder's new index, where diffusers would not load the build, or not draw with it, by the old one."""
    index = base.mended_index
    return {} if index == base.index else {"model_index.json": index_bytes(index)}


def _write_around(folder: Path, files: Mapping[str, Path | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            copy_file(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def _left_behind(base: Base, made: Base, notice: Callable[[str], None]) -> Iterator[str]:
    """The names of what the other container has no place for, with a notice for each kind."""
    keys = [key for found in base.unnamed.values() for key in found]
    if keys:
        notice(f"left out {len(keys)} tensors that are no weights of a component, first {keys[0]}")
        yield from keys
    for mapping in made.form.mappings.values() if made.form else ():
        if mapping.unused:
            notice(
                f"published single files also hold {', '.join(mapping.unused)} of {mapping.prefix.rstrip('.')}, which a "
                "folder does not have; no picture depends on them, though other programs may warn that they are missing"
            )
    if not base.is_single_file:
        notice(
            "left out the configuration, which a single file does not hold; to draw with it, keep the base's folder beside "
            "it under its name without .safetensors"
        )


def _write(
    base: Base,
    composition: CompositionPlan,
    found: Survey,
    targets: Mapping[Path, Path],
    record: dict[str, Any],
    progress: Progress,
) -> str:
    """Write every file; returns the digest of the whole composition."""
    rewrites = _rewrites(base, composition.names, found)
    unknown = dict.fromkeys(base.names, UNKNOWN)
    written: dict[Path, dict[str, str]] = {}
    steps, total = itertools.count(1), len(composition.names) + len(targets)

    def value(name: str) -> Tensor:
        progress(next(steps), total, "composing")
        return composition.tensor(name)

    for source, target in targets.items():
        progress(next(steps), total, f"writing {source.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source in rewrites:
            blank = with_digests(record, dict.fromkeys(rewrites[source].replaced, UNKNOWN), unknown)
            written[source] = rewrites[source].write(target, blank, value)
        else:
            copy_file(source, target)
    changed = {name: digest for digests in written.values() for name, digest in digests.items()}
    whole = {**base.digests(name for name in base.names if name not in changed), **changed}
    for source, digests in written.items():
        rewrites[source].write_record(targets[source], with_digests(record, digests, whole))
    return combined_digest(whole)


def _rewrites(base: Base, names: list[str], found: Survey) -> dict[Path, Rewrite]:
    """The files that get a new header: pickles, and those with a changed tensor, one left out, or an earlier record."""
    replaced: dict[Path, dict[str, TensorLocation]] = {}
    for name in names:
        place = base.places[name]
        replaced.setdefault(place.file, {})[name] = place
    return {
        file: Rewrite(container, replaced.get(file, {}), frozenset(found.tensors.get(file, {})))
        for file, container in base.containers.items()
        if isinstance(container, VirtualCheckpoint)
        or (names and (file in replaced or file in found.tensors or KEY in container.metadata))
    }


def _put_beside(beside: Path, card: str, out: Path) -> None:
    try:
        write_new(beside, card.encode())
    except OverpaintError:
        out.unlink()
        raise


def _refuse_name(base: Base, made: Base, out: Path) -> None:
    if made.is_single_file != (out.suffix == ".safetensors"):
        kind = "single file" if made.is_single_file else "folder"
        why = f"the base is a {kind}, so the build is one" if made is base else f"the build is to be a {kind}"
        need = (
            "let its name end in .safetensors"
            if made.is_single_file
            else "choose a name that does not end in .safetensors"
        )
        raise OverpaintError(f"{why}: {need}, not {out.name}")
    if not base.is_single_file and out.resolve().is_relative_to(base.path.resolve()):
        raise OverpaintError(f"{out} is inside the base itself; choose a place outside {base.path}")


def _refuse_changed(base: Base) -> None:
    for file, container in base.containers.items():
        if open_weights(file) != container:
            raise BrokenBase(f"{file} changed since the base was opened; nothing was built: open the base again")


def _left_out(base: Base, found: Survey) -> tuple[str, ...]:
    keys = (key for dropped in found.tensors.values() for key in dropped)
    return (*(str(file.relative_to(base.path)) for file in found.files), *keys)
