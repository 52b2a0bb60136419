"""A file of concepts: what it may say, and one clear sentence with a place for everything that it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from overpaint.core.concepts import KINDS, Concept
from overpaint.core.errors import NotFound
from overpaint.solvers.problem import BadSetting
from overpaint.workspace.concept_file import BadConceptFile, BadText, Items, Pairs, Text, parse, read_concepts
from overpaint.workspace.planning import SolveRequest

pytestmark = pytest.mark.usefixtures("counting")


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "concepts.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refused(folder: Path, text: str | bytes) -> str:
    with pytest.raises(BadConceptFile) as caught:
        read_concepts(written(folder, text))
    return str(caught.value)


def test_a_name_is_enough_and_defaults_fill_the_rest(tmp_path: Path) -> None:
    requests = read_concepts(
        written(
            tmp_path,
            """
            defaults: {kind: style, anchor: photo, solver: counting, settings: {size: 0.5}, seed: 3}
            concepts:
              - watercolor
              - name: dog
                kind: object
                synonyms: [hound, puppy]
                prompts: [a hound at the hunt, "two {} at play"]
                anchor: ""
                seed: 4
                settings: {dense: yes}
              - name: pistol
                synonyms: gun
                solver: separable
            """,
        )
    )
    assert requests == (
        SolveRequest(Concept("watercolor", "style", anchor="photo"), "counting", {"size": "0.5"}, 3),
        SolveRequest(
            Concept("dog", "object", ("hound", "puppy"), "", ("a hound at the hunt", "two {} at play")),
            "counting",
            {"size": "0.5", "dense": "yes"},
            4,
        ),
        SolveRequest(Concept("pistol", "style", ("gun",), "photo"), "separable", {}, 3),
    )


def test_the_command_line_goes_before_the_defaults_and_not_before_a_concept(tmp_path: Path) -> None:
    file = written(
        tmp_path, "defaults: {solver: counting, settings: {size: 0.5}}\nconcepts: [cat, {name: dog, seed: 9}]"
    )
    cat, dog = read_concepts(file, settings={"size": "0.7"}, seed=5)
    assert (cat.settings, cat.seed, dog.seed) == ({"size": "0.7"}, 5, 9)
    cat, _ = read_concepts(file, solver="separable", settings={"rank": "2"})
    assert (cat.solver, cat.settings) == ("separable", {"rank": "2"}), "settings of another solver do not come along"
    with pytest.raises(BadSetting, match="did you mean 'size'"):
        read_concepts(file, settings={"siez": "0.7"})


def test_values_are_what_was_written(tmp_path: Path) -> None:
    names = [
        request.concept.name for request in read_concepts(written(tmp_path, "[1984, no, 2.50, 2027-01-31, 'null']"))
    ]
    assert names == ["1984", "no", "2.50", "2027-01-31", "null"]


WORDS = st.text(st.characters(categories=("L", "N", "So"), exclude_characters="{}"), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(WORDS, min_size=1, max_size=4, unique_by=str.casefold), kind=st.sampled_from(KINDS), data=st.data()
)
def test_json_and_yaml_files_are_read_alike(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], kind: str, data: Any
) -> None:
    listed = [{"name": name, "kind": kind, "prompts": [f"a {{}} {data.draw(WORDS)}"]} for name in names]
    folder = tmp_path_factory.mktemp("files")
    texts = [
        json.dumps({"concepts": listed}),
        json.dumps(listed, ensure_ascii=False, indent="\t"),
        yaml.safe_dump({"concepts": listed}, allow_unicode=True),
    ]
    found = [read_concepts(written(folder, text)) for text in texts]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(names)


def test_every_mistake_is_named_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    said = refused(
        tmp_path,
        """
defaults: {kind: styl, settings: {rnk: 4}}
concepts:
  - name: cat
    synonym: kitty
    anchor: Cat
  - {name: }
  - {kind: object}
  - name: dog
    prompts: [a fox]
    seed: -1
    solver: seperable
  - name: fox
    name: fix
    prompts: []
    settings: {rank: 0}
    synonyms: [CAT]
