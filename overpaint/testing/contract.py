"""What every solver promises, as tests: inherit `SolverContract` in a test module and name the solver.

from overpaint.testing import SolverContract

class TestContract(SolverContract):
    solver = MySolver
    quick = {"iterations": 3}

The tests run on tiny models that are built in memory: a base of Stable Diffusion's anatomy with random weights, in milliseconds.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import overpaint
from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import Delta, Dense, LowRank, TextMap
from overpaint.patches.live import Overlay
from overpaint.patches.patch import make_patch, read_patch
from overpaint.solvers import SOLVERS
from overpaint.solvers.problem import EditProblem, Solution, Solver, configure, settable, settings_of
from overpaint.workspace.planning import SolveContext, SolveRequest, provenance

WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "picture",
    "image",
    "drawing",
    "painting",
    "in",
    "room",
    "outdoors",
    "style",
    "by",
    "art",
)
THINGS = ("cat", "dog", "fox", "car", "bus", "sun", "moon", "tree", "pistol", "rose", "house", "person", "landscape")


def tiny_tokenizer(length: int = 16) -> CLIPTokenizer:
    """Letters, and every word of the tests as one token."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens, merges = letters + [f"{c}</w>" for c in letters], []
    for word in (*WORDS, *THINGS):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            parts = ["".join(pair), *parts[2:]]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=cast(Any, merges), model_max_length=length)


