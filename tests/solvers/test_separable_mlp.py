"""Erasing inside of the text encoder: what the matrix reads and gives, what a patch makes of prompts, on bases of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from overpaint.bases import encoder_models
from overpaint.bases.base import Base
from overpaint.bases.capture import PADDING_ROWS, CapturingPipeline
from overpaint.bases.encoder_models import feed_forward_output
from overpaint.bases.text_encoder import TextEncoder, text_sources
from overpaint.cli import main
from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import LowRank
from overpaint.patches.patch import uncovered_inputs
from overpaint.solvers import vocabulary
from overpaint.solvers.closed_form.separable import SeparableMLP
from overpaint.solvers.problem import EditProblem, Unsolvable
from overpaint.solvers.sentences import KEPT_PADDING, neutral_sentences
from overpaint.solvers.universe import PreservedPrompts, matrices_of, prepare, universe
from overpaint.solvers.vocabulary import EncodingTask
from overpaint.testing import SolverContract
from tests.bases.tiny_transformers import tiny_transformer
from tests.bases.tiny_xl import tiny_xl, tiny_xl_base
from tests.core.executor_pieces import Travelling

CPU = torch.device("cpu")
CAT, DOG, CAR = (Concept(name) for name in ("cat", "dog", "car"))
WHOLE = SeparableMLP(ridge=1e-6, energy=1.0, rank=64, share=0.99, vocabulary_weight=0.1)
"""As much of the change as there is."""


class TestContract(SolverContract):
    solver = SeparableMLP


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The random base of a layout, made once."""
    root = tmp_path_factory.mktemp("bases")

    def of(layout: str) -> Base:
        if not (root / layout).is_dir():
            tiny_transformer(layout).save_pretrained(root / layout)
        return Base.open(root / layout)

    return of


@torch.no_grad()
def test_the_layer_gives_as_much_more_as_the_change_makes_of_what_the_matrix_reads(base: Base) -> None:
    ((name, matrix),) = matrices_of(base, CPU).items()
    prompts = ["a photo of a cat", "a dog", ""]
    assert name in SeparableMLP().touches(base)
    assert (matrix.reads.width, matrix.gives.width) == base.places[name].shape[::-1]
    assert isinstance(matrix.reads, TextEncoder)
    assert isinstance(matrix.gives, TextEncoder)
    reads, gives = matrix.reads.hidden(prompts), matrix.gives.hidden(prompts)
    change = torch.randn(base.places[name].shape, generator=torch.Generator().manual_seed(0))
    model = matrix.reads.model
    _, module = feed_forward_output(model, 1)
    module.weight += change
    try:
        after = text_after(base, model, prompts)
    finally:
        module.weight -= change
    inner = getattr(model, "text_model", model)
    torch.testing.assert_close(after, inner.final_layer_norm(gives + reads @ change.T), rtol=1e-4, atol=1e-4)


def text_after(base: Base, model: Any, prompts: list[str]) -> Tensor:
    tokenizer = TextEncoder.of(base).tokenizer
    ids = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    found: Tensor = model(ids).last_hidden_state
    return found


def test_a_prompt_is_read_as_the_same_with_the_anchor_once_the_patch_is_added(base: Base) -> None:
    anchored = Concept("cat", anchor="dog")
    solution = WHOLE.solve(EditProblem(base, anchored, (DOG, CAR)))
    assert solution.diagnostics["residual"] < 0.1
    cat, dog, car = ([f"a photo of a {word}", f"a {word}"] for word in ("cat", "dog", "car"))
    before = {prompt: text(base, prompt) for prompt in (*cat, *dog, *car)}
    after = {prompt: text(base, prompt, solution.delta) for prompt in before}
    for erased, target in zip(cat, dog, strict=True):
        assert (after[erased] - before[target]).norm() < 0.2 * (before[erased] - before[target]).norm()
    for kept, erased in zip((*dog, *car), (*cat, *cat), strict=True):
        assert (after[kept] - before[kept]).norm() < 0.3 * (after[erased] - before[erased]).norm(), (
            "64 numbers tell few apart"
        )


@torch.no_grad()
def text(base: Base, prompt: str, delta: LowRank | Any = None) -> Tensor:
    """What the pipeline hands to the denoiser, with a patch added to its weights: from the last word on."""
    pipe = base.pipeline()
    for name, values in compose(base, [Term("a", delta)]).items() if delta else ():
        component, _, path = name.partition("/")
        module = getattr(pipe, component)
        if not hasattr(module, "text_model"):
            path = path.removeprefix("text_model.")
        module.get_parameter(path).copy_(values)
    found: Tensor = pipe.encode_prompt([prompt], "cpu", 1, False)[0]
    end = len(prompt.split()) + 1
    return found[0, end - 1 : end + 1 + KEPT_PADDING]


