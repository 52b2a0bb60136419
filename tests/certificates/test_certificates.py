"""A certificate says what was composed and measured, and every alteration of it is refused with the field named."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from in_toto_attestation.predicates.scai.v0.scai import AttributeAssertion
from in_toto_attestation.v1.statement import Statement

from overpaint.certificates.checking import Verification, check_certificate, producer, run_again, signed_lines
from overpaint.certificates.statement import REPORT, TESTS, BadCertificate
from overpaint.core.encoding import canonical_json, evenly_spaced
from overpaint.core.errors import OverpaintError
from overpaint.registry.history import today
from overpaint.registry.records import ResultRecord
from overpaint.registry.sharing.signing import load_keyring, load_signer, new_key
from overpaint.workspace.certifying import Certified, bill_beside, certify, sign_checkpoint, verify
from overpaint.workspace.workspace import Workspace
from tests.evaluation.pages import evaluated
from tests.shell import Shell


@pytest.fixture(scope="module")
def workspace(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The tiny base with six patches on the recipe safe, every suite measured."""
    return evaluated(tmp_path_factory.mktemp("certified") / "registry", base_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two key pairs: that of whoever certifies, and a stranger's."""
    place = tmp_path_factory.mktemp("keys")
    for name in ("me", "stranger"):
        new_key(place / name)
    return place


@pytest.fixture(scope="module")
def checkpoint(workspace: Workspace, folder: Path) -> Path:
    """The recipe, built."""
    return workspace.recipe("safe").build(folder / "built").path


@pytest.fixture(scope="module")
def certified(workspace: Workspace, folder: Path, checkpoint: Path) -> Certified:
    """The certificate of the checkpoint."""
    return certify(workspace, str(checkpoint), folder / "safe.cert", key=folder / "me", who="Alice")


def checked(workspace: Workspace, file: Path, folder: Path, **more: Any) -> Verification:
    return verify(workspace, file, trust=(folder / "me.pub",), **more)


def outcomes(found: Verification, outcome: str) -> list[str]:
    return [check.field for check in found.checks if check.outcome == outcome]


def test_with_base_patches_and_checkpoint_everything_but_the_pictures_is_checked(
    workspace: Workspace, certified: Certified, folder: Path, checkpoint: Path
) -> None:
    found = checked(workspace, certified.file, folder, checkpoint=checkpoint)
    assert found.good
    assert all(field.startswith("MEASURED.results") for field in outcomes(found, "not checked"))
    assert {"signature", "subject files", "WEIGHTS.digest", "WEIGHTS.digest of the checkpoint", "test-result"} <= set(
        outcomes(found, "holds")
    )


def test_without_the_base_the_rest_is_checked_and_unchecked_fields_are_listed(
    certified: Certified, folder: Path, tmp_path: Path
) -> None:
    found = verify(Workspace.open(tmp_path / "empty"), certified.file)
    assert found.good
    assert {"signature", "subject files", "WEIGHTS"} <= set(outcomes(found, "not checked"))


def test_patches_may_come_from_a_file_that_was_exported(
    workspace: Workspace, certified: Certified, folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    workspace.export(tmp_path / "patches.overpaint")
    elsewhere = Workspace.open(tmp_path / "elsewhere")
    found = checked(elsewhere, certified.file, folder, base=base_folder, source=str(tmp_path / "patches.overpaint"))
    assert "WEIGHTS.digest" in outcomes(found, "holds")
    assert found.good


def test_suites_are_run_again_also_where_the_registry_has_neither_base_nor_patches(
    workspace: Workspace, certified: Certified, folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    """The tiny base has no judge of its own, which is what is said."""
    workspace.export(tmp_path / "patches.overpaint")
    elsewhere = Workspace.open(tmp_path / "elsewhere")
    with pytest.raises(OverpaintError, match="no judge in"):
        checked(
            elsewhere,
            certified.file,
            folder,
            base=base_folder,
            source=str(tmp_path / "patches.overpaint"),
            rerun=True,
        )


def test_a_recipe_is_certified_by_itself(workspace: Workspace, folder: Path, tmp_path: Path) -> None:
    done = certify(workspace, "safe", tmp_path / "recipe.cert", key=folder / "me", who="Alice")
    found = checked(workspace, done.file, folder)
    assert found.good
    assert found.facts["recipe"] == "safe"
    assert set(done.result.values()) <= {"yes", "no", "not enough pictures"}


def test_an_altered_file_of_the_checkpoint_is_named(
    workspace: Workspace, certified: Certified, folder: Path, checkpoint: Path
) -> None:
    index = checkpoint / "model_index.json"
    before = index.read_bytes()
    try:
        index.write_bytes(before + b"\n")
        (checkpoint / "extra.txt").write_text("more")
        found = checked(workspace, certified.file, folder, checkpoint=checkpoint)
    finally:
        index.write_bytes(before)
        (checkpoint / "extra.txt").unlink()
    assert outcomes(found, "fails") == ["subject extra.txt", "subject model_index.json"]


def test_another_checkpoint_is_not_what_was_certified(
    workspace: Workspace, certified: Certified, folder: Path, base_folder: Path
) -> None:
    found = checked(workspace, certified.file, folder, checkpoint=base_folder)
    assert "WEIGHTS.digest of the checkpoint" in outcomes(found, "fails")


@pytest.mark.parametrize(("by_signer", "by_patch"), [(31, None), (None, 31), (31, 30), (30, 31), (31, 31)])
def test_a_certificate_does_not_hold_from_the_day_on_which_it_or_a_patch_expires(
    workspace: Workspace, folder: Path, tmp_path: Path, by_signer: int | None, by_patch: int | None
) -> None:
    given, of_patch = (date(2990, 1, day) if day else None for day in (by_signer, by_patch))
    first = min(day for day in (given, of_patch) if day)
    recipe, file = workspace.recipe("safe"), tmp_path / "soon.cert"
    recipe.add("cat", until=of_patch or "never", exist_ok=True)
    try:
        done = certify(workspace, "safe", file, key=folder / "me", who="Alice", expires=given)
    finally:
        recipe.add("cat", until="never", exist_ok=True)
    keys = load_keyring([folder / "me.pub"])
    assert check_certificate(file, keys=keys, today=first - timedelta(days=1)).good
    late = check_certificate(file, keys=keys, today=first)
    assert outcomes(late, "fails") == ["VALIDITY.expires"]
    evidence = json.loads(done.bill.read_text("utf-8"))["declarations"]["evidence"]
    assert {each["expires"] for each in evidence} == {f"{first}T00:00:00+00:00"}


@pytest.mark.parametrize("by_patch", [False, True])
def test_what_has_expired_today_is_not_certified(
    workspace: Workspace, folder: Path, tmp_path: Path, by_patch: bool
) -> None:
    recipe = workspace.recipe("safe")
    if by_patch:
        recipe.add("cat", until=today(), exist_ok=True)
    try:
        with pytest.raises(OverpaintError, match=r"would have expired already: on .* name a later day"):
            certify(
                workspace, "safe", tmp_path / "late.cert", key=folder / "me", who="Alice",
                expires=None if by_patch else today(),
            )  # fmt: skip
    finally:
        recipe.add("cat", until="never", exist_ok=True)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        for at, each in enumerate(value):
            yield from leaves(each, (*path, at))
    else:
        yield path


def altered(statement: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A copy of a statement with another value in one place."""
    copy = deepcopy(statement)
    at = copy
    for key in path[:-1]:
        at = at[key]
    old = at[path[-1]]
    at[path[-1]] = old + 1 if isinstance(old, int | float) and not isinstance(old, bool) else f"{old}x"
    return copy


def statements_of(file: Path) -> list[dict[str, Any]]:
    bundles = [json.loads(line) for line in file.read_text().splitlines()]
    return [json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"])) for bundle in bundles]


def test_every_field_that_is_altered_after_signing_is_refused(
    workspace: Workspace, certified: Certified, folder: Path, tmp_path: Path
) -> None:
    """A hundred values of both statements, every attribute among them, with the signature left as it was."""
    lines = certified.file.read_bytes().splitlines(keepends=True)
    keys, tried = load_keyring([folder / "me.pub"]), 0
    for number, statement in enumerate(statements_of(certified.file)):
        places = list(leaves(statement))
        first_of = {path[:4]: path for path in reversed(places)}.values()
        for path in {*evenly_spaced(places, 60), *first_of}:
            bundle = json.loads(lines[number])
            payload = canonical_json(altered(statement, path))
            bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
            forged = [*lines]
            forged[number] = canonical_json(bundle) + b"\n"
            file = tmp_path / "forged.cert"
            file.write_bytes(b"".join(forged))
            with pytest.raises(BadCertificate, match=r"payload|keyid|producer"):
                check_certificate(file, keys=keys)
            tried += 1
    assert tried >= 100


def test_every_field_of_the_envelope_is_checked(certified: Certified, folder: Path, tmp_path: Path) -> None:
    lines = certified.file.read_bytes().splitlines(keepends=True)
    bundle = json.loads(lines[0])
    for path in leaves(bundle):
        file = tmp_path / "forged.cert"
        file.write_bytes(canonical_json(altered(bundle, path)) + b"\n" + lines[1])
        with pytest.raises(BadCertificate, match=r"mediaType|hint|verificationMaterial|payload|sig|keyid|base64"):
            check_certificate(file, keys=load_keyring([folder / "me.pub"]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda line: json.dumps(json.loads(line), indent=1).replace("\n", "").encode() + b"\n",
            "not in canonical form",
        ),
        (lambda line: line.replace(b'{"dsse', b'{"mediaType":"x","dsse', 1), "not in canonical form"),
        (lambda line: line[:-1], "does not end|cannot be read"),
        (lambda line: line[: len(line) // 2] + b"\n", "cannot be read"),
        (lambda line: b"\n" + line, "cannot be read"),
        (lambda line: b"[]\n", "not a JSON object"),
        (lambda line: b"", "predicateType|producer"),
    ],
    ids=["spelled otherwise", "a key twice", "no last newline", "cut off", "an empty line", "no object", "a line gone"],
)
def test_only_the_canonical_form_is_accepted(
    certified: Certified, folder: Path, tmp_path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    first, second = certified.file.read_bytes().splitlines(keepends=True)
    for lines in ([spoil(first), second], [first, spoil(second)]):
        file = tmp_path / "spoilt.cert"
        file.write_bytes(b"".join(lines))
        with pytest.raises(BadCertificate, match=message):
            check_certificate(file, keys=load_keyring([folder / "me.pub"]))


def test_a_strangers_certificate_is_not_trusted(workspace: Workspace, folder: Path, tmp_path: Path) -> None:
    done = certify(workspace, "safe", tmp_path / "stranger.cert", key=folder / "stranger", who="Alice")
    with pytest.raises(BadCertificate, match="none of your 1 trusted keys"):
        checked(workspace, done.file, folder)
    assert outcomes(verify(workspace, done.file), "not checked")[0] == "signature"


@pytest.mark.parametrize(
    ("attribute", "field", "value", "failing"),
    [
        ("RECIPE", ("patches", 0, "strength"), 0.5, "WEIGHTS.digest"),
        ("RECIPE", ("base", "fingerprint"), "0" * 64, "subject of the report"),
        ("WEIGHTS", ("digest",), "0" * 64, "WEIGHTS.digest"),
        ("CONCEPT_HIDDEN", ("concept",), "dog", "CONCEPT_HIDDEN.concept"),
        ("CONCEPT_HIDDEN", ("solver",), "magic", "CONCEPT_HIDDEN.solver"),
        ("TEXT_INPUTS", ("uncovered",), ["text_encoder"], "TEXT_INPUTS.uncovered"),
        ("MEASURED", ("weights",), "0" * 64, "MEASURED.weights (crosstalk)"),
        ("VALIDITY", ("expires",), "soon", "VALIDITY.expires"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_trusted_signer_who_states_what_is_not_so_is_found_out(
    workspace: Workspace,
    certified: Certified,
    folder: Path,
    tmp_path: Path,
    attribute: str,
    field: Any,
    value: Any,
    failing: str,
) -> None:
    """The signature is good; base and patches say otherwise."""
    report, tests = statements_of(certified.file)
    at = next(a for a in report["predicate"]["attributes"] if a["attribute"] == attribute)["conditions"]
    for key in field[:-1]:
        at = at[key]
    at[field[-1]] = value
    file = tmp_path / "lie.cert"
    file.write_bytes(signed_lines([report, tests], load_signer(folder / "me")))
    assert failing in outcomes(checked(workspace, file, folder), "fails")


def test_test_results_follow_from_the_stated_numbers(
    workspace: Workspace, certified: Certified, folder: Path, tmp_path: Path
) -> None:
    report, tests = statements_of(certified.file)
    tests["predicate"]["result"], tests["predicate"]["failedTests"] = "PASSED", []
    tests["predicate"]["passedTests"].append("erased: everything")
    file = tmp_path / "lie.cert"
    file.write_bytes(signed_lines([report, tests], load_signer(folder / "me")))
    assert outcomes(checked(workspace, file, folder), "fails") == ["test-result"]


def test_a_library_for_attestations_reads_the_statements(certified: Certified) -> None:
    for statement in statements_of(certified.file):
        read = Statement([], statement["predicateType"], statement["predicate"])
        for subject in statement["subject"]:
            read.pb.subject.add(name=subject["name"], digest=subject["digest"])
        read.validate()
    report, _ = statements_of(certified.file)
    for each in report["predicate"]["attributes"]:
        AttributeAssertion(each["attribute"], conditions=each["conditions"]).validate()
    assert {statement["predicateType"] for statement in statements_of(certified.file)} == {REPORT, TESTS}


def test_the_signature_is_dsse(certified: Certified, folder: Path) -> None:
    """By the rules of DSSE alone, without our own reader."""
    key = load_pem_private_key((folder / "me").read_bytes(), None)
    for line in certified.file.read_text().splitlines():
        envelope = json.loads(line)["dsseEnvelope"]
        payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
        encoded = b"DSSEv1 " + b" ".join([str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
        key.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), encoded)  # type: ignore[union-attr,call-arg]


def test_the_bill_of_materials_is_valid_cyclonedx(certified: Certified) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = certified.bill.read_text("utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_7).validate_str(text) is None
    bill = json.loads(text)
    model = bill["metadata"]["component"]
    assert len(model["pedigree"]["patches"]) == 6
    assert any("confidenceInterval" in m for m in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"])
    assert bill["declarations"]["claims"][0]["counterEvidence"] == ["run:probes"]


def test_openssf_model_signing_accepts_the_checkpoints_signature(
    workspace: Workspace, certified: Certified, checkpoint: Path, folder: Path
) -> None:
    import model_signing

    new_key(folder / "p256", for_checkpoints=True)
    signature = sign_checkpoint(checkpoint, folder / "p256")
    try:
        verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=folder / "p256.pub")
        ignored = model_signing.hashing.Config().set_ignored_paths(paths=[signature])
        verifier.set_hashing_config(ignored).verify(checkpoint, signature)
        signed = json.loads(base64.b64decode(json.loads(signature.read_text())["dsseEnvelope"]["payload"]))
        digests = {each["name"]: each["digest"] for each in signed["predicate"]["resources"]}
        report, _ = statements_of(certified.file)
        assert digests == {
            each["name"]: each["digest"]["sha256"] for each in report["subject"] if each["name"] != "recipe"
        }
        assert checked(workspace, certified.file, folder, checkpoint=checkpoint).good
        (checkpoint / "more.txt").write_text("more")
        with pytest.raises(ValueError, match=r"more\.txt"):
            verifier.verify(checkpoint, signature)
    finally:
        signature.unlink()
        (checkpoint / "more.txt").unlink(missing_ok=True)


def test_an_ed25519_key_does_not_sign_checkpoints(checkpoint: Path, folder: Path) -> None:
    with pytest.raises(OverpaintError, match="--for-checkpoints"):
        sign_checkpoint(checkpoint, folder / "me")
    assert not (checkpoint / "model.sig").exists()


def test_nothing_is_certified_that_was_not_measured(workspace: Workspace, folder: Path, tmp_path: Path) -> None:
    recipe = workspace.recipe("safe")
    recipe.remove(recipe.patches()[0][0])
    try:
        with pytest.raises(OverpaintError, match="overpaint evaluate safe"):
            certify(workspace, "safe", tmp_path / "no.cert", key=folder / "me", who="Alice")
    finally:
        recipe.undo()
    assert not (tmp_path / "no.cert").exists()
    assert not bill_beside(tmp_path / "no.cert").exists()


def test_the_commands(workspace: Workspace, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    shell, file = Shell(workspace.registry.folder), tmp_path / "c.cert"
    shell.ok("certify", str(checkpoint), "-o", str(file), "--key", str(folder / "me"))
    words = ("verify-certificate", str(file), "--trust", str(folder / "me.pub"), "--checkpoint", str(checkpoint))
    assert json.loads(shell.ok(*words, "--json"))["good"]
    assert "nothing failed" in shell.ok(*words)
    (checkpoint / "extra.txt").write_text("more")
    try:
        assert shell(*words).exit_code == 1
    finally:
        (checkpoint / "extra.txt").unlink()
    assert "already there" in shell.fails("certify", "safe", "-o", str(file), "--key", str(folder / "me"))
    assert "no recipe and no checkpoint" in shell.fails(
        "certify", "no", "-o", str(tmp_path / "n"), "--key", str(folder / "me")
    )
    assert "cannot read" in shell.fails("verify-certificate", str(tmp_path / "nothing"))


def test_inspect_explains_a_checkpoint_from_its_weights_alone(workspace: Workspace, checkpoint: Path) -> None:
    shell = Shell(workspace.registry.folder)
    found = json.loads(shell.ok("inspect", str(checkpoint), "--explain", "--json"))
    assert {round(each["strength"], 1) for each in found["patches"]} == {1.0}
    assert found["residual"] < 0.05
    assert "explained by no patch" in shell.ok("inspect", str(checkpoint), "--explain", "--base", "tiny")


def test_a_build_is_signed_as_it_is_made(workspace: Workspace, folder: Path, tmp_path: Path) -> None:
    shell, key = Shell(workspace.registry.folder), tmp_path / "signer"
    shell.ok("key", "new", str(key), "--for-checkpoints")
    assert "model.sig" in shell.ok("build", "safe", str(tmp_path / "built"), "--sign", str(key))
    assert json.loads((tmp_path / "built" / "model.sig").read_text())["dsseEnvelope"]


def test_a_producer_is_named_by_key(folder: Path) -> None:
    assert len(base64.b64decode(producer(load_signer(folder / "me"), "Alice")["content"])) == 32


def test_a_suite_that_gives_fewer_numbers_than_stated_does_not_agree() -> None:
    stated = {"subject": "cat", "metric": "accuracy", "value": 0.9, "low": 0.8, "high": 1.0}
    again = ResultRecord("cat", "accuracy", 0.9, 0.8, 1.0, 20)
    other = {**stated, "subject": "dog"}
    assert run_again("MEASURED", {"results": [stated]}, [again]).outcome == "holds"
    assert run_again("MEASURED", {"results": [stated, other]}, [again]).outcome == "fails"
    assert run_again("MEASURED", {"results": [stated]}, []).outcome == "fails"
