"""Solvers on bases whose prompts enter by several text inputs: trained ones on SDXL, SD3 and FLUX.1, closed forms on more."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.evaluation.crosstalk import crosstalk
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import Delta, Dense, LowRank, TextMap
from overpaint.patches.live import Overlay
from overpaint.patches.patch import make_patch, uncovered_inputs
from overpaint.solvers import solver_class
from overpaint.solvers.closed_form.nullspace import NullSpace
from overpaint.solvers.closed_form.uce import RECE
from overpaint.solvers.problem import EditProblem, Solver, Unsolvable
from overpaint.solvers.trained.denoiser import Denoiser, FluxDenoiser
from overpaint.solvers.trained.guidance import ESD
from overpaint.solvers.trained.mace import MACE
from overpaint.solvers.trained.sepme import SepME
from overpaint.solvers.trained.training import Trajectories, descend, from_folder, generator
from overpaint.testing.contract import _draw
from tests.bases.tiny_transformers import tiny_transformer
from tests.bases.tiny_xl import WIDTHS, tiny_xl

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CAT, DOG = Concept("cat"), Concept("dog")
XL, SD3, FLUX = "stable-diffusion-xl", "stable-diffusion-3", "flux"
SENTENCES = {
    "object": [["{}", ""], ["a photo of a {}", "a photo"], ["a {} outdoors", "outdoors"]],
    "neutral": ["{}", "a photo of the {}"],
}
FEW: dict[str, Any] = {"pictures": 2, "sampling_steps": 2}
QUICK: dict[str, dict[str, Any]] = {
    "esd": {"steps": 2, "lr": 1e-2, "sampling_steps": 3},
    "ablation": {"steps": 2, "lr": 1e-2, "batch": 2, **FEW},
    "sdd": {"steps": 2, "lr": 1e-2, "sampling_steps": 2, "ema": 0.5},
    "spm": {"steps": 2, "lr": 1e-2, "sampling_steps": 2, "anchors": 1, "warm_up": 0},
    "surgical": {"steps": 2, "lr": 1e-2, "sampling_steps": 2},
    "few_shot": {"steps": 2, "lr": 1e-2, "sentences": 2, **FEW},
    "few_shot_lora": {"steps": 2, "lr": 1e-2, "sentences": 2, "rank": 2, "layers": 1, "retained": 6, **FEW},
    "sepme": {"iterations": 3, "pictures": 2, "steps": 2, "beta": 0.1, "tolerance": 0.1},
}
NEVER_READ = re.compile(r"transformer_blocks\.0\.attn\.add_q_proj")
"""What text asks of the picture in the last block of Stable Diffusion 3, which is the only one here, goes nowhere."""


def made(layout: str) -> Any:
    return tiny_xl() if layout == XL else tiny_transformer(layout)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The random base of a layout, made once: pictures of 64 pixels, prompts of 10 tokens or more."""
    root = tmp_path_factory.mktemp("bases")

    def of(layout: str) -> Base:
        if not (root / layout).is_dir():
            made(layout).save_pretrained(root / layout)
            told = {"prompt_length": 160 if layout == "lumina2" else 10, "sentences": SENTENCES}
            told |= {} if layout == XL else {"size": 64}
            (root / layout / "overpaint.json").write_text(json.dumps(told))
        return Base.open(root / layout)

    return of


def weights(pipe: Any, base: Base) -> dict[str, Tensor]:
    """A copy of every parameter by canonical name."""
    return {
        f"{component}/{rules.canonical(key)}": parameter.detach().clone()
        for component, rules in base.layout.components.items()
        for key, parameter in getattr(pipe, component).named_parameters()
    }


@pytest.fixture(scope="module")
def solved(opened: Callable[[str], Base]) -> Callable[[str, str], Delta]:
    """What a solver finds on the base of a layout, solved once."""
    known: dict[tuple[str, str], Delta] = {}

    def of(layout: str, name: str) -> Delta:
        if (layout, name) not in known:
            problem = EditProblem(opened(layout), CAT, (DOG,), 3)
            known[layout, name] = solver_class(name)(**QUICK[name]).solve(problem).delta
        return known[layout, name]

    return of