def test_terms_add_up_to_the_joint_solution(base: Base) -> None:
    """The minimiser for two concepts at once, computed here from the definition, is the sum of the two patches."""
    whole = SeparableMLP(energy=1.0, rank=64, share=0.0)
    one, two = (whole.solve(EditProblem(base, concept, (CAT, DOG, CAR))).delta for concept in (CAT, DOG))
    assert isinstance(one, LowRank)
    assert isinstance(two, LowRank)
    ((name, (up, down)),) = one.factors.items()
    more_up, more_down = two.factors[name]
    problem = EditProblem(base, CAT, (CAT, DOG, CAR))
    known = whole.universe_of(problem, name)
    moment = known.cholesky @ known.cholesky.T
    rhs = sum(known.ways[concept] @ known.keys[concept].T for concept in ("cat", "dog"))
    joint = torch.linalg.solve(moment, torch.as_tensor(rhs).T).T
    found = up.double() @ down.double() + more_up.double() @ more_down.double()
    torch.testing.assert_close(found, joint, rtol=1e-3, atol=1e-6 * float(joint.abs().max()) + 1e-9)


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ("stable-diffusion-3", {"text_encoder": 0, "text_encoder_2": 0, "text_encoder_3": 1}),
        ("flux", {"text_encoder": 1, "text_encoder_2": 1}),
        ("flux2", {"text_encoder": 9}),
        ("flux2-klein", {"text_encoder": 8}),
    ],
)
def test_the_layer_is_the_last_one_that_decides_all_that_is_handed_on(
    opened: Callable[[str], Base], layout: str, layers: dict[str, int]
) -> None:
    """Of two layers, Stable Diffusion 3 reads CLIP before the last one and behind it, and T5 behind it; FLUX.1 both behind it;
    FLUX.2 reads three layers side by side, of which the first decides the others."""
    pipeline = CapturingPipeline.of(opened(layout))
    assert {component: pipeline.deciding_layer(component) for component in layers} == layers


def test_a_text_encoder_that_is_read_before_its_only_layer_is_refused_in_one_sentence(tmp_path: Path) -> None:
    pipe = tiny_xl()
    pipe.text_encoder.config.num_hidden_layers = 1
    pipe.text_encoder = type(pipe.text_encoder)(pipe.text_encoder.config)
    pipe.save_pretrained(tmp_path / "xl")
    with pytest.raises(OverpaintError, match=r"text_encoder of the base at .* has one layer.*use `separable`"):
        SeparableMLP().solve(EditProblem(Base.open(tmp_path / "xl"), CAT, (DOG,)))


def test_of_text_encoders_that_stand_side_by_side_the_padding_of_each_is_read(opened: Callable[[str], Base]) -> None:
    """Stable Diffusion 3 has two CLIPs in the columns of one row."""
    matrices = matrices_of(opened("stable-diffusion-3"), CPU)
    rows = {name.partition("/")[0]: matrix.reads.hidden(["a photo of a cat"])[0] for name, matrix in matrices.items()}
    tokens = 7  # with begin and end
    assert len(rows["text_encoder"]) == len(rows["text_encoder_2"]) == tokens + PADDING_ROWS


def test_bases_that_have_one_of_their_text_encoders_in_common_share_no_vocabulary(
    opened: Callable[[str], Base], tmp_path: Path
) -> None:
    other = opened("flux").pipeline()
    with torch.no_grad():
        for parameter in other.text_encoder_2.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    cache = tmp_path / "cache"
    alone = SeparableMLP().solve(EditProblem(Base.open(tmp_path / "other"), CAT, (DOG,))).delta
    SeparableMLP().solve(EditProblem(opened("flux"), CAT, (DOG,), cache=cache))
    found = SeparableMLP().solve(EditProblem(Base.open(tmp_path / "other"), CAT, (DOG,), cache=cache)).delta
    assert found == alone


def test_the_layer_of_stable_diffusion_xl_is_the_one_before_the_last(tmp_path: Path) -> None:
    base = tiny_xl_base(tmp_path / "xl")
    delta = SeparableMLP().solve(EditProblem(base, CAT, (DOG,))).delta
    assert isinstance(delta, LowRank)
    found = {(name.partition("/")[0], name.partition(".layers.")[2]) for name in delta.factors}
    assert found == {("text_encoder", "1.mlp.fc2.weight"), ("text_encoder_2", "1.mlp.fc2.weight")}, "of three layers"
    assert uncovered_inputs(base, delta) == ()


