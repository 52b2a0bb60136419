"""A certificate as a file: signed, opened again, and checked against whatever is at hand.

The file is JSON Lines of Sigstore bundles, each a DSSE envelope around one in-toto Statement v1. Formats: Sigstore bundle v0.3
(`application/vnd.dev.sigstore.bundle.v0.3+json`), DSSE v1, in-toto Attestation Framework v1. Every line and every statement is
in canonical form (sorted keys, no spaces, each key once): a file that was spelled again is refused, so that two readers can
never understand it differently.

Checked are who signed it, whether it is still valid, and whether base, patches and checkpoint are as it states. Every check
ends in "holds", "fails" or "not checked" with the reason, so that what nobody looked at is never taken for good.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any, Literal

from overpaint.bases.base import Base
from overpaint.certificates.statement import (
    REPORT,
    STATEMENT,
    TESTS,
    BadCertificate,
    Composition,
    Thresholds,
    file_digests,
    stated,
    subjects_of,
    tests_of,
)
from overpaint.core.encoding import canonical_json, json_digest
from overpaint.core.errors import OverpaintError
from overpaint.patches.patch import Patch
from overpaint.registry.records import EvaluationRecord, ResultRecord
from overpaint.registry.sharing.signing import Keyring, Signer, key_id
from overpaint.registry.store import BadManifest, read_json

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD = "application/vnd.in-toto+json"
LIMIT = 50_000_000
"""The most bytes that are read of a certificate."""


@dataclass(frozen=True)
class Opened:
    """The statements of a certificate by predicate type, and the key that signed them all."""

    statements: Mapping[str, Mapping[str, Any]]
    key: bytes


def signed_lines(statements: Iterable[Mapping[str, Any]], signer: Signer) -> bytes:
    """Statements, signed, as the bytes of a certificate. The same statements and key give the same bytes."""
    return b"".join(canonical_json(_bundle(canonical_json(each), signer)) + b"\n" for each in statements)


def _bundle(payload: bytes, signer: Signer) -> dict[str, Any]:
    signature = {"keyid": key_id(signer.public), "sig": _text(signer.key.sign(_encoded(payload)))}
    return {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": key_id(signer.public)}, "tlogEntries": []},
        "dsseEnvelope": {"payload": _text(payload), "payloadType": PAYLOAD, "signatures": [signature]},
    }


def opened(content: bytes, keys: Keyring | None) -> Opened:
    """What a certificate states, once its form and its signatures are checked.

    With `keys`, one of them has to have signed every statement; without, the key that the statements name. Raises
    BadCertificate, naming the field that is not as it should be.
    """
    lines = content.splitlines(keepends=True)
    if not lines:
        raise BadCertificate("the certificate is empty; get it from its source again")
    envelopes = [_payload(line, f"line {number}") for number, line in enumerate(lines, 1)]
    statements: dict[str, Mapping[str, Any]] = {}
    for number, (payload, _, _) in enumerate(envelopes, 1):
        statement = _canonical(payload, f"line {number}: dsseEnvelope.payload")
        _same(statement.get("_type"), STATEMENT, f"line {number}: payload._type")
        kind = statement.get("predicateType")
        if not isinstance(kind, str) or kind in statements:
            raise BadCertificate(f"line {number}: payload.predicateType is {kind!r}, which is missing or there twice")
        statements[kind] = statement
    key = _named_key(statements.values())
    for number, (payload, key_named, signature) in enumerate(envelopes, 1):
        where = f"line {number}: dsseEnvelope"
        _same(key_named, key_id(key), f"{where}.signatures[0].keyid")
        if not _fits(key, signature, payload):
            raise BadCertificate(
                f"{where}.signatures[0].sig does not fit {where}.payload under the key {key_id(key)}: one of them was "
                "altered after it was signed"
            )
    if keys is not None and key not in keys.keys:
        raise BadCertificate(
            f"dsseEnvelope.signatures[0].keyid: the certificate is signed by {key_id(key)}, and none of your "
            f"{len(keys.keys)} trusted keys is that one; if you trust it, name its .pub file too"
        )
    return Opened(statements, key)


def producer(signer: Signer, who: str) -> dict[str, Any]:
    """Who signs, as the resource descriptor that a statement carries: a name, and the public key with its digest."""
    public = signer.public
    return {"name": who, "digest": {"sha256": hashlib.sha256(public).hexdigest()}, "content": _text(public)}


def _payload(line: bytes, where: str) -> tuple[bytes, str, bytes]:
    """Payload, key id and signature of one line. Raises BadCertificate unless it is a bundle in canonical form."""
    bundle = _canonical(line.removesuffix(b"\n"), where)
    if not line.endswith(b"\n"):
        raise BadCertificate(f"{where} does not end: the certificate was cut off; get it again")
    try:
        _same(bundle["mediaType"], BUNDLE, f"{where}: mediaType")
        envelope = bundle["dsseEnvelope"]
        _same(envelope["payloadType"], PAYLOAD, f"{where}: dsseEnvelope.payloadType")
        (signature,) = envelope["signatures"]
        material = {"publicKey": {"hint": signature["keyid"]}, "tlogEntries": []}
        _same(bundle["verificationMaterial"], material, f"{where}: verificationMaterial")
        for name, value, known in (
            ("", bundle, {"mediaType", "dsseEnvelope", "verificationMaterial"}),
            ("dsseEnvelope", envelope, {"payload", "payloadType", "signatures"}),
            ("dsseEnvelope.signatures[0]", signature, {"keyid", "sig"}),
        ):
            _same(sorted(value), sorted(known), f"{where}: the fields of {name or 'the bundle'}")
        payload = _bytes(envelope["payload"], f"{where}: dsseEnvelope.payload")
        return payload, str(signature["keyid"]), _bytes(signature["sig"], f"{where}: dsseEnvelope.signatures[0].sig")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCertificate(f"{where} is no Sigstore bundle with one signature ({error}); get it again") from error


def _canonical(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = read_json(raw, where)
        again = canonical_json(value)
    except (BadManifest, ValueError, RecursionError) as error:
        raise BadCertificate(f"{where} cannot be read: {error}") from error
    if again != raw:
        raise BadCertificate(
            f"{where} is not in canonical form (sorted keys, each once, no spaces): it was written again by "
            "another program; get the file as it was signed"
        )
    return value


def _named_key(statements: Iterable[Mapping[str, Any]]) -> bytes:
    """The public key of whoever signed, which exactly one statement names as its producer."""
    field = "payload.predicate.producer"
    try:
        (named,) = (each["predicate"]["producer"] for each in statements if "producer" in each["predicate"])
        key = _bytes(named["content"], f"{field}.content")
        _same(named["digest"], {"sha256": hashlib.sha256(key).hexdigest()}, f"{field}.digest")
    except (KeyError, TypeError, ValueError) as error:
        raise BadCertificate(f"{field} is missing or damaged; it names who signed") from error
    if len(key) != 32:
        raise BadCertificate(f"{field}.content is no Ed25519 public key")
    return key


def _fits(key: bytes, signature: bytes, payload: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _encoded(payload))
    except (InvalidSignature, ValueError):
        return False
    return True


def _encoded(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding of a payload and its type."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)


def _same(got: object, wanted: object, field: str) -> None:
    if got != wanted:
        raise BadCertificate(f"{field} is {got!r}, and should be {wanted!r}")


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _bytes(text: object, field: str) -> bytes:
    try:
        value = base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadCertificate(f"{field} is not base64") from error
    if _text(value) != text:
        raise BadCertificate(f"{field} is not canonical base64")
    return value


Outcome = Literal["holds", "fails", "not checked"]
FindBase = Callable[[str], Base | None]
"""The base to compose on for a stated fingerprint, or None where there is none."""
FindPatch = Callable[[Base, str], Patch | None]
"""The patch of an id for a base, or None where it is not to be had."""
Rerun = Callable[[Mapping[str, Any], Base, Composition], list[ResultRecord]]
"""Runs a suite again, from what the certificate states of the run, on a base and what was composed on it."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: the field of the certificate, what came out, and why."""

    field: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Verification:
    """All checks of one certificate, and what it states in short."""

    checks: tuple[Finding, ...]
    facts: Mapping[str, Any]

    @property
    def good(self) -> bool:
        """Whether nothing failed; what was not checked is listed among the checks."""
        return all(check.outcome != "fails" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {"good": self.good, "facts": dict(self.facts), "checks": [vars(check) for check in self.checks]}


def check_certificate(
    file: Path,
    *,
    keys: Keyring | None = None,
    find_base: FindBase = lambda fingerprint: None,
    find_patch: FindPatch = lambda base, patch_id: None,
    checkpoint: Path | None = None,
    rerun: Rerun | None = None,
    today: date | None = None,
) -> Verification:
    """Check a certificate against whatever is given; what is not given is "not checked".

    Raises BadCertificate for a file that is damaged, altered, spelled otherwise or signed by somebody else: nothing that it
    states means anything then.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(LIMIT + 1)
    except OSError as error:
        raise OverpaintError(f"cannot read the certificate {file}: {error.strerror}") from error
    if len(content) > LIMIT:
        raise BadCertificate(f"{file} is longer than {LIMIT:,} bytes, which no certificate is")
    certificate = opened(content, keys)
    if set(certificate.statements) != {REPORT, TESTS}:
        raise BadCertificate(
            f"payload.predicateType: a certificate has a report ({REPORT}) and test results ({TESTS}), and nothing else; "
            f"this one has {', '.join(sorted(certificate.statements))}"
        )
    report, tests = certificate.statements[REPORT], certificate.statements[TESTS]
    facts = stated(report)
    (recipe,), (validity,) = facts["RECIPE"], facts["VALIDITY"]
    signed = f"by {key_id(certificate.key)} ({report['predicate']['producer'].get('name', '')})"
    signer = Finding("signature", "holds", f"{signed}, whom you trust")
    if keys is None:
        signer = Finding(
            "signature", "not checked", f"it fits the key {signed}; nobody said whom to trust (--trust KEY)"
        )
    checks = [
        signer,
        _validity(validity, recipe, today or datetime.now(timezone.utc).date()),
        *_consistency(report, tests, facts),
        *_bytes_and_composition(report, facts, file, find_base, find_patch, checkpoint, rerun),
    ]
    short = {
        "recipe": recipe["name"],
        "base": recipe["base"],
        "concepts": [each["concept"] for each in facts.get("CONCEPT_HIDDEN", ())],
        "result": tests["predicate"].get("result"),
        **validity,
    }
    return Verification(tuple(checks), short)


def _validity(validity: Mapping[str, Any], recipe: Mapping[str, Any], today: date) -> Finding:
    """Whether the day on which it expires is still to come: the stated one, or an earlier one of a patch of the recipe."""
    days = [
        day
        for day in (validity.get("expires"), *(each.get("expires") for each in recipe["patches"]))
        if day is not None
    ]
    try:
        first = min(map(date.fromisoformat, days), default=None)
    except (TypeError, ValueError):
        return Finding("VALIDITY.expires", "fails", f"one of {', '.join(map(repr, days))} is no date")
    if first is None:
        return Finding("VALIDITY.expires", "holds", "it does not expire")
    expired = first <= today
    return Finding(
        "VALIDITY.expires", "fails" if expired else "holds", f"{'expired' if expired else 'expires'} on {first}"
    )


def _consistency(
    report: Mapping[str, Any], tests: Mapping[str, Any], facts: Mapping[str, list[Mapping[str, Any]]]
) -> Iterator[Finding]:
    """Whether the certificate agrees with itself: subjects, recipe, patches, and test results with the numbers."""
    (recipe,), files = facts["RECIPE"], _subject_files(report)
    subjects = subjects_of(recipe, files)
    for statement, name in ((report, "the report"), (tests, "the test results")):
        same = statement.get("subject") == subjects
        yield Finding(f"subject of {name}", "holds" if same else "fails", "its digest is that of the stated recipe")
    listed = [(each["patch"], each["strength"]) for each in recipe["patches"]]
    hidden = [(each["patch"], each["strength"]) for each in facts.get("CONCEPT_HIDDEN", ())]
    yield Finding(
        "CONCEPT_HIDDEN", "holds" if listed == hidden else "fails", f"{len(hidden)} patches, those of the recipe"
    )
    runs = [*facts.get("MEASURED", ()), *facts.get("COUNTER_EVIDENCE", ())]
    (weights,) = facts["WEIGHTS"]
    for run in runs:
        same = run.get("weights") == weights["digest"]
        yield Finding(
            f"MEASURED.weights ({run['suite']})", "holds" if same else "fails", "judged were the stated weights"
        )
    yield _tests_follow(tests["predicate"], runs)


def _tests_follow(predicate: Mapping[str, Any], runs: list[Mapping[str, Any]]) -> Finding:
    """Whether passed, warned and failed are what the numbers come to under the stated thresholds."""
    try:
        outcomes: dict[str, list[str]] = {"yes": [], "no": [], "undecided": []}
        for entry in predicate["configuration"]:
            (run,) = (run for run in runs if json_digest(run) == entry["digest"]["sha256"])
            thresholds = Thresholds(**entry["annotations"]["thresholds"])
            for test in tests_of(_record(run), thresholds):
                outcomes[test.holds if test.holds in outcomes else "undecided"].append(test.name)
        lists = [predicate["passedTests"], predicate["failedTests"], predicate["warnedTests"]]
        result = "FAILED" if outcomes["no"] else "WARNED" if outcomes["undecided"] or not any(lists) else "PASSED"
        same = list(outcomes.values()) == lists and predicate["result"] == result
        same = same and len(predicate["configuration"]) == len(runs)
    except (KeyError, TypeError, ValueError, AttributeError, OverpaintError):
        same = False
    detail = f"{predicate.get('result')}: {len(predicate.get('passedTests', ()))} thresholds hold"
    return Finding(
        "test-result", "holds" if same else "fails", f"{detail}, as the stated numbers have it" if same else detail
    )


def _record(run: Mapping[str, Any]) -> EvaluationRecord:
    return EvaluationRecord(
        patch=None,
        recipe=None,
        revision=None,
        digest=run["weights"],
        suite=run["suite"],
        judge=run["judge"],
        seed=run["seed"],
        settings=run["settings"],
        versions=run["versions"],
        seconds=0.0,
        who=run["by"],
        at=datetime.fromisoformat(run["at"]),
        results=tuple(ResultRecord(**result) for result in run["results"]),
    )


def _subject_files(report: Mapping[str, Any]) -> dict[str, str]:
    try:
        named = {each["name"]: each["digest"]["sha256"] for each in report["subject"]}
    except (KeyError, TypeError) as error:
        raise BadCertificate(f"subject: each has a name and a digest.sha256 ({error})") from error
    named.pop("recipe", None)
    return named


def _bytes_and_composition(
    report: Mapping[str, Any],
    facts: Mapping[str, list[Mapping[str, Any]]],
    certificate: Path,
    find_base: FindBase,
    find_patch: FindPatch,
    checkpoint: Path | None,
    rerun: Rerun | None,
) -> Iterator[Finding]:
    """The checkpoint's files and weights, then base and patches composed again.

    The digests of files and those of tensors each read every byte, so they are computed side by side, while it is composed.
    """
    wanted = _subject_files(report)
    with ThreadPoolExecutor(2) as pool:
        digests = weights = None
        if checkpoint is not None:
            beside = [certificate, certificate.with_name(f"{certificate.name}.cdx.json")]
            built = Base.open(checkpoint)
            digests = pool.submit(file_digests, checkpoint, beside) if wanted else None
            weights = pool.submit(lambda: built.fingerprint)
        composed = list(_composition(facts, find_base, find_patch, rerun))
        yield from _files(wanted, digests.result() if digests else None, checkpoint)
        if weights is not None:
            digest = weights.result()
            same = digest == facts["WEIGHTS"][0]["digest"]
            yield Finding("WEIGHTS.digest of the checkpoint", "holds" if same else "fails", f"its weights are {digest}")
        yield from composed


def _files(wanted: Mapping[str, str], there: Mapping[str, str] | None, checkpoint: Path | None) -> Iterator[Finding]:
    if not wanted:
        detail = "the certificate is about a recipe and names no files" if checkpoint else "it names none"
        yield Finding("subject files", "not checked", detail)
        return
    if there is None:
        yield Finding("subject files", "not checked", f"{len(wanted)} files; give the checkpoint with --checkpoint")
        return
    wrong = False
    for name in sorted({*wanted, *there}):
        if wanted.get(name) != there.get(name):
            wrong = True
            why = "missing" if name not in there else "not in the certificate" if name not in wanted else "altered"
            yield Finding(f"subject {name}", "fails", f"the file is {why}")
    if not wrong:
        yield Finding("subject files", "holds", f"all {len(wanted)} files are as certified")


def _composition(
    facts: Mapping[str, list[Mapping[str, Any]]],
    find_base: FindBase,
    find_patch: FindPatch,
    rerun: Rerun | None,
) -> Iterator[Finding]:
    """Base and patches composed again, and if asked for the suites run again."""
    (recipe,), (weights,), (inputs,) = facts["RECIPE"], facts["WEIGHTS"], facts["TEXT_INPUTS"]
    named = recipe["base"]
    base = find_base(named["fingerprint"])
    if base is None:
        yield Finding("WEIGHTS", "not checked", "composing them again needs the base (--base)")
        return
    if base.fingerprint != named["fingerprint"]:
        yield Finding("RECIPE.base.fingerprint", "fails", f"the base given is another one: {base.fingerprint}")
        return
    yield Finding(
        "RECIPE.base.fingerprint", "holds", f"the base is the one that is stated, {named['fingerprint'][:12]}"
    )
    patches: list[tuple[Patch, float, date | None]] = []
    for entry in recipe["patches"]:
        patch = find_patch(base, entry["patch"])
        if patch is None:
            why = "composing them again needs the patches, from a registry or with --from; not to be had: "
            yield Finding("WEIGHTS", "not checked", why + entry["patch"][:12])
            return
        day = date.fromisoformat(entry["expires"]) if entry["expires"] else None
        patches.append((patch, entry["strength"], day))
    made = Composition.of(base, named["name"], patches, recipe["name"], recipe["revision"])
    yield from _compared(facts, made, weights, inputs)
    runs = [*facts.get("MEASURED", ()), *facts.get("COUNTER_EVIDENCE", ())]
    for run in runs:
        field = f"MEASURED.results ({run['suite']})"
        if rerun is None:
            yield Finding(field, "not checked", "drawing and judging again takes a while; ask for it with --rerun")
        else:
            yield run_again(field, run, rerun(run, base, made))


def _compared(
    facts: Mapping[str, list[Mapping[str, Any]]],
    made: Composition,
    weights: Mapping[str, Any],
    inputs: Mapping[str, Any],
) -> Iterator[Finding]:
    stated_tensors = dict(weights["changed"])
    wrong = sorted(n for n in {*stated_tensors, *made.tensors} if stated_tensors.get(n) != made.tensors.get(n))
    for name in wrong:
        yield Finding(f"WEIGHTS.changed[{name}]", "fails", "base and patches compose to another tensor")
    same = weights["digest"] == made.weights
    detail = f"base and {len(made.patches)} patches compose to {made.weights}"
    yield Finding("WEIGHTS.digest", "holds" if same and not wrong else "fails", detail)
    for field, value, now in (
        ("RECIPE", facts["RECIPE"][0], made.record),
        ("TEXT_INPUTS.covered", inputs.get("covered"), list(made.covered)),
        ("TEXT_INPUTS.uncovered", inputs.get("uncovered"), list(made.uncovered)),
    ):
        yield Finding(
            field, "holds" if value == now else "fails", "as base and patches have it" if value == now else f"{now}"
        )
    concepts = {patch.id: patch for patch, _, _ in made.patches}
    for each in facts.get("CONCEPT_HIDDEN", ()):
        solver = concepts[each["patch"]].manifest["solver"]
        wanted = {
            "concept": concepts[each["patch"]].concept.name,
            "solver": solver.get("name"),
            "settings": solver.get("settings", {}),
            "seed": solver.get("seed"),
        }
        if differing := [key for key, value in wanted.items() if each.get(key) != value]:
            yield Finding(f"CONCEPT_HIDDEN.{differing[0]}", "fails", f"patch {each['patch'][:12]} says {wanted}")


def run_again(field: str, run: Mapping[str, Any], results: list[ResultRecord]) -> Finding:
    """Whether a suite that was run again gives the same numbers; another machine may round a picture otherwise."""
    before = {(each["subject"], each["metric"]): each for each in run["results"]}
    moved = []
    for result in results:
        stated_result = before.get((result.subject, result.metric))
        if stated_result is None:
            return Finding(field, "fails", f"{result.subject}: {result.metric} is not in the certificate")
        low, high = stated_result["low"], stated_result["high"]
        inside = stated_result["value"] == result.value or (low is not None and low <= result.value <= high)
        if not inside:
            moved.append(
                f"{result.subject}, {result.metric}: {stated_result['value']:.4g} then, {result.value:.4g} now"
            )
    if moved:
        return Finding(field, "fails", "; ".join(moved[:3]))
    if missing := sorted(before.keys() - {(result.subject, result.metric) for result in results}):
        return Finding(field, "fails", f"{missing[0][0]}: {missing[0][1]} did not come out again")
    exact = all(before[r.subject, r.metric]["value"] == r.value for r in results)
    return Finding(field, "holds", "run again: the same numbers" if exact else "run again: within the stated intervals")