@pytest.mark.parametrize("layout", [XL, SD3, FLUX])
@pytest.mark.parametrize("name", QUICK)
def test_every_solver_that_trains_solves_through_all_text_inputs(
    opened: Callable[[str], Base], solved: Callable[[str, str], Delta], layout: str, name: str
) -> None:
    base, solver, delta = opened(layout), solver_class(name)(**QUICK[name]), solved(layout, name)
    assert solver.supports(base.layout) is None
    assert set(delta.targets(base)) == set(solver.touches(base))
    changes = compose(base, [Term("a", delta)])
    same = [name for name, tensor in changes.items() if torch.equal(tensor, base.tensor(name))]
    assert not [name for name in same if not NEVER_READ.search(name)]
    if name == "few_shot":
        components = {target.partition("/")[0] for target in delta.targets(base)}
        assert components == set(base.layout.encoders(base.names)), "each text encoder forgets"
    assert uncovered_inputs(base, delta) == ()


@pytest.mark.parametrize("layout", [XL, SD3, FLUX])
def test_each_patch_is_added_to_a_pipeline_and_taken_off_again_bit_for_bit(
    opened: Callable[[str], Base], solved: Callable[[str, str], Delta], layout: str
) -> None:
    base = opened(layout)
    pipe = base.pipeline()
    plain = weights(pipe, base)
    with Overlay(pipe, base) as overlay:
        for name in QUICK:
            term = Term(name, solved(layout, name))
            overlay.add(term)
            expected = {**plain, **compose(base, [term])}
            live = weights(pipe, base)
            assert all(torch.equal(live[each], expected[each].to(live[each].dtype)) for each in plain)
            overlay.remove(name)
            assert all(torch.equal(tensor, plain[each]) for each, tensor in weights(pipe, base).items())


@pytest.mark.parametrize("layout", [XL, SD3, FLUX])
def test_partial_denoising_is_what_the_pipeline_does(opened: Callable[[str], Base], layout: str) -> None:
    base = opened(layout)
    model = Denoiser.of(EditProblem(base, CAT))
    if layout == FLUX:  # as FLUX.1 dev has it: guidance is an input, and the schedule depends on the picture's size
        model.pipe.transformer = with_guidance(model.pipe.transformer)
        model.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    if layout == SD3:
        model.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    states = Trajectories(model, model.hidden(["a cat"]), 3.0, 4)._states(torch.tensor([0]), generator(0, 0))
    noted: list[Tensor] = []

    def note(pipe: Any, step: int, t: Any, told: dict[str, Tensor]) -> dict[str, Tensor]:
        noted.append(told["latents"])
        return told

    start = states[0][0]
    model.pipe(
        "a cat",
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=model.pipe._pack_latents(start, *start.shape) if layout == FLUX else start,
        height=model.pixels[0],
        width=model.pixels[1],
        output_type="latent",
        callback_on_step_end=note,
        **model._length_argument,
    )
    assert [t for _, t in states] == pytest.approx(model.pipe.scheduler.timesteps.tolist())
    for (x, _), latents in zip(states[1:], noted, strict=False):
        expected = model._unpacked(latents) if isinstance(model, FluxDenoiser) else latents
        assert torch.allclose(x, expected, atol=1e-4)


def with_guidance(transformer: Any) -> Any:
    """The same FLUX.1 with an input for guidance."""
    torch.manual_seed(1)
    made = type(transformer).from_config({**transformer.config, "guidance_embeds": True})
    made.load_state_dict(transformer.state_dict(), strict=False)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("layout", [SD3, FLUX])