@pytest.mark.parametrize("layout", ["stable-diffusion-3", "flux", "qwen-image"])
def test_every_text_encoder_of_a_transformer_is_edited_and_others_are_kept(
    opened: Callable[[str], Base], layout: str
) -> None:
    base = opened(layout)
    whole = SeparableMLP(rank=64, energy=1.0, share=0.0)
    solution = whole.solve(EditProblem(base, CAT, (DOG, CAR)))
    assert isinstance(solution.delta, LowRank)
    assert {name.partition("/")[0] for name in solution.delta.factors} == set(base.layout.encoders(base.names))
    assert set(solution.delta.factors) <= set(SeparableMLP().touches(base))
    for name, (up, down) in solution.delta.factors.items():
        known = whole.universe_of(EditProblem(base, CAT, (DOG, CAR)), name)
        moved = {other: (up.double() @ (down.double() @ known.keys[other])).norm() for other in known.keys}
        way = known.ways["cat"].norm()
        assert 0 < moved["cat"] <= way
        # |K_i^T A^-1 K_j| is at most a half for any two terms of A.
        assert max(moved["dog"], moved["car"]) <= (0.5 + 1e-4) * way


def test_what_is_inside_of_a_caught_text_encoder_is_what_its_own_model_says(opened: Callable[[str], Base]) -> None:
    """Of FLUX.1's CLIP the pooled embedding alone is read, which is the last token's; of its T5 all tokens."""
    base = opened("flux")
    pipe = base.pipeline()
    clip, t5 = matrices_of(base, CPU).values()
    inside: dict[str, Tensor] = {}
    for component in ("text_encoder", "text_encoder_2"):
        _, module = feed_forward_output(getattr(pipe, component), 1)
        module.register_forward_pre_hook(lambda module, args, name=component: inside.update({name: args[0][0]}))
    with torch.no_grad():
        pipe.encode_prompt("a cat", "a cat", max_sequence_length=CapturingPipeline.of(base).length)
    (pooled,), (tokens,) = clip.reads.hidden(["a cat"]), t5.reads.hidden(["a cat"])
    torch.testing.assert_close(pooled, inside["text_encoder"][3:4])  # behind begin-of-text and two words
    read = len(pipe.tokenizer_2("a cat").input_ids)
    torch.testing.assert_close(tokens[:read], inside["text_encoder_2"][:read], rtol=1e-4, atol=1e-5)
    assert clip.reads.begin is None


def test_a_text_encoder_with_a_norm_behind_its_feed_forward_part_is_refused_in_one_sentence(
    opened: Callable[[str], Base],
) -> None:
    for layout in ("sana", "lumina2"):
        with pytest.raises(Unsolvable, match=rf"in {layout} bases text_encoder has a norm in between: use `separable`"):
            SeparableMLP().solve(EditProblem(opened(layout), CAT, (DOG,)))


def test_what_is_encoded_for_a_matrix_is_stored_and_a_new_program_gives_the_same_bits(
    base: Base, tmp_path: Path
) -> None:
    problem = EditProblem(base, CAT, (DOG, CAR), cache=tmp_path)
    first = SeparableMLP().solve(problem).delta
    stored = sorted(file.name for file in tmp_path.iterdir())
    assert len(stored) == 2, "the moments of the vocabulary, and the average word"
    again = Base.open(base.path)
    with pytest.MonkeyPatch.context() as patched:
        real = vocabulary.encode_piece
        pieces: list[object] = []

        def counted(*given: Any) -> Any:
            pieces.append(given)
            return real(*given)

        patched.setattr(vocabulary, "encode_piece", counted)
        second = SeparableMLP().solve(EditProblem(again, CAT, (DOG, CAR), cache=tmp_path)).delta
    assert second == first
    assert pieces == []
    assert sorted(file.name for file in tmp_path.iterdir()) == stored


def test_a_base_is_prepared_for_it_by_workers_with_the_bits_of_one_process(base: Base, tmp_path: Path) -> None:
    kept, solver = tmp_path / "kept", SeparableMLP()
    alone = solver.solve(EditProblem(base, CAT, (DOG, CAR), cache=tmp_path / "alone")).delta
    preserved = PreservedPrompts(cache=kept, weight=solver.vocabulary_weight)
    prepare(Base.open(base.path), (CAT, DOG), CPU, preserved=preserved, executor=Travelling(), is_inside=True)
    stored = sorted(file.name for file in kept.iterdir())
    assert solver.solve(EditProblem(Base.open(base.path), CAT, (DOG, CAR), cache=kept)).delta == alone
    assert sorted(file.name for file in kept.iterdir()) == stored


