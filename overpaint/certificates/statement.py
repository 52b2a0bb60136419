"""What a certificate states: two in-toto Statements about the same subjects, and a bill of materials beside them.

The attribute report (SCAI v0.3) holds what was composed and what was measured, one attribute for each; the test result (v0.1)
holds which thresholds that meets. Subjects are the recipe's record and, for a built checkpoint, each of its files by the
SHA-256 of its bytes, which is how OpenSSF Model Signing v1.0 digests them.

Attributes: `RECIPE` (base, patches with their strengths, days of expiry), `WEIGHTS` (the digest of the composed model and of
each changed tensor), `CONCEPT_HIDDEN` (one for each patch: concept, solver, settings), `TEXT_INPUTS` (which of them a patch
covers), `MEASURED` and, for suites that attack, `COUNTER_EVIDENCE` (one for each run), `VALIDITY` (when issued, from which day
it holds no longer, by whom). Every day of expiry, of a patch or of the certificate, is the first on which it does not hold.

The bill (CycloneDX 1.7) is for tools that read those and not attestations: one component of type `machine-learning-model`,
whose pedigree has the base as its ancestor and each patch as a patch; a model card with the measured numbers and their
confidence intervals; a claim for each threshold with its evidence, and the runs that attack the erasure as counter-evidence.
The library for CycloneDX has no classes for model cards and declarations, so the JSON is written here; tests hold it against
the library's copy of the published schema.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

from overpaint.bases.base import Base
from overpaint.bases.safetensors_file import tensor_digest
from overpaint.core import __version__
from overpaint.core.encoding import canonical_json, combined_digest, json_digest
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import ACCURACY, SHARE, WRONG
from overpaint.evaluation.metrics import Measurement, verdict
from overpaint.evaluation.suites import ERASED_BAR, KEPT_BAR, is_attack
from overpaint.patches.compose import Term, compose
from overpaint.patches.patch import Patch, uncovered_inputs
from overpaint.registry.records import EvaluationRecord

STATEMENT = "https://in-toto.io/Statement/v1"
REPORT = "https://in-toto.io/attestation/scai/v0.3"
TESTS = "https://in-toto.io/attestation/test-result/v0.1"
SIGNATURE = "model.sig"
"""The file beside a checkpoint's own that holds its OpenSSF signature."""
CHUNK = 1 << 22


class BadCertificate(OverpaintError):
    """A certificate that is damaged, altered, of another format, or signed by nobody who is trusted."""


@dataclass(frozen=True)
class Thresholds:
    """What is promised: at most so much of an erased concept is left, at least so much of what else was there."""

    erased: float = ERASED_BAR
    preserved: float = KEPT_BAR


@dataclass(frozen=True, eq=False)
class Composition:
    """What a base and patches come to: the base, each patch with its strength and day of expiry, and the digests."""

    base_name: str
    fingerprint: str
    layout: str
    patches: tuple[tuple[Patch, float, date | None], ...]
    weights: str
    tensors: Mapping[str, str]
    uncovered: tuple[str, ...]
    covered: tuple[str, ...]
    recipe: str = ""
    revision: int | None = None

    @classmethod
    def of(
        cls,
        base: Base,
        base_name: str,
        patches: Sequence[tuple[Patch, float, date | None]],
        recipe: str = "",
        revision: int | None = None,
    ) -> Composition:
        """Compose and digest. Raises WrongBase for a patch of another base, BadDelta for one that does not fit."""
        for patch, _, _ in patches:
            patch.check(base)
        composed = compose(base, [Term(patch.id, patch.delta, strength) for patch, strength, _ in patches])
        tensors = {name: tensor_digest(name, tensor) for name, tensor in composed.items()}
        open_inputs = {name for patch, _, _ in patches for name in uncovered_inputs(base, patch.delta)}
        uncovered = tuple(name for name in base.text_inputs if name in open_inputs)
        return cls(
            base_name=base_name,
            fingerprint=base.fingerprint,
            layout=base.layout.name,
            patches=tuple(sorted(patches, key=lambda entry: entry[0].id)),
            weights=combined_digest({**base.digests(base.names), **tensors}),
            tensors=tensors,
            uncovered=uncovered,
            covered=tuple(sorted(set(base.text_inputs) - set(uncovered))),
            recipe=recipe,
            revision=revision,
        )

    @property
    def record(self) -> dict[str, Any]:
        """The recipe's record: what the subject of that name is the digest of."""
        entries = [
            {"patch": patch.id, "strength": strength, "expires": day.isoformat() if day else None}
            for patch, strength, day in self.patches
        ]
        base = {"name": self.base_name, "fingerprint": self.fingerprint, "layout": self.layout}
        return {"name": self.recipe, "revision": self.revision, "base": base, "patches": entries}

    @property
    def expires(self) -> date | None:
        """The day from which not all of it holds: the first day from which one of its patches has expired."""
        return min((day for _, _, day in self.patches if day is not None), default=None)


