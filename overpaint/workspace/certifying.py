"""Certificates of recipes and checkpoints: gather what is stated, sign it, and check somebody else's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timezone
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from overpaint.bases.base import Base
from overpaint.certificates.checking import Verification, check_certificate, producer, signed_lines
from overpaint.certificates.statement import (
    SIGNATURE,
    Certificate,
    Composition,
    Thresholds,
    bill_of_materials,
    file_digests,
)
from overpaint.core.atomic import refuse_taken, require_parent, write_new
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import typed_path
from overpaint.core.reporting import silent
from overpaint.evaluation.context import EvaluatedPatch
from overpaint.evaluation.suites import configured
from overpaint.patches.build import records
from overpaint.patches.patch import Patch
from overpaint.registry.records import EvaluationRecord, ResultRecord
from overpaint.registry.registry import Registry
from overpaint.registry.sharing.signing import load_keyring, load_signer
from overpaint.workspace.evaluating import EvaluationRequest, open_context
from overpaint.workspace.opened import OpenRegistry


@dataclass(frozen=True)
class Certified:
    """The files that were written, and what they state in short: the thresholds and whether they hold."""

    file: Path
    bill: Path
    result: Mapping[str, str]


def certify(
    opened: OpenRegistry,
    subject: str,
    out: Path,
    *,
    key: Path,
    who: str,
    expires: date | None = None,
    thresholds: Thresholds | None = None,
) -> Certified:
    """Certify a recipe (NAME, NAME@REVISION) or a checkpoint that Overpaint built, in two new files: `out` and its bill.

    What is stated of pictures is every suite that was run on exactly these weights, the latest run of each. The
    certificate expires with the first patch of the recipe that does, or earlier with `expires`: from that day (in UTC) on it
    does not hold. Raises NotFound for an unknown recipe or a checkpoint that is none of ours, OverpaintError when nothing
    was measured of these weights, or when that day has come already.
    """
    for path in (out, bill_beside(out)):
        require_parent(path)
        refuse_taken(path)
    checkpoint = typed_path(subject) if not opened.registry.has_recipe(subject.partition("@")[0]) else None
    signer = load_signer(key)
    files: Mapping[str, str] = {}
    if checkpoint is None:
        composition = _of_recipe(opened, subject)
    elif not checkpoint.exists():
        raise NotFound(f"there is no recipe and no checkpoint {subject!r}; see `overpaint recipe list`")
    else:
        composition, files = _of_checkpoint(opened, checkpoint, but=(out, bill_beside(out)))
    runs = _runs(opened.registry, composition.weights)
    if not runs:
        raise OverpaintError(
            f"nothing was measured of these weights ({composition.weights[:12]}); run "
            f"`overpaint evaluate {composition.recipe or 'RECIPE'}` first"
        )
    first = min((day for day in (expires, composition.expires) if day is not None), default=None)
    issued = datetime.now(timezone.utc)
    if first is not None and first <= issued.date():
        raise OverpaintError(
            f"the certificate would have expired already: on {first}, by {'--expires' if first == expires else 'a patch'}, and "
            f"today is {issued.date()}, in UTC; name a later day, for a patch with `overpaint patch add --expires`"
        )
    certificate = Certificate(
        composition=composition,
        runs=runs,
        who=who,
        issued=issued,
        expires=first,
        files=files,
        thresholds=thresholds or Thresholds(),
    )
    write_new(out, signed_lines(certificate.statements(producer(signer, who)), signer))
    write_new(bill_beside(out), bill_of_materials(certificate))
    return Certified(out, bill_beside(out), {test.name: test.holds for test in certificate.tests})


def bill_beside(certificate: Path) -> Path:
    """The bill of materials that is written with a certificate."""
    return certificate.with_name(f"{certificate.name}.cdx.json")


def _of_recipe(opened: OpenRegistry, name: str) -> Composition:
    record = opened.registry.recipe(name)
    entries = [(opened.patch(each.patch), each.strength, each.until) for each in record.entries]
    return Composition.of(opened.base(record.base), record.base, entries, record.name, record.revision)


def _of_checkpoint(
    opened: OpenRegistry, checkpoint: Path, *, but: Iterable[Path]
) -> tuple[Composition, Mapping[str, str]]:
    """What a build's own record says it is made of, composed again, and the digests of its files without those in `but`.

    Raises OverpaintError when that is not what is there.
    """
    built = Base.open(checkpoint)
    stored = records(built.containers.values())
    if not stored:
        raise NotFound(
            f"nothing is hidden in {checkpoint}: Overpaint did not build it, and certifies only its own builds"
        )
    record = stored[0]
    base_name = next((b.name for b in opened.bases() if b.fingerprint == record["base"]), None)
    if base_name is None:
        raise NotFound(
            f"{checkpoint} was built on a base that this registry does not have ({record['base'][:12]}); add it"
        )
    recipe = str(record.get("recipe", ""))
    days, revision = _days(opened.registry, recipe, record)
    entries = [(opened.patch(p["id"]), float(p["strength"]), days.get(p["id"])) for p in record["patches"]]
    base = opened.base(base_name)
    with ThreadPoolExecutor(2) as pool:
        # Digests of files and those of tensors each read every byte: side by side, while it is composed.
        files, weights = pool.submit(file_digests, checkpoint, but), pool.submit(lambda: built.fingerprint)
        composition = Composition.of(base, base_name, entries, recipe, revision)
    if weights.result() != composition.weights:
        raise OverpaintError(
            f"the weights in {checkpoint} are {built.fingerprint[:12]}, and base and patches compose to "
            f"{composition.weights[:12]}; build it again, and see `overpaint inspect`"
        )
    return composition, files.result()


def _days(registry: Registry, recipe: str, record: Mapping[str, Any]) -> tuple[dict[str, date | None], int | None]:
    """On which day each patch expires, by the recipe of a build, and its revision where it holds just these patches."""
    name = recipe.partition("@")[0]
    if not name or not registry.has_recipe(name):
        return {}, None
    now = registry.recipe(recipe)
    built = sorted((patch["id"], float(patch["strength"])) for patch in record["patches"])
    same = sorted((each.patch, each.strength) for each in now.entries) == built
    return {each.patch: each.until for each in now.entries}, now.revision if same else None


def _runs(registry: Registry, weights: str) -> tuple[EvaluationRecord, ...]:
    """The latest run of every suite on these weights."""
    latest = {run.suite: run for run in registry.evaluations() if run.digest == weights}
    return tuple(latest[suite] for suite in sorted(latest))


def verify(
    opened: OpenRegistry,
    certificate: Path,
    *,
    trust: tuple[Path, ...] = (),
    base: Path | None = None,
    checkpoint: Path | None = None,
    source: str | None = None,
    rerun: bool = False,
) -> Verification:
    """Check a certificate with what is at hand: this registry's base and patches, or `base` and those of `source`.

    `source` is a file that `overpaint export` wrote, a folder or a URL that `overpaint push` wrote to. Raises
    BadCertificate for a certificate that is damaged, altered or not signed by a trusted key.
    """
    with ExitStack() as opened_meanwhile:
        registries = [opened]

        def find_base(fingerprint: str) -> Base | None:
            model = Base.open(base) if base else _known_base(opened, fingerprint)
            if source is not None and model is not None:
                registries.insert(0, opened_meanwhile.enter_context(_patches_of(source, model)))
            return model

        return check_certificate(
            certificate,
            keys=load_keyring(trust) if trust else None,
            find_base=find_base,
            find_patch=lambda model, patch_id: _patch(registries, patch_id),
            checkpoint=checkpoint,
            rerun=partial(_run_again, opened) if rerun else None,
        )


def _known_base(opened: OpenRegistry, fingerprint: str) -> Base | None:
    """The registry's base with a fingerprint, if it has one."""
    name = next((record.name for record in opened.bases() if record.fingerprint == fingerprint), None)
    return opened.base(name) if name else None


