"""A plan: what a list of orders comes down to on a registry. Nothing is stored or solved yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from overpaint.concepts import Concept
from overpaint.errors import OverpaintError
from overpaint.registry.concepts import ConceptDiffers, told_apart
from overpaint.registry.records import BaseRecord, PatchRecord
from overpaint.registry.registry import Registry
from overpaint.solving.inputs import digest_of_order, provenance, solved_before
from overpaint.solving.orders import Order, Surroundings


@dataclass(frozen=True)
class Task:
    """An order, what its patch's manifest will say about how it was solved, and the patch if it is there already."""

    order: Order
    provenance: Mapping[str, Any] = field(repr=False, hash=False)
    done: PatchRecord | None = None


@dataclass(frozen=True)
class Plan:
    """Tasks on one base. The universe of `around` has all concepts that will be known; `new` and `changed` are not yet."""

    base: BaseRecord
    tasks: tuple[Task, ...]
    around: Surroundings
    new: tuple[Concept, ...]
    changed: tuple[Concept, ...]

    @property
    def open(self) -> list[Task]:
        """What is left to solve."""
        return [task for task in self.tasks if task.done is None]


def plan(
    registry: Registry,
    orders: Iterable[Order],
    around: Surroundings,
    *,
    base: str,
    update: bool = False,
    again: bool = False,
) -> Plan:
    """What `orders` come down to. To the universe of `around`, what the registry knows, is added all that is ordered.

    An order whose inputs are those of a stored patch is done, unless `again`. Raises ConceptDiffers for concepts that are
    known by another description, unless `update`; NotFound and BadSetting for a base, a solver or settings that are none;
    OverpaintError for a concept that is ordered by two descriptions.
    """
    orders, on = tuple(dict.fromkeys(orders)), registry.base(base)
    wanted = _concepts(orders)
    known = {concept.name: concept for concept in around.universe}
    new = tuple(concept for name, concept in wanted.items() if name not in known)
    changed = tuple(concept for name, concept in wanted.items() if name in known and known[name] != concept)
    if changed and not update:
        raise ConceptDiffers(told_apart([(known[concept.name], concept) for concept in changed]))
    around = replace(around, universe=tuple({**known, **wanted}.values()))
    methods = [order.method() for order in orders]
    before = {} if again else solved_before(registry, base, orders)
    tasks = []
    for order, method in zip(orders, methods, strict=True):
        solved = provenance(order, method, around)
        tasks.append(Task(order, solved, before.get(digest_of_order(order, solved, on.fingerprint))))
    return Plan(on, tuple(tasks), around, new, changed)


def _concepts(orders: tuple[Order, ...]) -> dict[str, Concept]:
    """The ordered concepts by name. Raises OverpaintError when a name means two of them."""
    found: dict[str, Concept] = {}
    for order in orders:
        if found.setdefault(order.concept.name, order.concept) != order.concept:
            raise OverpaintError(f"{order.concept.name!r} is ordered by two descriptions; keep one of them")
    return found
