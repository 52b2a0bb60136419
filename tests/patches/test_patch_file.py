"""The patch file: same patch, same bytes; whatever is not whole is refused, and the message names the array."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.encoding import canonical_json
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import BadDelta, Dense, LowRank, TextMap
from overpaint.patches.patch import BadPatch, Patch, WrongBase, described, file_of, make_patch, read_patch
from tests.small_bases import KINDS, WIDTH, equal, small_base, some_delta

KEY = "unet/down.attn2.to_k.weight"
CONCEPT = Concept("Ein Käse, 'quoted'", "style", ("fromage",))
SOLVER = {"name": "test", "settings": {"rate": 1e-7}, "seed": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return small_base(tmp_path_factory.mktemp("patches") / "base", torch.float16)


@pytest.fixture(scope="module")
def patch(base: Base) -> Patch:
    rng = torch.Generator().manual_seed(0)
    return make_patch(base, CONCEPT, TextMap("text_encoder", *torch.randn(2, WIDTH, 2, generator=rng)), SOLVER)


def test_a_patch_reads_back_with_the_same_id_and_bytes(patch: Patch) -> None:
    back = read_patch(patch.blob)
    assert back.id == patch.id
    assert back.blob == patch.blob
    assert back.delta == patch.delta
    assert back.concept == CONCEPT


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    seed=st.integers(0, 10**6),
    name=st.text(min_size=1).filter(str.strip),
)
def test_every_kind_reads_back(base: Base, kind: str, dtype: torch.dtype, seed: int, name: str) -> None:
    try:
        concept = Concept(name)
        canonical_json(concept.as_json())
    except UnicodeEncodeError:
        return
    patch = make_patch(base, concept, some_delta(base, kind, seed, 2, dtype), SOLVER)
    back = read_patch(patch.blob)
    assert (back.id, back.blob, back.delta, back.concept) == (patch.id, patch.blob, patch.delta, concept)
    assert equal(*(compose(base, [Term("a", delta)]) for delta in (back.delta, patch.delta)))


def test_a_patch_is_a_safetensors_file(patch: Patch, tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").write_bytes(patch.blob)
    with safe_open(tmp_path / "p.safetensors", framework="pt") as reader:
        assert sorted(reader.keys()) == ["text_encoder/down", "text_encoder/up"]
        assert torch.equal(reader.get_tensor("text_encoder/up"), patch.delta.tensors()["text_encoder/up"])
        assert json.loads(reader.metadata()["overpaint"])["concept"]["name"] == CONCEPT.name


def test_the_order_of_a_manifest_does_not_change_the_id(patch: Patch) -> None:
    turned = Patch(dict(reversed(patch.manifest.items())), patch.delta)
    assert turned.id == patch.id
    assert turned.blob == patch.blob


def test_a_file_written_in_another_order_is_the_same_patch(patch: Patch) -> None:
    header, data = header_of(patch.blob)
    up, down = header["text_encoder/up"]["data_offsets"], header["text_encoder/down"]["data_offsets"]
    size = up[1] - up[0]
    header["text_encoder/up"]["data_offsets"], header["text_encoder/down"]["data_offsets"] = [0, size], [size, 2 * size]
    other = with_header(dict(reversed(header.items())), data[slice(*up)] + data[slice(*down)])
    assert other != patch.blob
    assert read_patch(other).blob == patch.blob


def test_low_rank_patches_of_the_first_format_keep_their_id_and_bytes(base: Base) -> None:
    up, down = torch.randn(6, 2), torch.randn(2, WIDTH)
    delta = LowRank({KEY: (up, down)})
    arrays = {f"{KEY}/up": up, f"{KEY}/down": down}
    manifest = {**make_patch(base, CONCEPT, delta, SOLVER).manifest, "format": 1, "arrays": described(arrays)}
    blob = file_of(manifest, arrays)
    back = read_patch(blob)
    assert back.delta == delta
    assert back.blob == blob


@pytest.mark.parametrize(("kind", "version"), [("text-map", 1), ("dense", 1), ("low-rank", 2), ("xor", 2), ("sum", 2)])
def test_a_patch_names_the_first_format_that_has_its_kind(base: Base, kind: str, version: int) -> None:
    assert make_patch(base, CONCEPT, some_delta(base, kind, 0), SOLVER).manifest["format"] == version


# What is refused


def header_of(blob: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", blob[:8])
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def with_header(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


Damage = Callable[[bytes], bytes]


def entry(**changes: Any) -> Damage:
    """Change the header's entry of one array."""

    def damage(blob: bytes) -> bytes:
        header, data = header_of(blob)
        header["text_encoder/up"].update(changes)
        return with_header(header, data)

    return damage