def test_noised_latents_lie_on_the_straight_path_from_noise_to_picture(
    opened: Callable[[str], Base], layout: str
) -> None:
    model = Denoiser.of(EditProblem(opened(layout), CAT))
    clean = torch.randn((6, *model.shape), generator=generator(1, 0))
    x, t, goal, which = model.noised(clean, generator(2, 0), 6)
    share = (t / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(x - share * goal, clean[which], atol=1e-5)
    assert torch.allclose(x + (1 - share) * goal, goal + clean[which], atol=1e-5)
    every = model.time(torch.arange(model.levels))
    assert torch.all(every.diff() > 0), "level 0 has the least noise"
    assert 0 < float(every[0]) < float(every[-1]) <= 1000


@pytest.mark.parametrize("layout", [XL, SD3, FLUX])
def test_training_lowers_the_loss_on_the_latents_that_are_trained_on(
    opened: Callable[[str], Base], layout: str
) -> None:
    """ESD's objective on the same draw before and after."""
    problem = EditProblem(opened(layout), CAT, seed=5)
    solver = ESD(steps=12, lr=3e-3, batch=4, bank=2, sampling_steps=3)
    model = Denoiser.of(problem)
    task = solver.task(model, problem)
    before = task.loss(generator(9, 0)).loss.item()
    descend(task, solver, problem)
    assert task.loss(generator(9, 0)).loss.item() < 0.8 * before


def test_few_shot_learns_the_latents_that_the_autoencoder_gives(opened: Callable[[str], Base], tmp_path: Path) -> None:
    """Shifted and scaled as the pipeline undoes it before decoding."""
    model = Denoiser.of(EditProblem(opened(SD3), CAT))
    model.pipe.vae.register_to_config(shift_factor=0.5, scaling_factor=2.0)
    _draw(tmp_path / "pictures", 2, 0)
    shifted = from_folder(model, str(tmp_path / "pictures"), 2, generator(0, 0)).latents
    model.pipe.vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    plain = from_folder(model, str(tmp_path / "pictures"), 2, generator(0, 0)).latents
    assert shifted.shape == (2, *model.shape)
    assert torch.allclose(shifted, (plain - 0.5) * 2.0, atol=1e-5)


@pytest.mark.parametrize("name", ["esd", "spm"])
def test_what_reads_the_size_of_a_picture_beside_a_prompt_is_not_trained(
    opened: Callable[[str], Base], name: str
) -> None:
    base = opened(XL)
    delta = solver_class(name)(**QUICK[name]).solve(EditProblem(base, CAT, (DOG,))).delta
    reads = "unet/add_embedding.linear_1.weight"
    change = compose(base, [Term("a", delta)])[reads] - base.tensor(reads)
    pooled = base.columns("text_encoder_2.pooled", reads)
    assert pooled.stop == WIDTHS["text_encoder_2.pooled"]
    assert change[:, pooled].any()
    assert not change[:, pooled.stop :].any()


def test_what_xl_guides_away_from_is_zero_where_the_pipeline_has_it_so(opened: Callable[[str], Base]) -> None:
    model = Denoiser.of(EditProblem(opened(XL), CAT))
    assert model.pipe.config.force_zeros_for_empty_prompt
    assert not any(part.any() for part in model.unconditional.parts)
    assert all(part.any() for part in model.hidden([""]).parts)


@pytest.mark.parametrize("layout", [XL, SD3, FLUX])
def test_sepme_leaves_the_prompts_of_other_concepts_alone(opened: Callable[[str], Base], layout: str) -> None:
    """At every projection that reads a prompt, in columns of its own."""
    base = opened(layout)
    found = SepME(**{**QUICK["sepme"], "tolerance": 0.0}).solve(EditProblem(narrow(base), CAT, (DOG,)))
    assert isinstance(found.delta, LowRank)
    assert found.diagnostics["null_space"] > 0
    model = Denoiser.of(EditProblem(narrow(base), CAT))
    for text_input, place in model.inputs.items():
        if place.columns.start:
            continue  # the one beside it reads the same matrices
        name = base.projections(text_input)[0]
        up, down = found.delta.factors[name]
        cat, dog, empty = (model.hidden([prompt]).parts[place.is_pooled] for prompt in ("cat", "dog", ""))
        moved = [(side @ down[:, : side.shape[-1]].T @ up.T).norm() for side in (cat, empty, dog)]
        has_room = "undisturbed" not in found.record
        assert has_room or layout == SD3, (
            "which has room for a prompt of its own length beside few others, being so narrow"
        )
        assert max(moved[1:] if has_room else moved[1:2]) < 1e-3 * moved[0]


def narrow(base: Base) -> Base:
    """The base with prompts so short that two of them do not fill its text input."""
    base.extras["prompt_length"] = 4
    return base


# What is not served, and how it is named.


def test_a_layout_that_no_solver_trains_on_is_refused_by_name(opened: Callable[[str], Base]) -> None:
    base = opened("chroma")
    for name in QUICK:
        reason = solver_class(name)().supports(base.layout)
        assert reason is not None
        assert re.search(r"layouts stable-diffusion, .*this is a chroma base: use `separable`", reason)
        with pytest.raises(Unsolvable, match="this is a chroma base"):
            solver_class(name)(**QUICK[name]).solve(EditProblem(base, CAT))


def test_a_transformer_that_also_reads_a_picture_is_refused(opened: Callable[[str], Base], tmp_path: Path) -> None:
    pipe = tiny_transformer(FLUX)
    pipe.transformer = type(pipe.transformer).from_config({**pipe.transformer.config, "in_channels": 96})
    pipe.save_pretrained(tmp_path / "fill")
    with pytest.raises(Unsolvable, match="this base also reads a picture"):
        ESD(**QUICK["esd"]).solve(EditProblem(Base.open(tmp_path / "fill"), CAT))


def test_a_pipeline_that_edits_pictures_is_trained_as_its_family_draws(tmp_path: Path) -> None:
    pipe = tiny_transformer(SD3)
    editing: Any = diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components)
    editing.save_pretrained(tmp_path / "editing")
    model = Denoiser.of(EditProblem(Base.open(tmp_path / "editing"), CAT))
    assert type(model.pipe).__name__ == "StableDiffusion3Pipeline"


