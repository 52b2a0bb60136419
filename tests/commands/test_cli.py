"""The command line as a user meets it: sentences, tables, JSON, one clear line and an exit code for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from overpaint.cli import main
from tests.registry.old import thaw
from tests.shell import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "registry")


@pytest.fixture
def ready(shell: Shell, base_folder: Path) -> Shell:
    shell.ok("init")
    shell.ok("base", "add", "tiny", str(base_folder))
    return shell


WITHOUT_TORCH = """
--help
base list
base keep tiny
concept list
concept add fox
concept show cat
concept edit fox --synonym vixen
concept remove fox
patch forget dog
patch list
patch show cat
recipe list
recipe show safe
recipe show safe@1
recipe log safe
recipe diff safe@1 safe
recipe due
recipe create empty --base tiny
recipe copy safe again
recipe delete again
recipe undelete again
tag add pets --recipe safe --patch cat
tag list
tag remove pets --recipe safe
search cat
solvers
verify
gc --dry-run
db backup copy.db
db reindex
export cat -o cat.overpaint
push shared
"""


def test_what_computes_nothing_imports_no_torch(ready: Shell, tmp_path: Path) -> None:
    ready.ok("solve", "cat", "--base", "tiny")
    ready.ok("solve", "dog", "--base", "tiny")
    ready.ok("patch", "add", "cat", "--recipe", "safe")
    ready.ok("patch", "add", "cat", "--recipe", "safe", "--strength", "0.5")
    code = f"""
