"""Build: a custom checkpoint with a composition baked in, of the base's own form, beside which nothing leaks.

A diffusers folder gives a folder, a single file a single file, unless the other form is asked for (`converted`); layout,
dtypes and untouched bytes stay. Weight files are streamed, second copies of a patched weight are left out with notice
(`duplicate_weights`), the recipe and the digests are recorded in the headers, and everything appears whole or not at all.

A weight file is written again in one pass, at the speed of a copy. The header comes first: everything in it has a known
length, so its digests are filled in at the end. Tensors follow in file order. What is between two changed tensors is copied
by the kernel as one piece, and a file system that can share blocks shares them; memory holds one changed tensor at a time.

A base in the other container is one more base, whose files are not there yet. Names, values and digests are those of the
original; what the way back would give is compared with what went in before anything is written.

The record is in the header of every weight file that the build wrote anew. Beside what the recipe adds (its name, its base's
name, each patch's concept), it holds: `layout`; `base`, the base's fingerprint; `patches`, with `id` and `strength`; `tensors`,
the digest of each tensor of this file that the patches changed; `components` and `digest`, those of the whole composition;
`earlier`, the records of builds that this one began from.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.checkpoint import ResolvedCheckpoint, TensorLocation, WeightFiles, open_weights
from overpaint.bases.layout import KeyMapping, SingleFile, single_file_of
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import (
    DATA_START,
    DTYPES,
    BrokenFile,
    SafetensorsFile,
    VirtualCheckpoint,
    entries_at_offsets,
    raw_bytes,
    tensor_digest,
)
from overpaint.core.atomic import atomic_output, refuse_taken, write_new
from overpaint.core.encoding import KEY, TensorEntry, canonical_json, combined_digest, header_bytes
from overpaint.core.errors import OverpaintError
from overpaint.core.names import typed_path
from overpaint.core.reporting import Progress, silent
from overpaint.patches.compose import CompositionPlan, Term, plan
from overpaint.patches.duplicate_weights import Survey, survey
from overpaint.patches.formats.dialects import ldm_modules

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
    if not made.is_single_file and out.suffix.lower() in (
        ".safetensors",
        ".sft",
        ".ckpt",
        ".pt",
        ".pth",
        ".bin",
        ".gguf",
    ):
        raise OverpaintError(
            f"the build is to be a folder: choose a name that does not end in {out.suffix}, not {out.name}"
        )
    refuse_inside(base, out)


def refuse_inside(base: Base, out: Path) -> None:
    """Raise OverpaintError where an output would become a part of the base."""
    if not base.is_single_file and out.resolve().is_relative_to(base.path.resolve()):
        raise OverpaintError(f"{out} is inside the base itself; choose a place outside {base.path}")


def _refuse_changed(base: Base) -> None:
    for file, container in base.containers.items():
        if open_weights(file) != container:
            raise BrokenBase(f"{file} changed since the base was opened; nothing was built: open the base again")


def _left_out(base: Base, found: Survey) -> tuple[str, ...]:
    keys = (key for dropped in found.tensors.values() for key in dropped)
    return (*(str(file.relative_to(base.path)) for file in found.files), *keys)


Form = Literal["single-file", "diffusers"]
FORMS: tuple[Form, ...] = ("single-file", "diffusers")
_CONFIGURATION = (".json", ".txt", ".model")


class NotConvertible(OverpaintError):
    """A base that the other container has no keys for."""


@dataclass(frozen=True)
class RenamedCheckpoint(VirtualCheckpoint):
    """Some tensors of a base as another file would hold them: the places that each key has there, from the top."""

    base: Base | None = field(default=None, compare=False, repr=False)
    held: Mapping[str, tuple[tuple[str, bool], ...]] = field(default_factory=dict, compare=False, repr=False)

    def stored(self, key: str) -> Iterator[Tensor]:
        assert self.base is not None
        for name, turned in self.held[key]:
            value = self.base.tensor(name)
            yield value.T if turned else value


def form_of(base: Base) -> Form:
    """Which of the two containers a base comes in."""
    return "single-file" if base.is_single_file else "diffusers"


def converted(base: Base, form: Form) -> Base:
    """A base in a container of that form, which is the other one than its own. Nothing is written.

    Its files have paths from the place at which it will be built; a single file has the path `.`. Raises NotConvertible
    when the layout has no single file for it.
    """
    single = _single_form(base) if form == "single-file" else None
    parts = list(_single_parts(base, single) if single else _folder_parts(base))
    opened = ResolvedCheckpoint(base.layout, tuple(parts), form=single)
    places = opened.places()
    if {n: p.shape for n, p in places.items()} != {n: p.shape for n, p in base.places.items()}:
        odd = sorted(places.keys() ^ base.places.keys())
        raise NotConvertible(
            f"{odd[0] if odd else 'a tensor'} of the base at {base.path} has no place in a {form} of {base.layout.name}; "
            "build it in the form it has"
        )
    view = Base(Path(), base.layout, places, {part.container.path: part.container for part in parts}, form=single)
    view._digests.update(base._digests)
    return view


def configuration(base: Base) -> dict[str, Path | bytes]:
    """What a folder of a single-file base holds beside the weights, by relative path: files to copy, and the new index.

    Components that are not there, such as a safety checker, leave the index. Raises NotFound without configuration.
    """
    folder, absent = base.config_folder, base.absent_components
    named = {name for name, value in base.index.items() if isinstance(value, list)} - set(absent)
    files: dict[str, Path | bytes] = {"model_index.json": index_bytes(base.mended_index)}
    for file in sorted(folder.glob("*/*")):
        inside = file.relative_to(folder)
        if file.suffix in _CONFIGURATION and ".index." not in file.name and inside.parts[0] in named:
            files[inside.as_posix()] = file
    return files


def index_bytes(index: Mapping[str, Any]) -> bytes:
    """A pipeline's index as diffusers writes it."""
    return (json.dumps(index, indent=2) + "\n").encode()