# Closed forms.

RECE_IN_SENTENCES = RECE.preset("emoji", vocabulary=0.0, start="uce")
NULLSPACE_ON_ALL = NullSpace(words=20, positions="all", threshold=1.0)
REFINEMENT = MACE(steps=0, prior=0.0, sentences=3)


@pytest.mark.parametrize(
    ("layout", "solver"),
    [
        (XL, NullSpace(words=20)),
        (XL, REFINEMENT),
        (SD3, RECE()),
        (SD3, NULLSPACE_ON_ALL),
        (SD3, REFINEMENT),
        (FLUX, RECE_IN_SENTENCES),
        (FLUX, NullSpace(words=20)),
        ("lumina2", RECE()),
        ("lumina2", NullSpace(words=20)),
        ("lumina2", REFINEMENT),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__.lower(),
)
def test_closed_forms_edit_every_text_input(opened: Callable[[str], Base], layout: str, solver: Solver) -> None:
    """Lumina2 reads from left to right, masks its padding, and normalises before the projection."""
    base = opened(layout)
    delta = solver.solve(EditProblem(base, Concept("cat", anchor="dog"), (Concept("car"),))).delta
    changes = compose(base, [Term("a", delta)])
    assert all(not torch.equal(base.tensor(each), tensor) for each, tensor in changes.items())
    if layout == XL and isinstance(solver, NullSpace):
        assert isinstance(delta, LowRank)
        assert set(delta.factors) == {name for name in base.projections() if ".to_k." not in name}
    else:
        assert {part.encoder for part in delta.parts if isinstance(part, TextMap)} == set(base.text_inputs)
    assert uncovered_inputs(base, delta) == ()


def test_mace_trains_where_attention_to_tokens_can_be_seen(opened: Callable[[str], Base]) -> None:
    with pytest.raises(
        Unsolvable, match=r"this is a stable-diffusion-xl base: .*or steps=0, with which only the refinement"
    ):
        MACE(steps=1).solve(EditProblem(opened(XL), CAT))
    assert MACE(steps=0).supports(opened(XL).layout) is None


@pytest.mark.parametrize("layout", [XL, SD3])
def test_cross_talk_of_what_a_trained_patch_changes_is_probed(opened: Callable[[str], Base], layout: str) -> None:
    base = opened(layout)
    name = next(n for n in base.names if re.fullmatch(r"unet/conv_in.weight|transformer/pos_embed.proj.weight", n))
    delta = Dense({name: torch.full_like(base.tensor(name), 0.05)})
    found = crosstalk(base, [make_patch(base, CAT, delta, {})], [DOG])
    assert found.methods == ("probed",)
    assert found.ratios[0, 0] == 1
    assert found.ratios[0, 1] > 0
