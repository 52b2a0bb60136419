"""Build: a custom checkpoint with a composition baked in, of the base's own form, beside which nothing leaks.

A diffusers folder gives a folder, a single file a single file, unless the other form is asked for (`converting`); layout,
dtypes and untouched bytes stay. Weight files are streamed (`streaming`), second copies of a patched weight are left out with
notice (`twins`), the recipe and the digests stand in the headers (`record`), and everything appears whole or not at all
(`publish`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.digests import combined_digest
from overpaint.bases.files import Place, open_container
from overpaint.bases.gathered import GatheredContainer
from overpaint.errors import OverpaintError
from overpaint.patches.compose import Plan, Term, plan
from overpaint.patches.converting import Form, configuration, converted, form_of
from overpaint.patches.publish import appearing, refuse_taken
from overpaint.patches.record import KEY, record_of, with_digests
from overpaint.patches.streaming import Rewrite, copy_file
from overpaint.patches.twins import Survey, survey

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
        """The folder that was built, or that the single file lies in."""
        return self.path if self.path.is_dir() else self.path.parent


def build(
    base: Base,
    terms: Iterable[Term],
    out: Path,
    *,
    card: str = "",
    record: Mapping[str, Any] | None = None,
    notice: Callable[[str], None] = lambda text: None,
    form: Form | None = None,
) -> Built:
    """Write the base with `terms` baked in to the new folder or file `out`, whole or not at all.

    `form` is `single-file` or `diffusers`; None for that of the base. In another form than its own, the base's weights are
    written anew, and what is no weight of its components is left out.

    `card` becomes README.md in a folder; beside a single file it becomes a file of the same name that ends in `.md`,
    which is where user interfaces look for a description. `record` (JSON: recipe, concepts) goes into the header of every
    file that is written anew. Without terms the result is the base, byte for byte, or a pickle's tensors as safetensors.
    `notice` hears what was left out.

    Raises AlreadyExists when `out` is there, BadDelta when a patch does not fit, BrokenBase when the base's files change
    meanwhile, NotConvertible when the base has no place in that form, OverpaintError when nothing can be written or the disk
    is full. Then nothing is left behind.
    """
    out, terms = Path(out).absolute(), list(terms)
    made = base if form in (None, form_of(base)) else converted(base, form)
    beside = out.with_suffix(".md") if card and made.is_single_file else None
    _refuse_name(base, made, out)
    for path in (out, *([beside] if beside else [])):
        refuse_taken(path)
    composition = plan(made, terms)
    found = survey(base, composition.names) if made is base else Survey(tuple(made.containers), {}, {})
    around = configuration(base) if made is not base and not made.is_single_file else {}
    with appearing(out) as scratch:
        targets = {
            file: scratch if made.is_single_file else scratch / file.relative_to(made.path) for file in found.kept
        }
        digest = _write(made, composition, found, targets, record_of(base, terms, record or {}))
        _write_around(scratch, around)
        if card and beside is None:
            (scratch / "README.md").write_text(card, "utf-8")
        _refuse_changed(base)
    if beside is not None:
        _put_beside(beside, card, out)
    for text in found.notices():
        notice(text)
    if made is not base:
        return Built(out, digest, tuple(_left_behind(base, notice)))
    return Built(out, digest, _left_out(base, found))


def _write_around(folder: Path, files: Mapping[str, Path | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            copy_file(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def _left_behind(base: Base, notice: Callable[[str], None]) -> Iterator[str]:
    """What the other container has no place for, named and told."""
    keys = [key for found in base.unnamed.values() for key in found]
    if keys:
        notice(f"left out {len(keys)} tensors that are no weights of a component, first {keys[0]}")
        yield from keys
    if not base.is_single_file:
        notice(
            "left out the configuration, which a single file does not hold; to draw with it, keep the base's folder beside "
            "it under its name without .safetensors"
        )


def _write(base: Base, composition: Plan, found: Survey, targets: Mapping[Path, Path], record: dict[str, Any]) -> str:
    """Write every file; returns the digest of the whole composition."""
    rewrites = _rewrites(base, composition.names, found)
    unknown = dict.fromkeys(base.names, UNKNOWN)
    written: dict[Path, dict[str, str]] = {}
    for source, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if source in rewrites:
            blank = with_digests(record, dict.fromkeys(rewrites[source].replaced, UNKNOWN), unknown)
            written[source] = rewrites[source].write(target, blank, composition.tensor)
        else:
            copy_file(source, target)
    changed = {name: digest for digests in written.values() for name, digest in digests.items()}
    whole = {**base.digests(name for name in base.names if name not in changed), **changed}
    for source, digests in written.items():
        rewrites[source].seal(targets[source], with_digests(record, digests, whole))
    return combined_digest(whole)


def _rewrites(base: Base, names: list[str], found: Survey) -> dict[Path, Rewrite]:
    """The files that get a new header: pickles, and those with a changed tensor, one left out, or an earlier record."""
    replaced: dict[Path, dict[str, Place]] = {}
    for name in names:
        place = base.places[name]
        replaced.setdefault(place.file, {})[name] = place
    return {
        file: Rewrite(container, replaced.get(file, {}), frozenset(found.tensors.get(file, {})))
        for file, container in base.containers.items()
        if isinstance(container, GatheredContainer)
        or (names and (file in replaced or file in found.tensors or KEY in container.metadata))
    }


def _put_beside(beside: Path, card: str, out: Path) -> None:
    try:
        with appearing(beside) as scratch:
            scratch.write_text(card, "utf-8")
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
        raise OverpaintError(f"{out} lies inside the base itself; choose a place outside {base.path}")


def _refuse_changed(base: Base) -> None:
    for file, container in base.containers.items():
        if open_container(file) != container:
            raise BrokenBase(f"{file} changed since the base was opened; nothing was built: open the base again")


def _left_out(base: Base, found: Survey) -> tuple[str, ...]:
    keys = (key for dropped in found.tensors.values() for key in dropped)
    return (*(str(file.relative_to(base.path)) for file in found.files), *keys)
