"""What is in a file or folder: a built checkpoint with what is erased in it, a base, a patch; every digest checked.

Only a checkpoint whose whole record is true, or a patch that matches its manifest, counts as sound. And of a checkpoint that
anybody built, which patches explain what it changes: with `D` its difference from the base and `d_i` the change of patch i,
over all tensors that either touches, the strengths minimise `|D - sum_i s_i d_i|`. What is left, relative to `|D|`, is the
residual: 0 when the patches explain all of it up to rounding, 1 when they explain nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from overpaint.bases.base import Base
from overpaint.bases.checkpoint import open_weights
from overpaint.bases.layout import UnknownLayout, layouts
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import SafetensorsFile, tensor_digest
from overpaint.core.encoding import KEY, combined_digest
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import typed_path
from overpaint.patches.build import BadRecord, component_digests, read_record
from overpaint.patches.compose import Term, plan
from overpaint.patches.duplicate_weights import survey
from overpaint.patches.patch import Patch, read_patch, untouched_inputs

NOT_BUILT = "nothing is erased here: Overpaint did not build this, for no weight file carries its record"


@dataclass(frozen=True)
class Inspection:
    """What was found: what it is, facts about it, the patches in it (newest build last), and whatever is not as recorded."""

    what: str
    facts: Mapping[str, Any]
    patches: tuple[Mapping[str, Any], ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether everything that is recorded is true."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "sound": self.sound,
            "facts": dict(self.facts),
            "patches": [dict(patch) for patch in self.patches],
            "problems": list(self.problems),
        }


@own_torch_settings()
def inspect(path: Path) -> Inspection:
    """Look into a folder or a file. Raises OverpaintError when it is missing, damaged, or of no kind known here."""
    path = typed_path(path)
    if path.is_dir():
        return _base_or_build(Base.open(path))
    if not path.is_file():
        raise NotFound(f"there is nothing at {path}; name a checkpoint, a patch file or a folder")
    container = open_weights(path)
    record = read_record(container)
    if record is None and KEY in container.metadata:
        return _patch(path)
    try:
        return _base_or_build(Base.open(path))
    except UnknownLayout:
        return _lone_file(container, record)


def _base_or_build(base: Base) -> Inspection:
    records = [record for container in base.containers.values() if (record := read_record(container)) is not None]
    digests = base.digests(base.names)
    facts: dict[str, Any] = {
        "layout": base.layout.name,
        "form": "single file" if base.is_single_file else "diffusers folder",
        "weights" if records else "fingerprint": base.fingerprint,
        **{f"component {name}": digest for name, digest in component_digests(digests).items()},
        "tensors": len(digests),
    }
    if not records:
        return Inspection("base", facts, problems=(NOT_BUILT,))
    newest, recorded = _joined(records)
    facts = {**_described(newest), **facts, "patched tensors": len(recorded)}
    left = untouched_inputs(base, recorded)
    if covered := [name for name in base.text_inputs if name not in left and recorded]:
        facts["text inputs covered"] = ", ".join(covered)
    if left:
        facts["text inputs not covered"] = ", ".join(left)
    problems = [*_differences(newest, recorded, digests), *_second_copies(base, recorded)]
    return Inspection("built checkpoint", facts, _patches(newest), tuple(problems))


def _joined(found: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The record that all files agree on, and the digests of all changed tensors. Raises BadRecord when they disagree."""
    if len({record["digest"] for record in found}) > 1:
        raise BadRecord("the weight files come from different builds, so nothing is sure about them; build again")
    return found[0], {name: digest for record in found for name, digest in record["tensors"].items()}