def manifest(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the manifest."""

    def damage(blob: bytes) -> bytes:
        header, data = header_of(blob)
        content = json.loads(header["__metadata__"]["overpaint"])
        change(content)
        return with_header({**header, "__metadata__": {"overpaint": json.dumps(content)}}, data)

    return damage


def array(name: str = "text_encoder/extra", at: tuple[int, int] = (128, 132), data: bytes = b"\0" * 4) -> Damage:
    """Add an array to the container."""

    def damage(blob: bytes) -> bytes:
        header, before = header_of(blob)
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": list(at)}
        return with_header(header, before + data)

    return damage


def twice(blob: bytes) -> bytes:
    header, data = header_of(blob)
    raw = json.dumps(header)
    return with_header(
        (raw[:-1] + ', "text_encoder/up": ' + json.dumps(header["text_encoder/up"]) + "}").encode(), data
    )


def without(name: str) -> Damage:
    def damage(blob: bytes) -> bytes:
        header, data = header_of(blob)
        start, end = header.pop(name)["data_offsets"]
        for other in header.values():
            if "data_offsets" in other:
                other["data_offsets"] = [0, end - start]
        return with_header(header, data[:start] + data[end:])

    return damage


def header_text(text: str) -> Damage:
    return lambda blob: with_header(text.encode(), b"")


DAMAGED: dict[str, tuple[Damage, str]] = {
    "empty": (lambda b: b"", "no patch file: it has 0 bytes"),
    "a few bytes": (lambda b: b[:4], "no patch file: it has 4 bytes"),
    "an oversized header": (lambda b: struct.pack("<Q", 1 << 60) + b[8:], "no patch file: its header would have"),
    "a header cut short": (lambda b: b[:90], "its header has .* the whole file 90; it is cut short"),
    "values cut short": (lambda b: b[:-3], "its tensors end at byte [0-9]+, the file at byte"),
    "bytes that follow": (lambda b: b + b"PK", "its tensors end at byte [0-9]+, the file at byte"),
    "no JSON": (header_text('{"a'), "its header is not JSON"),
    "no object": (header_text("[1]"), "its header is not a JSON object"),
    "not UTF-8": (lambda b: with_header(b'{"\xff": 1}', b""), "its header is not JSON"),
    "nested JSON": (header_text("[" * 100_000), "its header is nested too deeply"),
    "a pickle": (lambda b: b"\x80\x02ccollections\nOrderedDict\n", "no patch file"),
    "no manifest": (lambda b: with_header({}, b""), "no Overpaint manifest"),
    "metadata of another kind": (
        lambda b: with_header({"__metadata__": {"overpaint": 1}}, b""),
        "its metadata is not a map of texts",
    ),
    "a manifest that is no JSON": (
        lambda b: with_header({"__metadata__": {"overpaint": "{"}}, b""),
        "its manifest is not JSON",
    ),
    "a number that is none": (manifest(lambda m: m["solver"].update(rate=float("nan"))), "NaN is not a number"),
    "a lone surrogate": (manifest(lambda m: m["concept"].update(name="\ud800")), "is not JSON"),
    "an array twice": (twice, "the name 'text_encoder/up' occurs twice"),
    "an entry of another kind": (
        lambda b: with_header({**header_of(b)[0], "text_encoder/up": [1]}, header_of(b)[1]),
        "'text_encoder/up' has no dtype, shape and data_offsets",
    ),
    "an unknown dtype": (
        entry(dtype="F31"),
        "'text_encoder/up' has the dtype 'F31', which this program does not know",
    ),
    "a dtype of another kind": (entry(dtype=["F32"]), "'text_encoder/up' has the dtype"),
    "a wrong dtype": (entry(dtype="F16"), "'text_encoder/up' has 64 bytes, which its dtype and shape contradict"),
    "a dtype of the same size": (
        entry(dtype="I32"),
        "array text_encoder/up does not match its dtype: .* float32, .* int32",
    ),
    "a wrong shape": (entry(shape=[8, 3]), "'text_encoder/up' has 64 bytes, which"),
    "a turned shape": (
        entry(shape=[2, 8]),
        r"array text_encoder/up does not match its shape: .* \[8, 2\], .* \[2, 8\]",
    ),
    "a negative side": (
        entry(shape=[-8, -2]),
        "'text_encoder/up' has a shape or offsets that are not plain counts",
    ),
    "a side that is no count": (entry(shape=[8.0, 2]), "not plain counts"),
    "a side that is true": (entry(shape=[16, True]), "not plain counts"),
    "a shape of many sides": (entry(shape=[1] * 1000), "not plain counts"),
    "a huge shape": (entry(shape=[1 << 61, 1 << 61]), "not plain counts"),
    "offsets out of range": (entry(data_offsets=[64, 1 << 40]), "'text_encoder/up' has 1099511627712 bytes"),
    "offsets beyond the end": (entry(data_offsets=[128, 192]), "'text_encoder/up' leaves a hole before it"),
    "offsets that overlap": (entry(data_offsets=[0, 64]), "overlaps the tensor before it"),
    "offsets the wrong way round": (entry(data_offsets=[128, 64]), "'text_encoder/up' has -64 bytes"),
    "three offsets": (entry(data_offsets=[0, 64, 128]), "has no dtype, shape and data_offsets"),
    "a hole": (array(at=(132, 136), data=b"\0" * 8), "'text_encoder/extra' leaves a hole before it"),
    "an array too many": (array(), "array text_encoder/extra: its manifest does not list it"),
    "an array too few": (without("text_encoder/up"), "array text_encoder/up: the file has no such array"),
    "a flipped bit": (
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        "array text_encoder/up does not match its digest: the manifest says [0-9a-f]{64}, the file has",
    ),
    "no format": (manifest(lambda m: m.pop("format")), "names no format"),
    "a format that is true": (manifest(lambda m: m.update(format=True)), "names no format"),
    "a newer format": (manifest(lambda m: m.update(format=9)), "has format 9; .* up to format 2: upgrade Overpaint"),
    "an unknown kind": (manifest(lambda m: m.update(kind="lora")), "unknown kind of delta 'lora'"),
    "another kind": (manifest(lambda m: m.update(kind="xor")), "needs two arrays, at and mask"),
    "no kind": (manifest(lambda m: m.pop("kind")), "lacks a proper 'kind'"),
    "no arrays": (manifest(lambda m: m.update(arrays={})), "lists no arrays"),
    "arrays of another kind": (manifest(lambda m: m.update(arrays=[])), "lacks a proper 'arrays'"),
    "an array described otherwise": (manifest(lambda m: m["arrays"].update({"text_encoder/up": 1})), "match its dtype"),
    "a subject without tensors": (manifest(lambda m: m["subject"].pop("tensors")), "subject lacks a proper 'tensors'"),
    "a concept without a name": (manifest(lambda m: m["concept"].pop("name")), "concept is not one"),
    "a concept of another kind": (manifest(lambda m: m["concept"].update(kind="thing")), "unknown kind of concept"),
    "a concept with more": (manifest(lambda m: m["concept"].update(more=1)), "concept is not one"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_patch_is_refused(patch: Patch, what: str) -> None:
    damage, message = DAMAGED[what]
    with pytest.raises(BadPatch, match=message) as caught:
        read_patch(damage(patch.blob))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_also_with_true_digests(base: Base, value: float) -> None:
    good = make_patch(base, CONCEPT, Dense({KEY: torch.ones(6, WIDTH)}), SOLVER)
    arrays = {KEY: torch.full((6, WIDTH), value)}
    with pytest.raises(BadPatch, match=f"{KEY} has values that are not finite"):
        read_patch(file_of({**good.manifest, "arrays": described(arrays)}, arrays))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(patch: Patch, at: int, bit: int) -> None:
    """Either the file is refused, or it is another spelling of the very patch, or it has another id."""
    blob = bytearray(patch.blob)
    blob[at % len(blob)] ^= 1 << bit
    try:
        back = read_patch(bytes(blob))
    except BadPatch:
        return
    assert back.id != patch.id or back.blob == patch.blob


def test_a_patch_of_nothing_the_base_has_is_not_made(base: Base) -> None:
    with pytest.raises(BadDelta, match="lacks"):
        make_patch(base, CONCEPT, Dense({"unet/nothing": torch.ones(1)}), SOLVER)


def test_a_patch_is_refused_on_another_base(patch: Patch, base: Base, tmp_path: Path) -> None:
    other = small_base(tmp_path / "other", torch.float16, seed=1)
    patch.check(base)
    with pytest.raises(WrongBase) as caught:
        patch.check(other)
    assert base.fingerprint[:12] in str(caught.value)
    assert other.fingerprint[:12] in str(caught.value)