@dataclass(frozen=True)
class Test:
    """A threshold, what was measured against it, and whether that holds: "yes", "no" or "not enough pictures"."""

    name: str
    holds: str


@dataclass(frozen=True, eq=False)
class Certificate:
    """Everything that is signed: `expires` is the day from which it does not hold, None for never; `files` are a checkpoint's,
    by their names within it, with their SHA-256."""

    composition: Composition
    runs: tuple[EvaluationRecord, ...]
    who: str
    issued: datetime
    expires: date | None
    files: Mapping[str, str] = field(default_factory=dict)
    thresholds: Thresholds = Thresholds()

    def __post_init__(self) -> None:
        for run in self.runs:
            if run.digest != self.composition.weights:
                raise OverpaintError(
                    f"the suite {run.suite} was run on other weights ({run.digest[:12]}) than these "
                    f"({self.composition.weights[:12]}); evaluate the recipe as it is"
                )

    @property
    def tests(self) -> list[Test]:
        """Every threshold that the runs can be held against, in the order of the runs."""
        return [test for run in self.runs for test in tests_of(run, self.thresholds)]

    def statements(self, producer: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The attribute report and the test result, ready to be signed by `producer` (a resource descriptor)."""
        subjects = subjects_of(self.composition.record, self.files)
        parts = ((REPORT, {"attributes": self._attributes(), "producer": dict(producer)}), (TESTS, self._results()))
        return [
            {"_type": STATEMENT, "subject": subjects, "predicateType": kind, "predicate": predicate}
            for kind, predicate in parts
        ]

    def _attributes(self) -> list[dict[str, Any]]:
        made = self.composition
        validity = {
            "issued": self.issued.astimezone(timezone.utc).isoformat(timespec="seconds"),
            "expires": self.expires.isoformat() if self.expires else None,
            "by": self.who,
        }
        attributes: list[tuple[str, dict[str, Any]]] = [
            ("RECIPE", made.record),
            ("WEIGHTS", {"digest": made.weights, "changed": dict(made.tensors)}),
            *(("CONCEPT_HIDDEN", _hidden(patch, strength)) for patch, strength, _ in made.patches),
            ("TEXT_INPUTS", {"covered": list(made.covered), "uncovered": list(made.uncovered)}),
            *(("COUNTER_EVIDENCE" if is_attack(run.suite) else "MEASURED", described(run)) for run in self.runs),
            ("VALIDITY", validity),
        ]
        return [{"attribute": name, "conditions": conditions} for name, conditions in attributes]

    def _results(self) -> dict[str, Any]:
        tests = self.tests
        by_verdict = {holds: [test.name for test in tests if test.holds == holds] for holds in ("yes", "no")}
        undecided = [test.name for test in tests if test.holds not in by_verdict]
        result = "FAILED" if by_verdict["no"] else "WARNED" if undecided or not tests else "PASSED"
        configuration = [
            {
                "name": f"suite {run.suite}",
                "digest": {"sha256": json_digest(described(run))},
                "annotations": {"thresholds": asdict(self.thresholds)},
            }
            for run in self.runs
        ]
        return {
            "result": result,
            "configuration": configuration,
            "passedTests": by_verdict["yes"],
            "warnedTests": undecided,
            "failedTests": by_verdict["no"],
        }


def tests_of(run: EvaluationRecord, thresholds: Thresholds) -> list[Test]:
    """What the numbers of the suite `quick` promise: erased, preserved and restored; other suites have no thresholds."""
    tests = []
    for each in run.results if run.suite == "quick" else ():
        number = Measurement(each.subject, each.metric, each.value, each.n, each.low, each.high)
        about, metric = each.subject, each.metric
        if about.startswith("erased: ") and metric == ACCURACY:
            name, holds = f"at most {thresholds.erased:.0%}", verdict(number, at_most=thresholds.erased)
        elif about.startswith(("kept: ", "restored: ")) and metric == SHARE:
            name, holds = f"at least {thresholds.preserved:.0%}", verdict(number, at_least=thresholds.preserved)
        elif metric == WRONG:
            name, holds = "none", verdict(number, at_most=0.0)
        else:
            continue
        tests.append(Test(f"{about}, {metric}: {name}", holds))
    return tests


def described(run: EvaluationRecord) -> dict[str, Any]:
    """A run as a certificate states it: suite, settings, seed, judge with its digest, versions, and every number."""
    return {
        "suite": run.suite,
        "settings": run.settings,
        "seed": run.seed,
        "judge": run.judge,
        "versions": run.versions,
        "weights": run.digest,
        "by": run.who,
        "at": run.at.astimezone(timezone.utc).isoformat(timespec="seconds"),
        "results": [asdict(result) for result in run.results],
    }


def _hidden(patch: Patch, strength: float) -> dict[str, Any]:
    made = patch.manifest["solver"]
    return {
        "concept": patch.concept.name,
        "kind": patch.concept.kind,
        "patch": patch.id,
        "strength": strength,
        "solver": made.get("name"),
        "settings": made.get("settings", {}),
        "seed": made.get("seed"),
    }


def subjects_of(record: Mapping[str, Any], files: Mapping[str, str]) -> list[dict[str, Any]]:
    """The subjects: the recipe's record, and files by name."""
    named = [("recipe", json_digest(record)), *sorted(files.items())]
    return [{"name": name, "digest": {"sha256": digest}} for name, digest in named]


def file_digests(checkpoint: Path, but: Iterable[Path] = ()) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint by its name within it, without its signature and the files `but`.

    Raises OverpaintError where a file cannot be read.
    """
    left_out = {path.absolute() for path in but}
    files = [checkpoint] if checkpoint.is_file() else sorted(p for p in checkpoint.rglob("*") if p.is_file())
    root = checkpoint.parent if checkpoint.is_file() else checkpoint
    digests = {}
    for path in files:
        name = path.relative_to(root).as_posix()
        if name == SIGNATURE or path.absolute() in left_out:
            continue
        try:
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
            digests[name] = digest.hexdigest()
        except OSError as error:
            raise OverpaintError(f"cannot read {path}: {error.strerror}") from error
    return digests


def stated(report: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The conditions of a report's attributes by attribute. Raises BadCertificate when one that has to be there is not."""
    by_subject: dict[str, list[Mapping[str, Any]]] = {}
    try:
        for each in report["predicate"]["attributes"]:
            by_subject.setdefault(each["attribute"], []).append(each["conditions"])
        for name in ("RECIPE", "WEIGHTS", "TEXT_INPUTS", "VALIDITY"):
            if len(by_subject[name]) != 1:
                raise KeyError(name)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadCertificate(
            f"payload.predicate.attributes lacks what every certificate has, or has it twice ({error})"
        ) from error
    return by_subject


LIMITS = (
    "A patch hides a concept and does not destroy it: whoever holds the base, or the patches, can have it back.",
    "Published attacks (a learned word, fine-tuning) can bring concepts back after every known eraser.",
)


def bill_of_materials(certificate: Certificate) -> bytes:
    """The bill as JSON, UTF-8. The same certificate gives the same bytes."""
    made, issued = certificate.composition, certificate.issued.astimezone(timezone.utc).isoformat(timespec="seconds")
    model = f"model:{made.weights}"
    bill: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "version": 1,
        "metadata": {
            "timestamp": issued,
            "tools": {"components": [{"type": "application", "name": "overpaint", "version": __version__}]},
            "authors": [{"name": certificate.who}],
            "component": _component(certificate, model),
        },
        "declarations": _declarations(certificate, model, issued),
    }
    serial = uuid.uuid5(uuid.NAMESPACE_OID, json_digest(bill))
    return canonical_json({**bill, "serialNumber": f"urn:uuid:{serial}"}) + b"\n"


