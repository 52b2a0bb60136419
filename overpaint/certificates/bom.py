"""A CycloneDX 1.7 bill of materials of what a certificate is about, for tools that read those and not attestations.

One component of type `machine-learning-model`, whose pedigree has the base as its ancestor and each patch as a patch; a
model card with the measured numbers and their confidence intervals; a claim for each threshold with its evidence, and
the runs that attack the erasure as counter-evidence. The library for CycloneDX has no classes for model cards and
declarations, so the JSON is written here; tests hold it against the library's copy of the published schema.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import timezone
from typing import Any

from overpaint.certificates.statement import Certificate, described
from overpaint.core import __version__
from overpaint.core.encoding import canonical_json, json_digest
from overpaint.evaluation.suites import is_attack
from overpaint.registry.registry import EvaluationRecord

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