@contextmanager
def _patches_of(source: str, base: Base) -> Iterator[OpenRegistry]:
    """Within the block, a registry that holds what `source` shares for a base."""
    from overpaint.registry.sharing.ingest import PullRequest, import_file, pull

    with TemporaryDirectory(prefix="overpaint-") as folder:
        registry = Registry.open(Path(folder) / "registry")
        registry.add_base("base", Path(base.source), base.layout.name, base.fingerprint)
        if Path(source).is_file():
            import_file(registry, Path(source), PullRequest())
        else:
            pull(registry, source, PullRequest())
        yield OpenRegistry(registry)


def _patch(registries: list[OpenRegistry], patch_id: str) -> Patch | None:
    for each in registries:
        try:
            return each.patch(patch_id)
        except OverpaintError:
            continue
    return None


def _run_again(opened: OpenRegistry, stated: Mapping[str, Any], base: Base, made: Composition) -> list[ResultRecord]:
    """The numbers of a suite, drawn and judged anew as a certificate states that it was run."""
    sampler = stated["settings"]["sampler"]
    request = EvaluationRequest(
        suite=stated["suite"],
        settings={name: str(value) for name, value in stated["settings"]["suite"].items() if value != ""},
        judge=stated["settings"].get("judge", ""),
        seed=stated["seed"],
        steps=sampler["steps"],
        guidance=sampler["guidance"],
        device=sampler["device"],
    )
    evaluated = [EvaluatedPatch(patch, strength) for patch, strength, _ in made.patches]
    evaluated.sort(key=lambda each: each.concept.name)
    context = open_context(opened.registry, base, evaluated, request, silent, fresh=True)
    measurements = configured(request.suite, request.settings).run(context)
    return [ResultRecord(m.subject, m.metric, m.value, m.low, m.high, m.n) for m in measurements]


def sign_checkpoint(checkpoint: Path, key: Path) -> Path:
    """Write `model.sig` into a checkpoint's folder: its OpenSSF Model Signing v1.0 signature over every file.

    `key` is a P-256 key (`overpaint key new FILE --for-checkpoints`), the kind that `model_signing verify` reads. Raises
    OverpaintError when the package is missing, or the key of another kind.
    """
    try:
        import model_signing
    except ImportError as error:
        raise OverpaintError("signing a checkpoint needs model-signing: pip install 'overpaint[certify]'") from error
    if not checkpoint.is_dir():
        raise OverpaintError(
            f"{checkpoint} is a single file; `model.sig` goes into a folder: build one, or put it into one"
        )
    target = checkpoint / SIGNATURE
    try:
        config = model_signing.signing.Config().use_elliptic_key_signer(private_key=key)
        config.set_hashing_config(model_signing.hashing.Config().set_ignored_paths(paths=[target]))
        config.sign(checkpoint, target)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise OverpaintError(
            f"cannot sign {checkpoint} with {key} ({error}); `overpaint key new FILE --for-checkpoints` makes a key for this"
        ) from error
    return target