import sys, overpaint.cli
for words in {[line.split() for line in WITHOUT_TORCH.strip().splitlines()]!r}:
    overpaint.cli.main.main(["--registry", {str(ready.registry)!r}, *words], standalone_mode=False)
    loaded = {{"torch", "sqlalchemy.dialects.postgresql"}} & set(sys.modules)
    assert not loaded, (words, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_program_leaves_what_it_imported_out_of_what_is_collected(ready: Shell) -> None:
    code = f"""
import gc, sys, overpaint.__main__ as program
sys.argv = ["overpaint", "--registry", {str(ready.registry)!r}, "recipe", "list"]
try:
    program.main()
finally:
    print(gc.isenabled(), gc.get_freeze_count() > 10_000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "True True"), done.stderr


def test_python_runs_the_package(ready: Shell) -> None:
    run = [sys.executable, "-m", "overpaint", "--registry", str(ready.registry), "base", "list"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, "tiny" in done.stdout) == (0, True), done.stderr


def test_a_recipe_with_a_lost_patch_is_shown_with_its_digest(ready: Shell) -> None:
    ready.ok("solve", "cat", "--base", "tiny")
    added = ready.ok("patch", "add", "cat", "--recipe", "safe")
    shutil.rmtree(ready.registry / "blobs")
    shown = ready("recipe", "show", "safe")
    assert (shown.exit_code, shown.stdout.split()[-1]) == (0, added.split()[-1])
    assert "is not known: the bytes of patch" in shown.stderr


def test_adding_a_patch_loads_no_more_than_composing_needs(ready: Shell) -> None:
    ready.ok("solve", "cat", "--base", "tiny")
    code = f"""
import sys, overpaint.cli
overpaint.cli.main.main(["--registry", {str(ready.registry)!r}, "patch", "add", "cat"], standalone_mode=False)
print(sorted({{"torch", "diffusers", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['torch']"


def test_from_a_base_to_a_checkpoint(ready: Shell, tmp_path: Path) -> None:
    ready.ok("concept", "add", "cat", "--synonym", "fox")
    solved = json.loads(ready.ok("solve", "cat", "dog", "--base", "tiny", "--json"))
    assert [row["concept"] for row in solved] == ["cat", "dog"]
    assert all(row["bytes"] < 16 << 10 for row in solved)
    added = ready.ok("patch", "add", "cat", solved[1]["patch"][:12], "--recipe", "safe", "--why", "takedown")
    assert added.count("weights") == 2
    shown = json.loads(ready.ok("recipe", "show", "safe", "--json"))
    assert [row["concept"] for row in shown["patches"]] == ["cat", "dog"]
    ready.ok("build", "safe", str(tmp_path / "out"))
    picture = tmp_path / "p.png"
    ready.ok("generate", "a cat", "--recipe", "safe", "-o", str(picture), "--compare", "--count", "2", "--steps", "2")
    with Image.open(picture) as found:
        assert found.width > 64
    removed = ready.ok("patch", "remove", "cat", "dog", "--recipe", "safe", "--why", "licence")
    assert "bit for bit" in removed
    log = json.loads(ready.ok("recipe", "log", "safe", "--json"))
    assert [(row["did"], row["why"]) for row in log] == [("add", "takedown")] * 2 + [("remove", "licence")] * 2
    fingerprint = json.loads(ready.ok("base", "list", "--json"))[0]["fingerprint"]
    assert log[-1]["weights"] == fingerprint


def test_a_concept_is_described_anew_and_removed(ready: Shell) -> None:
    ready.ok("concept", "add", "cat", "--synonym", "kity", "--synonym", "puss", "--anchor", "dog", "--prompt", "a cat")
    edited = ready("concept", "edit", "cat", "--synonym", "kitty", "--prompt", "")
    assert (edited.exit_code, edited.stdout, edited.stderr) == (0, "concept cat (object)\n", "")
    shown = {row["what"]: row["value"] for row in json.loads(ready.ok("concept", "show", "cat", "--json"))}
    assert shown == {"name": "cat", "kind": "object", "synonyms": "kitty", "anchor": "dog"}
    ready.ok("concept", "edit", "cat", "--kind", "style", "--anchor", "")
    shown = {row["what"]: row["value"] for row in json.loads(ready.ok("concept", "show", "cat", "--json"))}
    assert (shown["kind"], shown["anchor"]) == ("style", "")
    assert "did you mean 'cat'" in ready.fails("concept", "edit", "cta", "--anchor", "dog")
    assert ready("concept", "edit", "cat").exit_code == 2, "what changes has to be named"
    assert ready.ok("concept", "remove", "cat") == "removed concept cat\n"
    assert json.loads(ready.ok("concept", "list", "--json")) == []


def test_patches_that_no_recipe_needs_are_forgotten_and_their_bytes_collected(ready: Shell) -> None:
    ready.ok("solve", "cat", "dog", "fox", "--base", "tiny")
    ready.ok("patch", "add", "fox", "--recipe", "safe")
    ready.ok("patch", "remove", "fox", "--recipe", "safe")
    assert "the history of 'safe' needs it" in ready.fails("patch", "forget", "cat", "fox")
    assert "overpaint patch forget" in ready.fails("concept", "remove", "cat")
    would = json.loads(ready.ok("patch", "forget", "cat", "--dry-run", "--json"))
    assert len(json.loads(ready.ok("patch", "list", "--json"))) == 3, "neither a refusal nor a dry run forgets any"
    before = sum(1 for path in (ready.registry / "blobs").rglob("*") if path.is_file())
    assert json.loads(ready.ok("patch", "forget", "cat", "dog", "cat", "--json"))[0] == would[0]
    assert [row["concept"] for row in json.loads(ready.ok("patch", "list", "--json"))] == ["fox"]
    ready.ok("concept", "remove", "cat")
    ready.ok("gc", "--grace", "0")
    assert sum(1 for path in (ready.registry / "blobs").rglob("*") if path.is_file()) < before
    assert "all as it was" in ready("verify").stderr


def test_every_table_is_also_json(ready: Shell) -> None:
    ready.ok("solve", "cat", "--base", "tiny")
    ready.ok("patch", "add", "cat", "--expires", "2999-01-31")
    ready.ok("tag", "add", "pets", "--patch", "cat")
    for words in (
        ("base", "list"),
        ("base", "show", "tiny"),
        ("concept", "list"),
        ("concept", "show", "cat"),
        ("patch", "list"),
        ("patch", "show", "cat"),
        ("recipe", "list"),
        ("recipe", "show"),
        ("recipe", "log"),
        ("recipe", "diff", "default@0", "default"),
        ("recipe", "expired", "--on", "2999-01-31"),
        ("tag", "list"),
        ("search", "cat"),
    ):
        assert json.loads(ready.ok(*words, "--json"))
        assert ready.ok(*words)


def test_a_recipe_is_made_copied_taken_back_and_deleted(ready: Shell) -> None:
    ready.ok("solve", "cat", "dog", "--base", "tiny")
    base = json.loads(ready.ok("base", "list", "--json"))[0]["fingerprint"]
    assert base in ready.ok("recipe", "create", "safe", "--base", "tiny", "--digests")
    ready.ok("patch", "add", "cat", "dog", "--recipe", "safe")
    ready.ok("patch", "remove", "dog", "--recipe", "safe")
    ready.ok("tag", "add", "safe-2026-11", "--recipe", "safe@1", "--patch", "cat")
    both = ready.ok("recipe", "checkout", "safe@safe-2026-11", "--why", "appeal lost")
    assert "dog" in both
    assert "these are the weights of revision 1, bit for bit" in both
    assert base in ready.ok("recipe", "checkout", "safe@0", "--digests")
    log = json.loads(ready.ok("recipe", "log", "safe", "--json"))
    assert [(row["revision"], row["did"], row["concept"], row["source"]) for row in log[3:]] == [
        (3, "checkout", "dog", "safe@1"),
        *((4, "checkout", concept, "safe@0") for concept in [row["concept"] for row in log[4:]]),
    ]
    assert log[3]["why"] == "appeal lost"
    different = json.loads(ready.ok("recipe", "diff", "safe@2", "safe@3", "--json"))
    assert [(row["concept"], row["strength before"], row["strength after"]) for row in different] == [
        ("dog", None, 1.0)
    ]
    assert log[3]["weights"] in ready.ok("recipe", "copy", "safe@1", "again", "--digests")
    ready.ok("recipe", "delete", "safe", "--why", "obsolete")
    assert [row["recipe"] for row in json.loads(ready.ok("recipe", "list", "--json"))] == ["again"]
    assert [row["recipe"] for row in json.loads(ready.ok("recipe", "list", "--deleted", "--json"))] == ["safe"]
    assert json.loads(ready.ok("recipe", "log", "safe", "--deleted", "--json"))[-1]["why"] == "obsolete"
    assert base in ready.ok("recipe", "undelete", "safe", "--digests")
    assert len(json.loads(ready.ok("recipe", "log", "safe", "--json"))) == len(log) + 2


def test_an_expired_takedown_is_listed(ready: Shell) -> None:
    ready.ok("solve", "cat", "--base", "tiny")
    assert "expires 2999-01-31" in ready.ok("patch", "add", "cat", "--expires", "2999-01-31")
    assert json.loads(ready.ok("recipe", "expired", "--on", "2999-01-30", "--json")) == []
    due = json.loads(ready.ok("recipe", "expired", "default", "--on", "2999-01-31", "--json"))
    assert [(row["recipe"], row["concept"], row["until"]) for row in due] == [("default", "cat", "2999-01-31")]
    assert json.loads(ready.ok("recipe", "show", "--json"))["patches"][0]["until"] == "2999-01-31"
    assert "expires 2999-01-31" in ready.ok("patch", "show", "cat")
    ready.ok("patch", "add", "cat", "--expires", "never")
    assert json.loads(ready.ok("recipe", "expired", "--on", "2030-01-01", "--json")) == []


def test_lists_come_in_pages_and_say_that_there_is_more(ready: Shell) -> None:
    ready.ok("solve", "cat", "dog", "fox", "--base", "tiny")
    first = ready("patch", "list", "--limit", "2", "--json")
    assert [row["concept"] for row in json.loads(first.stdout)] == ["fox", "dog"]
    assert "2 of 3 patches" in first.stderr
    assert [row["concept"] for row in json.loads(ready.ok("patch", "list", "--offset", "2", "--json"))] == ["cat"]
    everything = ready("patch", "list", "--limit", "0", "--json")
    assert len(json.loads(everything.stdout)) == 3
    assert everything.stderr == ""
    assert [row["name"] for row in json.loads(ready.ok("concept", "list", "--limit", "1", "--json"))] == ["cat"]


def test_searching_finds_patches_and_recipes(ready: Shell) -> None:
    ready.ok("concept", "add", "cat", "--synonym", "fox")
    ready.ok("solve", "cat", "dog", "--base", "tiny")
    ready.ok("patch", "add", "cat", "--recipe", "safe", "--why", "letter of Monday")
    ready.ok("tag", "add", "pets", "--patch", "cat", "--patch", "dog", "--recipe", "safe")

    def found(*words: str) -> list[tuple[str, str]]:
        return [(row["what"], row["name"]) for row in json.loads(ready.ok("search", *words, "--json"))]

    assert found("FOX") == [("patch", "cat")]
    assert found("letter", "monday") == [("recipe", "safe")]
    assert found("--tag", "pets") == [("recipe", "safe"), ("patch", "dog"), ("patch", "cat")]
    assert found("--kind", "object", "--solver", "separable", "--base", "tiny", "do") == [("patch", "dog")]
    assert found("--tag", "pets", "--limit", "1") == [("recipe", "safe"), ("patch", "dog")]
    assert json.loads(ready.ok("tag", "list", "pets", "--json"))[0]["name"] == "safe"
    ready.ok("tag", "remove", "pets", "--patch", "cat")
    assert found("--tag", "pets") == [("recipe", "safe"), ("patch", "dog")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("solve", "cat", "--base", "tiny", "--solver", "magic"), "no solver is called 'magic'"),
        (("solve", "cat", "--base", "tiny", "--set", "rnk=1"), "did you mean 'rank'"),
        (("solve", "cat", "--base", "tiny", "--set", "rank"), "NAME=VALUE"),
        (("solve", "cat", "--base", "other"), "other"),
        (("solve", "cat", "--base", "tiny", "--device", "tpu9"), "device"),
        (("patch", "add", "cat"), "cat"),
        (("patch", "remove", "cat"), "default"),
        (("concept", "add", " "), "name"),
        (("concept", "add", "x", "--anchor", "x"), "anchor"),
        (("recipe", "show", "nothing"), "nothing"),
        (("recipe", "create", "new", "--base", "other"), "other"),
        (("recipe", "checkout", "nothing@1"), "nothing"),
        (("recipe", "copy", "nothing", "new"), "nothing"),
        (("recipe", "undelete", "nothing"), "recipe list --deleted"),
        (("recipe", "expired", "--on", "tomorrow"), "tomorrow"),
        (("patch", "add", "cat", "--expires", "31.1.2027"), "YYYY-MM-DD, or never"),
        (("patch", "add", "cat", "--expires", "2999-1-31"), "YYYY-MM-DD"),
        (("patch", "add", "cat", "--strength", "1_0"), "a strength is a number"),
        (("recipe", "expired", "--on", "2999-1-31"), "YYYY-MM-DD"),
        (("patch", "list", "--limit", "-1"), "-1"),
        (("tag", "add", "3", "--recipe", "default"), "not a number"),
        (("tag", "add", "t"), "name a patch or a recipe"),
        (("search",), "say what to search for"),
        (("search", "x", "--base", "other"), "other"),
        (("build", "nothing", "out"), "nothing"),
        (("base", "add", "x", "/nowhere"), "not a folder"),
        (("generate", "a cat", "-o", "/nowhere/p.png", "--recipe", "nothing"), "nothing"),
    ],
    ids=" ".join,
)
def test_a_mistake_gets_one_sentence(ready: Shell, words: tuple[str, ...], message: str) -> None:
    said = ready.fails(*words)
    assert message in said
    assert len(said.strip().splitlines()) <= 4


def test_a_patch_that_cannot_be_added_leaves_no_recipe(ready: Shell) -> None:
    ready.ok("solve", "cat", "--base", "tiny")
    add = ("patch", "add", "cat", "--recipe", "new")
    assert "cannot expire on 2020-01-01, which is past: today is" in ready.fails(*add, "--expires", "2020-01-01")
    assert "a strength is at most 1,000,000" in ready.fails(*add, "--strength", "1e9")
    assert json.loads(ready.ok("recipe", "list", "--json")) == []


def test_an_output_of_which_thousands_of_folders_are_missing_gets_one_sentence(ready: Shell, tmp_path: Path) -> None:
    ready.ok("recipe", "create", "plain", "--base", "tiny")
    out = str(tmp_path.joinpath(*["a"] * 2000, "out.yaml"))
    assert "2,000 folders of" in ready.fails("recipe", "export", "plain", "--as-file", "-o", out)
    assert "2,000 folders of" in ready.fails("build", "plain", out.replace(".yaml", ".safetensors"))


def test_a_seed_or_guidance_that_is_no_number_gets_one_sentence(ready: Shell, tmp_path: Path) -> None:
    ready.ok("recipe", "create", "plain", "--base", "tiny")
    drawing = ("generate", "a cat", "--recipe", "plain", "-o", str(tmp_path / "p.png"))
    assert "a seed is a whole number of at most 63 bits" in ready.fails(*drawing, "--seed", str(2**64))
    assert "a guidance scale must be a finite number; got nan" in ready.fails(*drawing, "--guidance", "nan")
    assert "a text of whole characters" in ready.fails("generate", "\udcff", *drawing[2:])


def test_cuda_without_a_device_is_said_plainly(ready: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "finds no CUDA device" in ready.fails("solve", "cat", "--base", "tiny", "--device", "cuda")
    assert json.loads(ready.ok("patch", "list", "--json")) == []


def test_a_concept_or_base_that_is_there_is_not_replaced(ready: Shell, base_folder: Path) -> None:
    ready.ok("concept", "add", "cat")
    assert "already" in ready.fails("concept", "add", "cat", "--kind", "style")
    assert "already" in ready.fails("base", "add", "tiny", str(base_folder))


def test_an_older_registry_names_the_command_that_upgrades_it(shell: Shell) -> None:
    thaw(shell.registry, "0001")
    assert "run `overpaint db upgrade`" in shell.fails("patch", "list")
    assert "0001" in shell.ok("db", "upgrade")
    assert len(json.loads(shell.ok("patch", "list", "--json"))) == 3
    assert [row["did"] for row in json.loads(shell.ok("recipe", "log", "safe", "--json"))][-2:] == ["remove", "add"]


def test_without_a_registry_the_way_to_one_is_named(shell: Shell) -> None:
    assert "overpaint init" in shell.fails("patch", "list")


def test_the_registry_may_come_from_the_environment(ready: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERPAINT_REGISTRY", str(ready.registry))
    found = CliRunner().invoke(main, ["base", "list", "--json"])
    assert json.loads(found.stdout)[0]["name"] == "tiny"


def test_every_command_says_what_it_does() -> None:
    def walk(command: object) -> None:
        for child in getattr(command, "commands", {}).values():
            assert child.help, child.name
            walk(child)

    walk(main)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_that_the_terminal_cannot_show_stops_nothing(shell: Shell, tmp_path: Path, encoding: str) -> None:
    shell.ok("init")
    file = tmp_path / os.fsdecode(b"b\xff\xe2\x86\x92.db")
    run = [sys.executable, "-m", "overpaint", "--registry", str(shell.registry), "db", "backup", str(file)]
    done = subprocess.run(run, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert file.is_file()


@pytest.mark.parametrize(
    "command",
    [
        "generate cat --recipe safe -o {}",
        "crosstalk --recipe safe -o {}",
        "certify safe --key me.key -o {}",
        "recipe export safe --as-file -o {}",
        "verify-certificate {}",
        "key new {}",
        "db backup {}",
        "base preserve any --prompts {}",
        "certify {} --key me.key -o new.cert",
    ],
)
def test_a_url_where_a_file_is_needed_makes_no_folder_and_shows_no_password(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shell.ok("init")
    said = shell.fails(*command.format("s3://KEY:SECRET@bucket/x.png").split())
    assert "s3:// begins a URL" in said
    assert "SECRET" not in said
    assert not (tmp_path / "s3:").exists()