def _described(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says beside its digests."""
    words = {"recipe": record.get("recipe"), "base": record.get("base_name"), "base fingerprint": record["base"]}
    return {key: value for key, value in words.items() if value is not None}


def _patches(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    return tuple(patch for one in (*record.get("earlier", ()), record) for patch in one["patches"])


def _differences(record: Mapping[str, Any], recorded: Mapping[str, str], digests: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each digest that is not as recorded: of the changed tensors, then of what no patch changed."""
    yield from _wrong(recorded, digests)
    explained = {name.partition("/")[0] for name in recorded if digests.get(name) != recorded[name]}
    current = component_digests(digests)
    for component in sorted({*current, *record["components"]} - explained):
        if current.get(component) != record["components"].get(component):
            explained.add(component)
            yield f"{component}: a tensor that no patch changed is not what was built"
    if not explained and combined_digest(digests) != record["digest"]:
        yield "the weights as a whole are not what was built: their digest differs"


def _wrong(recorded: Mapping[str, str], digests: Mapping[str, str]) -> Iterator[str]:
    for name, digest in sorted(recorded.items()):
        if name not in digests:
            yield f"{name} is not there"
        elif digests[name] != digest:
            yield f"{name} is not what was built: its digest differs"


def _second_copies(base: Base, recorded: Mapping[str, str]) -> Iterator[str]:
    """Weights that lie beside the patched ones and that no digest covers, as a build would have left out."""
    carried = survey(base, [name for name in recorded if name in base.places])
    for text in carried.notices():
        yield text.replace("left out", "not covered by the record:", 1)


def _lone_file(container: SafetensorsFile, record: Mapping[str, Any] | None) -> Inspection:
    """One weight file of a folder, or a file of another kind."""
    facts: dict[str, Any] = {"tensors": len(container.entries)}
    if record is None:
        return Inspection("safetensors file", facts, problems=(NOT_BUILT,))
    recorded = record["tensors"]
    digests = _digests_of(container, record["layout"], recorded)
    facts = {**_described(record), **facts, "patched tensors": len(recorded)}
    return Inspection("weight file of a built checkpoint", facts, _patches(record), tuple(_wrong(recorded, digests)))


def _digests_of(container: SafetensorsFile, layout_name: str, names: Mapping[str, str]) -> dict[str, str]:
    """The digests of the named tensors in a component's own file."""
    layout = next((known for known in layouts() if known.name == layout_name), None)
    if layout is None:
        raise BadRecord(
            f"{container.path} was built from a {layout_name}, a layout this program does not know; upgrade"
        )
    found = {}
    for component in {name.partition("/")[0] for name in names} & set(layout.components):
        rules = layout.components[component]
        keys = {key: f"{component}/{rules.canonical(key)}" for key in container.entries}
        for key, tensor in container.tensors(key for key, name in keys.items() if name in names):
            local = keys[key].partition("/")[2]
            found[keys[key]] = tensor_digest(keys[key], tensor.reshape(rules.shape(local, tuple(tensor.shape))))
    return found


def _patch(path: Path) -> Inspection:
    patch = read_patch(path.read_bytes())
    facts: dict[str, Any] = {"patch": patch.id, "concept": patch.concept.name}
    if maps := [part.encoder for part in patch.delta.text_maps]:
        facts["text inputs covered"] = ", ".join(maps)
    facts.update(_flat(patch.manifest))
    return Inspection("patch", facts)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested maps as one, with dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part in value for key, leaf in _flat(value[part], f"{name}.{part}" if name else part).items()}


PRESENT = 0.02
"""A patch counts as present from this strength on; rounding alone gives less."""


@dataclass(frozen=True)
class Explanation:
    """Each patch with the strength that fits best, the residual (a share), and which tensors nothing explains.

    `changed` counts the tensors that differ from the base; `unexplained` are those of them that no patch reaches;
    `uncovered` the text inputs that nothing in the checkpoint changes although it changes another.
    """

    strengths: tuple[tuple[Patch, float], ...]
    residual: float
    changed: int
    unexplained: tuple[str, ...]
    uncovered: tuple[str, ...]

    @property
    def present(self) -> tuple[tuple[Patch, float], ...]:
        """The patches that are in the checkpoint, at a strength of at least `PRESENT` either way."""
        return tuple((patch, strength) for patch, strength in self.strengths if abs(strength) >= PRESENT)

    def as_json(self) -> dict[str, Any]:
        rows = [{"patch": p.id, "concept": p.concept.name, "strength": s} for p, s in self.strengths]
        return {
            "patches": rows,
            "residual": self.residual,
            "changed": self.changed,
            "unexplained": list(self.unexplained),
            "uncovered": list(self.uncovered),
        }


def explain(checkpoint: Base, base: Base, patches: Sequence[Patch]) -> Explanation:
    """Fit the patches to what a checkpoint changes. Patches of other bases are left out.

    Raises OverpaintError for a checkpoint of another architecture than the base's.
    """
    if different := sorted(set(base.names) ^ set(checkpoint.names)) or sorted(
        n for n in base.names if base.places[n].shape != checkpoint.places[n].shape
    ):
        raise OverpaintError(
            f"the checkpoint at {checkpoint.path} and the base at {base.path} are of different architectures: "
            f"{different[0]} is not in both, in one shape"
        )
    fitting = [patch for patch in patches if patch.manifest["subject"]["fingerprint"] == base.fingerprint]
    before, after = base.digests(base.names), checkpoint.digests(checkpoint.names)
    changed = [name for name in base.names if before[name] != after[name]]
    planned = [plan(base, [Term(patch.id, patch.delta)]) for patch in fitting]
    reached = {name for each in planned for name in each.stacks}
    gram = torch.zeros(len(fitting), len(fitting), dtype=torch.float64)
    shared = torch.zeros(len(fitting), dtype=torch.float64)
    total = 0.0
    for name in sorted({*changed, *reached}):
        difference = checkpoint.tensor(name).double() - base.tensor(name).double()
        total += float(difference.square().sum())
        indices = [i for i, each in enumerate(planned) if name in each.stacks]
        rows = [planned[i].change(name).flatten() for i in indices]
        if rows:
            stacked = torch.stack(rows)
            gram[torch.tensor(indices)[:, None], torch.tensor(indices)] += stacked @ stacked.T
            shared[indices] += stacked @ difference.flatten()
    strengths = torch.linalg.lstsq(gram, shared[:, None], driver="gelsd").solution[:, 0] if fitting else shared
    left = total - 2 * float(strengths @ shared) + float(strengths @ gram @ strengths)
    return Explanation(
        strengths=tuple((patch, float(strength)) for patch, strength in zip(fitting, strengths, strict=True)),
        residual=(max(0.0, left) / total) ** 0.5 if total else 0.0,
        changed=len(changed),
        unexplained=tuple(name for name in changed if name not in reached),
        uncovered=untouched_inputs(base, changed),
    )