def test_a_command_prepares_a_base_for_it(base_folder: Path, tmp_path: Path) -> None:
    run = partial(CliRunner().invoke, main, env={"OVERPAINT_REGISTRY": str(tmp_path / "registry")})
    assert run(["base", "add", "tiny", str(base_folder)]).exit_code == 0
    result = run(["base", "prepare", "tiny", "--solver", "separable_mlp"])
    assert result.exit_code == 0, result.output
    moments = list((tmp_path / "registry").rglob("*.safetensors"))
    sizes = [file.stat().st_size for file in moments if b"mlp.fc2" in file.read_bytes()[:4096]]
    assert len(sizes) == 1


def test_two_threads_read_a_caught_text_encoder_as_one_does(opened: Callable[[str], Base]) -> None:
    plain = SeparableMLP(vocabulary=8)
    alone = [plain.solve(EditProblem(opened("flux"), concept, (CAR,))).delta for concept in (CAT, DOG)]
    base = opened("flux")
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda concept: plain.solve(EditProblem(base, concept, (CAR,))).delta, (CAT, DOG)))
    for one, other in zip(alone, together, strict=True):
        assert isinstance(one, LowRank)
        assert isinstance(other, LowRank)
        for name, (up, down) in one.factors.items():
            assert torch.allclose(up @ down, other.factors[name][0] @ other.factors[name][1], atol=1e-5)


def test_of_a_wide_matrix_as_many_sentences_are_encoded_as_there_is_room_for(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = {name: matrix.reads for name, matrix in matrices_of(base, CPU).items()}
    every = neutral_sentences(base)
    assert EncodingTask.of(base, matrices).templates == every
    numbers = sum(each.width * (each.width + 1) // 2 for each in matrices.values())
    monkeypatch.setattr(vocabulary, "INSIDE_BYTES", 3 * 8 * numbers)
    assert len(EncodingTask.of(base, matrices).templates) == 3
    assert EncodingTask.of(base, text_sources(base)).templates == every, "text inputs are read in all of them"


def test_a_concept_that_counts_nothing_is_refused(base: Base) -> None:
    with pytest.raises(Unsolvable, match="name another anchor or a larger weight"):
        SeparableMLP(weight=0.0).solve(EditProblem(base, CAT, (DOG,)))


def test_a_tensor_that_is_no_matrix_of_a_text_encoder_is_no_text_input(base: Base) -> None:
    with pytest.raises(NotFound, match="no text input"):
        universe(base, (CAT,), 1e-3, 1.0, CPU, text_input="unet/conv_in.weight")


def test_a_universe_of_the_embedded_base_has_room_for_what_embeddings_have_none_for() -> None:
    """Over all words: what the matrix reads has more directions above a hundredth of the strongest than embeddings have."""
    base = Base.open("emoji")
    (matrix,) = matrices_of(base, CPU).values()
    words = [f"a {word}" for word in matrix.gives.words()]
    (source,) = text_sources(base).values()
    assert isinstance(source, TextEncoder)
    assert isinstance(matrix.reads, TextEncoder)
    spectra = [torch.linalg.svdvals(each.hidden(words)[:, 1:4].flatten(0, 1)) for each in (source, matrix.reads)]
    of_text, inside = (int((size > 0.01 * size[0]).sum()) for size in spectra)
    assert inside > 1.3 * of_text


def test_a_text_encoder_that_is_read_layer_by_layer_gives_the_same_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for rounding: fewer prompts are read at a time."""
    folder = tiny_xl_base(tmp_path / "xl").path
    held = SeparableMLP().solve(EditProblem(Base.open(folder), CAT, (DOG, CAR))).delta
    monkeypatch.setattr(encoder_models, "HELD", 0)
    read = SeparableMLP().solve(EditProblem(Base.open(folder), CAT, (DOG, CAR))).delta
    assert isinstance(held, LowRank)
    assert isinstance(read, LowRank)
    assert held.factors.keys() == read.factors.keys()
    for name, (up, down) in held.factors.items():
        torch.testing.assert_close(read.factors[name][0] @ read.factors[name][1], up @ down, rtol=1e-3, atol=1e-5)