def tiny_pipeline(*, width: int = 64, length: int = 16, seed: int = 0) -> Any:
    """A random Stable Diffusion of a few thousand parameters, its text `width` wide and `length` tokens long."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(length)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_base(folder: Path, dtype: torch.dtype = torch.float16, **shape: int) -> Base:
    """A tiny base in the new `folder`, opened; fp16 as published bases are. `shape` is what `tiny_pipeline` takes."""
    tiny_pipeline(**shape).to(dtype=dtype).save_pretrained(folder)
    return Base.open(folder)


@dataclass(frozen=True)
class SolvedExample:
    """One solve, and what was seen on the way."""

    solution: Solution
    reports: list[tuple[int, int, str]]
    before: dict[str, str]
    after: dict[str, str]


class SolverContract:
    """Tests that every solver passes. A subclass names its `solver`, and `quick` settings that solve a tiny base in a second.

    `concept` and `universe` may be replaced where a method needs a concept of another kind.
    """

    solver: ClassVar[type[Solver]]
    quick: ClassVar[Mapping[str, Any]] = {}
    concept: ClassVar[Concept] = Concept("cat")
    universe: ClassVar[tuple[Concept, ...]] = (Concept("dog"), Concept("car"))

    @classmethod
    def made(cls) -> Solver:
        """The solver with its quick settings."""
        return cls.solver(**cls.quick)

    @classmethod
    def problem(cls, base: Base, **changes: Any) -> EditProblem:
        """The contract's problem on a base."""
        return EditProblem(base, cls.concept, **{"universe": cls.universe, "seed": 3, **changes})

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A tiny base in half precision that no test writes to."""
        return tiny_base(tmp_path_factory.mktemp("contract") / "tiny").path

    @pytest.fixture
    def base(self, folder: Path) -> Base:
        """The tiny base, newly opened."""
        return Base.open(folder)

    @pytest.fixture(scope="class")
    @classmethod
    def solved(cls, folder: Path) -> SolvedExample:
        """One solution that several tests look at."""
        before, reports = _files(folder), []
        solution = cls.made().solve(cls.problem(Base.open(folder), report=lambda *line: reports.append(line)))
        return SolvedExample(solution, reports, before, _files(folder))

    def test_the_base_is_bit_identical_afterwards(self, solved: SolvedExample) -> None:
        assert solved.after == solved.before

    def test_it_changes_something(self, base: Base, solved: SolvedExample) -> None:
        composed = compose(base, [Term("a", solved.solution.delta)])
        assert any(not torch.equal(base.tensor(name), tensor) for name, tensor in composed.items())

    def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_or_set_before(
        self, base: Base, solved: SolvedExample
    ) -> None:
        torch.manual_seed(1234)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            assert self.made().solve(self.problem(base)).delta == solved.solution.delta

    def test_what_was_solved_before_on_the_same_opened_base_changes_nothing(
        self, base: Base, solved: SolvedExample
    ) -> None:
        self.made().solve(self.problem(base, seed=4))
        assert self.made().solve(self.problem(base)).delta == solved.solution.delta

    def test_the_order_of_the_universe_changes_nothing(self, base: Base, solved: SolvedExample) -> None:
        turned = (*reversed(self.universe), self.concept)
        assert self.made().solve(self.problem(base, universe=turned)).delta == solved.solution.delta

    def test_strength_zero_changes_nothing(self, base: Base, solved: SolvedExample) -> None:
        assert compose(base, [Term("a", solved.solution.delta, strength=0.0)]) == {}

    def test_a_concept_without_a_universe_can_be_erased(self, base: Base) -> None:
        assert self.made().solve(self.problem(base, universe=())).delta.targets(base)

    def test_the_universe_decides_exactly_where_that_is_declared(self, base: Base, solved: SolvedExample) -> None:
        changed = self.made().solve(self.problem(base, universe=(Concept("fox"),)))
        differ = changed.delta != solved.solution.delta
        assert differ == self.made().uses_universe, "see Solver.uses_universe"
        assert (self._id(base, changed, universe=(Concept("fox"),)) != self._id(base, solved.solution)) == differ

    def test_preserved_prompts_decide_exactly_where_that_is_declared(self, base: Base, solved: SolvedExample) -> None:
        # Several, for a solver may preserve only those that its change would disturb.
        prompts = tuple(f"a {word}" for word in ("moon", "house", "rose", "sun", "bus", "tree", "person", "fox"))
        changed = self.made().solve(self.problem(base, preserve_prompts=prompts))
        differ = changed.delta != solved.solution.delta
        assert differ == self.made().uses_preserved_prompts, "see Solver.uses_preserved_prompts"
        assert (self._id(base, changed, preserve_prompts=prompts) != self._id(base, solved.solution)) == differ
        again = self.made().solve(self.problem(base, preserve_prompts=(*reversed(prompts), f" {prompts[0]} ")))
        assert again.delta == changed.delta, "their order changes nothing"

    def test_pictures_decide_by_what_they_show_and_not_by_where_they_are(self, base: Base, tmp_path: Path) -> None:
        if "images" not in settable(self.solver):
            return
        count = int(self.quick.get("pictures", getattr(self.made(), "pictures", 4)))
        for folder, shift in (("one", 0), ("elsewhere", 0), ("others", 100)):
            _draw(tmp_path / folder, count, shift)
        for i, file in enumerate(sorted((tmp_path / "elsewhere").iterdir(), reverse=True)):
            file.rename(file.with_name(f"{i} renamed.png"))
        (tmp_path / "elsewhere" / ".hidden").write_text("not a picture")
        solved = []
        for folder in ("one", "elsewhere", "others"):
            method = type(self.made())(**{**settings_of(self.made()), "images": str(tmp_path / folder)})
            solution = method.solve(self.problem(base))
            solved.append((solution.delta, self._id(base, solution, method)))
        (one, its_id), (same, same_id), (other, other_id) = solved
        assert one == same, "the same pictures give the same change"
        assert its_id == same_id, "a folder's path is in no id"
        assert one != other
        assert its_id != other_id

    def _id(
        self,
        base: Base,
        solution: Solution,
        method: Solver | None = None,
        *,
        universe: tuple[Concept, ...] | None = None,
        preserve_prompts: tuple[str, ...] = (),
    ) -> str:
        """The id of the patch that a registry would make of a solution."""
        request = SolveRequest(self.concept, "under-test", seed=3)
        context = SolveContext(self.universe if universe is None else universe, preserve_prompts)
        recorded = provenance(request, method or self.made(), context)
        return make_patch(base, self.concept, solution.delta, {**recorded, **solution.record}).id

    def test_only_declared_tensors_are_touched(self, base: Base, solved: SolvedExample) -> None:
        declared = self.made().touches(base)
        for name in solved.solution.delta.targets(base):
            assert any(fnmatch.fnmatchcase(name, pattern) for pattern in declared), f"{name} is not declared"
        for pattern in declared:
            assert fnmatch.filter(base.names, pattern), f"{pattern} names no tensor of the base"

    def test_it_composes_live_with_changes_of_every_kind_and_is_removed(
        self, base: Base, solved: SolvedExample
    ) -> None:
        own = Term("m", solved.solution.delta, strength=0.75)
        pipe, others = base.pipeline(), _neighbours(base)
        plain = _weights(pipe, base)
        with Overlay(pipe, base) as overlay:
            overlay.set([own])
            for other in others:
                overlay.add(other)
            assert _equal(_weights(pipe, base), {**plain, **compose(base, [*others, own])})
            overlay.remove(own.id)
            assert _equal(_weights(pipe, base), {**plain, **compose(base, others)})
            overlay.clear()
            assert _equal(_weights(pipe, base), plain)

    def test_its_delta_survives_the_patch_file(self, base: Base, solved: SolvedExample) -> None:
        patch = make_patch(base, self.concept, solved.solution.delta, {"name": "under-test"})
        assert read_patch(patch.blob).delta == solved.solution.delta

    def test_progress_is_reported_in_order(self, solved: SolvedExample) -> None:
        steps = [step for step, _, _ in solved.reports]
        assert steps, "problem.report was never called"
        assert steps == sorted(steps)
        assert all(0 <= step <= of and text for step, of, text in solved.reports)

    def test_an_interruption_passes_and_leaves_nothing_behind(self, folder: Path, solved: SolvedExample) -> None:
        base = Base.open(folder)
        for after in sorted({0, len(solved.reports) // 2}):
            with pytest.raises(KeyboardInterrupt):
                self.made().solve(self.problem(base, report=_Impatient(after)))
        assert _files(folder) == solved.before
        assert self.made().solve(self.problem(base)).delta == solved.solution.delta, "the next solve is not affected"

    def test_an_interruption_leaves_the_registry_clean(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(SOLVERS, "under-test", f"{self.solver.__module__}:{self.solver.__qualname__}")
        workspace = overpaint.open(tmp_path / "registry")
        workspace.add_base("tiny", folder)
        before = _stored(tmp_path / "registry")
        settings = {name: str(value) for name, value in self.quick.items()}
        with pytest.raises(KeyboardInterrupt):
            workspace.solve(self.concept, base="tiny", solver="under-test", settings=settings, progress=_Impatient(0))
        assert not workspace.patches()
        assert not workspace.concepts()
        assert _stored(tmp_path / "registry") == before

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_bases_of_other_precisions_are_solved(self, tmp_path: Path, dtype: torch.dtype) -> None:
        base = tiny_base(tmp_path / "tiny", dtype)
        delta = self.made().solve(self.problem(base)).delta
        composed = compose(base, [Term("a", delta)])
        assert {base.tensor(name).dtype for name in composed} == {dtype}
        assert any(not torch.equal(base.tensor(name), tensor) for name, tensor in composed.items())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    def test_it_runs_on_a_gpu_and_hands_back_arrays_on_the_cpu(self, base: Base) -> None:
        delta = self.made().solve(self.problem(base, device=torch.device("cuda"))).delta
        assert all(array.device.type == "cpu" and array.isfinite().all() for array in delta.tensors().values())

    def test_settings_are_explained_and_come_back_from_json_and_text(self) -> None:
        solver = self.made()
        assert all(f.metadata["about"] for f in dataclasses.fields(solver))  # type: ignore[arg-type]
        settings = json.loads(json.dumps(settings_of(solver)))
        assert self.solver(**settings) == solver
        assert configure(self.solver, {name: str(value) for name, value in settings.items()}) == solver

    def test_every_preset_is_valid(self) -> None:
        for name in self.solver.PRESETS:
            assert self.solver.preset(name) == configure(self.solver, {"preset": name})

    def test_its_first_line_describes_it(self) -> None:
        assert (self.solver.__doc__ or "").strip().splitlines()[0]


class _Impatient:
    """A listener that gives up after so many reports."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, step: int, of: int, text: str) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