""",
    ).splitlines()
    assert said[0].endswith("has 13 mistakes, so nothing was stored:")
    for line, (place, text) in zip(
        said[1:],
        [
            ("line 2, column 18", "did you mean 'style'?"),
            ("line 2, column 40", "did you mean 'rank'?"),
            ("line 5, column 5", "did you mean 'synonyms'?"),
            ("line 6, column 13", "the anchor 'Cat' is the concept itself"),
            ("line 7, column 12", "the name of a concept is empty"),
            ("line 8, column 5", "this concept has no name"),
            ("line 10, column 15", "does not name 'dog'"),
            ("line 11, column 11", "a seed is a whole number from 0"),
            ("line 12, column 13", "did you mean 'separable'?"),
            ("line 14, column 5", "'name' is there twice"),
            ("line 15, column 14", "has no prompt"),
            ("line 16, column 22", "rank must be at least 1"),
            ("line 17, column 16", "'CAT' is a word of 'cat' already (line 4)"),
        ],
        strict=True,
    ):
        assert line.startswith(f"  {place}: ")
        assert text in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, column 1: no concept is listed"),
        ("# nothing yet\n", "no concept is listed"),
        ("concepts:\n", "line 1, column 10: no concept is listed"),
        ("concepts: []", "no concept is listed"),
        ("concepts: cat", "no concept is listed"),
        ("concept: [cat]", "did you mean 'concepts'?"),
        ("concepts:\n\t- cat\n", "line 2, column 1: a tab; YAML is indented with spaces"),
        ("concepts: [cat\n", "line 2, column 1: this is not YAML"),
        ("- cat: dog: fox\n", "line 1, column 11: a colon where none can be"),
        ("- cat\n---\n- dog\n", "line 2, column 1: a second document begins"),
        ("- [cat]", "line 1, column 3: a concept must be a mapping"),
        ("- {name: [cat]}", "the name of a concept must be a text; got a list"),
        ("- {name: cat, kind: animal}", "unknown kind of concept 'animal'"),
        ("- {name: cat, settings: 3}", "settings must be a mapping"),
        ("- {name: cat, settings: {rank: [1]}}", "'rank' needs one value; got a list"),
        ("- {name: cat, settings: {rank: many}}", "line 1, column 32: rank='many' is not a int"),
        ("- {name: cat, seed: 9223372036854775808}", "a seed is a whole number"),
        ("- {name: cat, prompts: ['a {cat}']}", "braces"),
        ("- {name: cat, prompts: [3]}", "the prompt '3' does not name 'cat'"),
        ("- {name: cat, images: nowhere}", "there is no folder"),
        ("- cat\n- Cat\n", "line 2, column 3: 'Cat' is listed twice (line 1)"),
        ("- {name: cat, synonyms: [kitty, kitty]}", "'kitty' is listed twice"),
        ("- {name: cat, synonyms: [cat]}", "'cat' is listed twice"),
        ("- {name: fox, synonyms: [Cat]}\n- {name: cat, synonyms: [Kitty]}", "'cat' is a word of 'fox' already"),
        ("defaults: {anchor: cat}\nconcepts: [cat]", "that of the defaults is meant for the others"),
        ("- ? [cat]\n  : dog\n", "a key must be a word"),
        (b"- caf\xe9\n", "line 1: byte 0xe9 is not UTF-8"),
        (b"- cat\n- d\x07g\n", "line 2, column 4: the character '\\x07'"),
        ('["\\ud83d"]', "half of a character"),
        (f"- {'x' * 401}", "at most 400 characters"),
        ('- "two\\nlines"', "does not print"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path: Path, text: str | bytes, message: str) -> None:
    said = refused(tmp_path, text)
    assert message in said
    assert len(said.splitlines()) <= 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "line 1, column 4: &a is an alias or an anchor"),
        ("- *star\n", "line 1, column 3: *star is an alias or an anchor"),
        ("- !!python/object/apply:os.system [true]\n", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("[" * 100_000, "more than 8 deep"),
        ("- " * 100 + "x", "more than 8 deep"),
        (b"-" * (17 << 20), "at most 16 MiB"),
    ],
    ids=["a bomb", "an alias", "code", "a deep list", "a deep block", "a huge file"],
)
def test_what_yaml_could_do_to_us_is_not_taken(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in refused(tmp_path, text)


@given(st.binary(max_size=60))
def test_no_bytes_do_more_than_raise(raw: bytes) -> None:
    try:
        found = parse(raw)
    except BadText:
        return
    assert found is None or isinstance(found, Text | Items | Pairs)


def test_pictures_lie_beside_the_file_and_only_some_solvers_take_them(tmp_path: Path) -> None:
    (tmp_path / "dogs").mkdir()
    text = "[{name: dog, solver: counting, images: dogs}]"
    assert "holds no picture" in refused(tmp_path, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "dogs" / "1.png")
    (request,) = read_concepts(written(tmp_path, text))
    assert request.settings == {"images": str(tmp_path / "dogs")}
    assert "takes no pictures" in refused(tmp_path, "[{name: dog, images: dogs}]")


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="cannot be read"):
        read_concepts(tmp_path / "none.yaml")
    with pytest.raises(NotFound, match="cannot be read"):
        read_concepts(tmp_path)