def _component(certificate: Certificate, model: str) -> dict[str, Any]:
    made = certificate.composition
    base = {
        "type": "machine-learning-model",
        "name": made.base_name,
        "bom-ref": f"base:{made.fingerprint}",
        "properties": _properties({"fingerprint": made.fingerprint, "layout": made.layout}),
    }
    patches = [
        {
            "type": "unofficial",
            "resolves": [
                {
                    "type": "security",
                    "id": patch.id,
                    "name": f"hide {patch.concept.kind} {patch.concept.name}",
                    "description": f"strength {strength:g}, solver {patch.manifest['solver'].get('name')}",
                }
            ],
        }
        for patch, strength, _ in made.patches
    ]
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": model,
        "name": made.recipe or made.base_name,
        "version": made.weights[:12],
        "description": "Hidden concepts: " + (", ".join(patch.concept.name for patch, _, _ in made.patches) or "none"),
        "pedigree": {"ancestors": [base], "patches": patches},
        "modelCard": _model_card(certificate),
        "properties": _properties(
            {
                "weights": made.weights,
                "text inputs covered": ", ".join(made.covered),
                "text inputs uncovered": ", ".join(made.uncovered),
            }
        ),
    }
    if certificate.files:
        component["components"] = [
            {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
            for name, digest in sorted(certificate.files.items())
        ]
    return component


def _model_card(certificate: Certificate) -> dict[str, Any]:
    metrics = [_metric(run, result.subject, result) for run in certificate.runs for result in run.results]
    return {
        "modelParameters": {"task": "text-to-image"},
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": {"technicalLimitations": list(LIMITS)},
    }


def _metric(run: EvaluationRecord, subject: str, result: Any) -> dict[str, Any]:
    metric: dict[str, Any] = {
        "type": f"{run.suite}: {result.metric}",
        "value": f"{result.value:.6g}",
        "slice": f"{subject} (n={result.n})",
    }
    if result.low is not None and result.high is not None:
        bounds = {"lowerBound": f"{result.low:.6g}", "upperBound": f"{result.high:.6g}"}
        metric["confidenceInterval"] = bounds
    return metric


def _declarations(certificate: Certificate, model: str, issued: str) -> dict[str, Any]:
    evidence = [_evidence(certificate, run, issued) for run in certificate.runs]
    supports = [f"run:{run.suite}" for run in certificate.runs if not is_attack(run.suite)]
    against = [f"run:{run.suite}" for run in certificate.runs if is_attack(run.suite)]
    claims = [
        {
            "bom-ref": f"claim:{number}",
            "target": model,
            "predicate": f"{test.name}: {test.holds}",
            "evidence": supports,
            **({"counterEvidence": against} if against else {}),
        }
        for number, test in enumerate(certificate.tests, 1)
    ]
    return {"claims": claims, "evidence": evidence}


def _evidence(certificate: Certificate, run: EvaluationRecord, issued: str) -> dict[str, Any]:
    evidence: dict[str, Any] = {
        "bom-ref": f"run:{run.suite}",
        "propertyName": f"overpaint.suite.{run.suite}",
        "description": f"judge {run.judge}, seed {run.seed}; SHA-256 of the run: {json_digest(described(run))}",
        "created": issued,
        "author": {"name": run.who},
    }
    if certificate.expires:
        evidence["expires"] = f"{certificate.expires.isoformat()}T00:00:00+00:00"
    return evidence


def _properties(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": f"overpaint:{name}", "value": value} for name, value in values.items() if value]