def _single_form(base: Base) -> SingleFile:
    form = single_file_of(base.layout.single_files, base.places)
    if form is None:
        raise NotConvertible(f"there are no single files of {base.layout.name}; build {base.path} as a folder")
    return form


def _folder_parts(base: Base) -> Iterator[WeightFiles]:
    for component, rules in base.layout.components.items():
        keys: dict[str, tuple[str, ...]] = {name: (name,) for name in _names(base, component)}
        path = Path(component) / f"{rules.weights}.safetensors"
        yield WeightFiles(component, _renamed(base, path, {component: (keys, None)}), keys)


def _single_parts(base: Base, form: SingleFile) -> Iterator[WeightFiles]:
    written = {}
    for component, mapping in form.mappings.items():
        names = _names(base, component)
        keys = _numbered_through(mapping, names) if mapping.level_end else mapping.keys(names)
        written[component] = (keys, mapping)
    container = _renamed(base, Path(), written)
    for component, mapping in form.mappings.items():
        yield WeightFiles(component, container, mapping.names(container.entries), mapping)


def _names(base: Base, component: str) -> list[str]:
    start = f"{component}/"
    return [name.removeprefix(start) for name in base.names if name.startswith(start)]


def _numbered_through(mapping: KeyMapping, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Keys of a U-Net, whose blocks are numbered through."""
    modules = ldm_modules({name.rpartition(".")[0] for name in names})
    split = ((name, *name.rpartition(".")) for name in names)
    return {f"{mapping.prefix}{modules[m]}.{attribute}": (name,) for name, m, _, attribute in split if m in modules}


def _renamed(
    base: Base, path: Path, written: Mapping[str, tuple[Mapping[str, tuple[str, ...]], KeyMapping | None]]
) -> RenamedCheckpoint:
    held: dict[str, tuple[tuple[str, bool], ...]] = {}
    described: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for component, (keys, mapping) in written.items():
        for key, names in keys.items():
            places = [base.places.get(f"{component}/{name}") for name in names]
            whole = [place for place in places if place is not None]
            if len(whole) < len(names) or len({(p.entry.dtype, p.shape) for p in whole}) > 1:
                continue  # `converted` notices that its tensors are missing
            turned = mapping is not None and mapping.is_transposed(key) and len(whole[0].shape) == 2
            held[key] = tuple((f"{component}/{name}", turned) for name in names)
            shape = _stored_shape(whole, turned)
            if mapping is not None and mapping.is_convolution(key) and len(shape) == 2:
                shape = (*shape, 1, 1)
            described.append((key, DTYPES[whole[0].entry.dtype], shape))
    return RenamedCheckpoint(path, entries_at_offsets(described), {"format": "pt"}, DATA_START, (), base, held)


def _stored_shape(stack: list[TensorLocation], turned: bool) -> tuple[int, ...]:
    shape = stack[0].shape[::-1] if turned else stack[0].shape
    return (shape[0] * len(stack), *shape[1:]) if len(stack) > 1 else shape


RECORD_FORMAT = 1
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""What other programs write about the bytes that follow; no longer true when these change."""


class BadRecord(OverpaintError):
    """A record that is damaged or of a newer format."""


def record_of(base: Base, terms: Iterable[Term], details: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a build, but for its digests. `details` are the recipe's own words.

    Ids and strengths come from the terms, so that a record says what was applied, whatever the details say.
    """
    known = {patch.get("id"): patch for patch in details.get("patches", ())}
    patches = [
        {**known.get(term.id, {}), "id": term.id, "strength": term.strength}
        for term in sorted(terms, key=lambda t: t.id)
    ]
    earlier = _chain(base)
    about = {"format": RECORD_FORMAT, "layout": base.layout.name, "base": base.fingerprint, "patches": patches}
    return {**details, **about, **({"earlier": earlier} if earlier else {})}


def _chain(base: Base) -> list[dict[str, Any]]:
    """The records that a base's own files carry, oldest first, each once."""
    by_digest: dict[bytes, dict[str, Any]] = {}
    for record in records(base.containers.values()):
        for one in (*record.get("earlier", ()), record):
            # The tensors it names are others by now.
            bare = {key: value for key, value in one.items() if key not in ("earlier", "tensors")}
            by_digest[canonical_json(bare)] = bare
    return list(by_digest.values())


def with_digests(record: Mapping[str, Any], tensors: Mapping[str, str], whole: Mapping[str, str]) -> dict[str, Any]:
    """A record with the digests of a file's changed `tensors` and of the `whole` composition, both by canonical name."""
    return {
        **record,
        "tensors": dict(tensors),
        "components": component_digests(whole),
        "digest": combined_digest(whole),
    }


def component_digests(digests: Mapping[str, str]) -> dict[str, str]:
    """One digest per component."""
    parts: dict[str, dict[str, str]] = {}
    for name, digest in digests.items():
        parts.setdefault(name.partition("/")[0], {})[name] = digest
    return {component: combined_digest(found) for component, found in sorted(parts.items())}


def metadata_with(metadata: Mapping[str, str], record: Mapping[str, Any]) -> dict[str, str]:
    """A file's metadata with a record in it, and without what the new bytes make untrue."""
    kept = {key: text for key, text in metadata.items() if key not in _STALE}
    return {**kept, KEY: canonical_json(record).decode()}


def records(containers: Iterable[SafetensorsFile]) -> list[dict[str, Any]]:
    """The records that weight files carry. Raises BadRecord for one that cannot be read."""
    records = (read_record(container) for container in containers)
    return [record for record in records if record is not None]


def read_record(container: SafetensorsFile) -> dict[str, Any] | None:
    """The record in a file's header, None when Overpaint did not build it. Raises BadRecord."""
    if KEY not in container.metadata:
        return None
    damaged = BadRecord(f"{container.path} has a record that is damaged; build it again, or get it again")
    try:
        record: dict[str, Any] = json.loads(container.metadata[KEY])
        if "arrays" in record:
            return None  # the manifest of a patch
        version, sound = record["format"], _is_sound(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    if version != RECORD_FORMAT:
        raise BadRecord(f"{container.path} was built with format {version!r} of records; upgrade Overpaint to read it")
    if not sound:
        raise damaged
    return record


def _is_sound(record: dict[str, Any]) -> bool:
    """Whether what is read from a record has the types it should; raises where something is missing."""
    canonical_json(record)
    patches = [patch for one in (*record.get("earlier", ()), record) for patch in one["patches"]]
    texts = [record["layout"], record["base"], record["digest"], *record["tensors"].values()]
    texts += [*record["components"].values(), *(patch["id"] for patch in patches)]
    return all(isinstance(t, str) for t in texts) and all(isinstance(p["strength"], int | float) for p in patches)