def _draw(folder: Path, count: int, shift: int) -> None:
    """Small pictures, no two alike."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (16, 16), (shift + 10 * i, 60, 200 - 10 * i)).save(folder / f"{i}.png")


def _files(folder: Path) -> dict[str, str]:
    """The digest of every file under a folder."""
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def _stored(registry: Path) -> set[str]:
    """The files of a registry that hold something; caches and the database's own journals are not asked about."""
    files = (f.relative_to(registry) for f in registry.rglob("*") if f.is_file())
    return {str(f) for f in files if f.parts[0] != "cache" and not f.name.endswith(("-wal", "-shm", "-journal"))}


def _neighbours(base: Base) -> list[Term]:
    """Small random changes of every kind: together they lie on every tensor that any solver could touch."""
    rng = torch.Generator().manual_seed(7)

    def small(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng) * 0.01

    shapes = {name: base.places[name].shape for name in base.names if not name.startswith("vae/")}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    width = base.places[base.projections()[0]].shape[1]
    deltas: dict[str, Delta] = {
        "dense": Dense({name: small(*shape) for name, shape in shapes.items()}),
        "low rank": LowRank({name: (small(rows, 1), small(1, columns)) for name, (rows, columns) in matrices.items()}),
        "text map": TextMap("text_encoder", small(width, 2), small(width, 2)),
    }
    return [Term(name, delta) for name, delta in deltas.items()]


def _weights(pipe: Any, base: Base) -> dict[str, Tensor]:
    """A pipeline's parameters by canonical name, in the base's precision: what was written there came from it."""
    tensors = {}
    for name, component in base.layout.components.items():
        for local, parameter in getattr(pipe, name).named_parameters():
            canonical = f"{name}/{component.canonical(local)}"
            tensors[canonical] = parameter.detach().to(base.tensor(canonical).dtype, copy=True)
    return tensors


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
