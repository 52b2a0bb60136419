"""Bases, concepts, and the patches that are solved for them: the part of the facade that needs no recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from overpaint.concepts import Concept
from overpaint.errors import OverpaintError
from overpaint.recipes import me
from overpaint.registry.records import BaseRecord, PatchRecord
from overpaint.registry.registry import Registry

if TYPE_CHECKING:
    from overpaint.bases.base import Base
    from overpaint.patches.patch import Patch
    from overpaint.solving.compression import Compressed
    from overpaint.solving.orders import Keep, Order, Surroundings
    from overpaint.solving.plans import Plan
    from overpaint.solving.running import Outcome


Report: TypeAlias = Callable[[int, int, str], None]
"""Is told of progress: the step, of how many, and what is being done."""


def silent(step: int, of: int, text: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Solved:
    """A patch that was solved and stored, what its solver said about it, and the seconds it took."""

    record: PatchRecord
    diagnostics: Mapping[str, Any]
    seconds: float

    @property
    def id(self) -> str:
        """The patch's id: the digest of its manifest."""
        return self.record.id

    @property
    def nbytes(self) -> int:
        """Size of the patch's file, in bytes."""
        return self.record.nbytes


class Workbench:
    """A registry whose bases are opened once and kept, and on which concepts are solved."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._bases: dict[str, Base] = {}
        self._patches: dict[str, Patch] = {}

    # Bases and concepts

    def add_base(self, name: str, source: str | Path) -> BaseRecord:
        """Remember a base: a diffusers folder, a single-file checkpoint, a model on the Hub (`ORG/MODEL[@REVISION]`, kept
        with its commit), or `emoji` for the embedded one.

        Raises AlreadyExists for a name that is taken, OverpaintError for a base that is missing, broken or unknown.
        """
        from overpaint.opening import add_base

        record, self._bases[name] = add_base(self.registry, name, source)
        return record

    def bases(self) -> list[BaseRecord]:
        """All bases of the registry."""
        return self.registry.bases()

    def base(self, name: str) -> Base:
        """An opened base. Raises NotFound for an unknown name, OverpaintError when its files are gone or broken."""
        from overpaint.opening import open_base

        if name not in self._bases:
            self._bases[name] = open_base(self.registry, name)
        return self._bases[name]

    def prepare(
        self,
        base: str,
        *,
        vocabulary: int = 0,
        device: str = "auto",
        report: Report = silent,
    ) -> None:
        """Encode now what every closed-form solve on a base needs once: the vocabulary and the registry's concepts.

        `vocabulary` is how many of its words, as the setting of `separable`; 0 is all.
        """
        from overpaint.bases.device import resolve_device
        from overpaint.solvers.universe import Preserved, prepare

        around = self.surroundings(base)
        preserved = Preserved(around.keep, vocabulary, around.cache)
        prepare(self.base(base), around.universe, resolve_device(device), preserved=preserved, report=report)

    @property
    def vocabularies(self) -> Path:
        """The folder in which second moments of vocabularies are kept."""
        return self.registry.folder / "cache" / "vocabulary"

    def keep(self, base: str, prompts: Iterable[str]) -> int:
        """Preserve prompts in whatever is solved on a base from now on; returns how many are new. Raises NotFound."""
        return self.registry.keep_prompts(base, prompts, who=me())

    def add_concept(
        self,
        name: str,
        *,
        kind: str = "object",
        synonyms: Iterable[str] = (),
        anchor: str = "",
        prompts: Iterable[str] = (),
    ) -> Concept:
        """Remember a concept. Raises AlreadyExists for a name that is taken, OverpaintError for one that is not valid."""
        concept = Concept(name, kind, tuple(synonyms), anchor, tuple(prompts))
        self.registry.add_concept(concept)
        return concept

    def concepts(self) -> list[Concept]:
        """All concepts of the registry."""
        return self.registry.concepts()

    # Solving

    def solve(
        self,
        concept: str | Concept,
        *,
        base: str,
        solver: str = "separable",
        settings: Mapping[str, str] | None = None,
        seed: int = 0,
        compress: str | None = None,
        device: str = "auto",
        report: Report = silent,
    ) -> Solved:
        """Compute and store the patch that erases one concept from a base.

        A name the registry does not know becomes an object of that name. Every other concept in the registry is the
        universe: preserved, so that patches compose. `compress` keeps a rank ("4") or a share of energy ("0.99") of every
        tensor's change. Raises OverpaintError before anything is stored.
        """
        from overpaint.bases.device import resolve_device
        from overpaint.solving.inputs import provenance
        from overpaint.solving.making import make, store
        from overpaint.solving.orders import Order

        wanted = concept if isinstance(concept, Concept) else self._concept(concept)
        order = Order(wanted, solver, settings or {}, seed, _keeps(compress))
        around, method = self.surroundings(base), order.method()
        made = make(order, provenance(order, method, around), self.base(base), around, resolve_device(device), report)
        self.registry.ensure_concept(wanted)
        return Solved(store(self.registry, made, base), made.diagnostics, made.seconds)

    def orders(
        self,
        names: Iterable[str] = (),
        *,
        file: Path | None = None,
        solver: str | None = None,
        settings: Mapping[str, str] | None = None,
        seed: int | None = None,
        compress: str | None = None,
    ) -> list[Order]:
        """What to solve for concepts by name, and for those of a file (see `overpaint.solving.concept_file`)."""
        from overpaint.solving.concept_file import read_concepts
        from overpaint.solving.orders import Defaults, completed

        plain = Defaults().overridden(solver, settings or {}, seed)
        found = [replace(plain.order(Concept(name)), described=False) for name in names]
        if file is not None:
            found += read_concepts(file, solver=solver, settings=settings, seed=seed)
        return completed(found, self.concepts(), _keeps(compress))

    def plan(self, orders: Iterable[Order], *, base: str, update: bool = False, again: bool = False) -> Plan:
        """What orders come down to: what is solved already, which concepts are new. See `overpaint.solving.plans`."""
        from overpaint.solving.plans import plan

        return plan(self.registry, orders, self.surroundings(base), base=base, update=update, again=again)

    def surroundings(self, base: str) -> Surroundings:
        """What every solve on a base knows beside its order."""
        from overpaint.solving.orders import Surroundings

        kept = tuple(each.prompt for each in self.registry.kept_prompts(base))
        return Surroundings(tuple(self.concepts()), kept, self.vocabularies)

    def carry_out(
        self,
        plan: Plan,
        *,
        device: str = "auto",
        report: Report = silent,
        told: Callable[[Outcome], None] = lambda outcome: None,
    ) -> list[Outcome]:
        """Solve and store what a plan leaves open. See `overpaint.solving.running`."""
        from overpaint.bases.device import resolve_device
        from overpaint.solving.running import carry_out

        return carry_out(self.registry, plan, self.base, resolve_device(device), report=report, told=told)

    def compress(self, patch: str, keep: str) -> tuple[PatchRecord, Compressed]:
        """Store a smaller patch beside one that is there; `keep` is a rank or a share of energy. See `solving.compression`.

        Raises NothingSmaller when it would not be smaller.
        """
        from overpaint.solving.compression import compressed, refuse_if_not_smaller
        from overpaint.solving.making import store_patch
        from overpaint.solving.orders import Keep

        record, asked = self.registry.patch(patch), Keep.parse(keep)
        found = compressed(self.base(record.base), self.patch(record.id), asked)
        refuse_if_not_smaller(found, asked)
        return store_patch(self.registry, found.patch, record.base, 0.0), found

    def learn(self, names: Iterable[str]) -> None:
        """Make objects of the names the registry does not know, so that each preserves all the others when solved."""
        known = {concept.name for concept in self.concepts()}
        for name in names:
            if name not in known:
                self.registry.ensure_concept(Concept(name))

    def _concept(self, name: str) -> Concept:
        for known in self.concepts():
            if known.name == name:
                return known
        return Concept(name)

    def patch(self, key: str) -> Patch:
        """A stored patch by id, unique beginning of an id, or concept; its bytes and digests checked."""
        from overpaint.patches.patch import read_patch

        record = self.registry.patch(key)
        if record.id not in self._patches:
            patch = read_patch(self.registry.blob(record))
            if patch.id != record.id:
                raise OverpaintError(
                    f"the stored file of patch {record.id[:12]} is that of {patch.id[:12]}; solve it again"
                )
            self._patches[record.id] = patch
        return self._patches[record.id]


def _keeps(compress: str | None) -> tuple[Keep, ...]:
    from overpaint.solving.orders import Keep

    return () if compress is None else (Keep.parse(compress),)
