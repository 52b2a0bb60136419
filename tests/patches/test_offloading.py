"""Patches on pipelines whose weights are offloaded or stored in fewer bits: exact, or said how far off, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import Dense
from overpaint.patches.live import BadPipeline, Overlay

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CPU = torch.device("cpu")


def loaded(base: Base) -> Any:
    pipe: Any = diffusers.FluxPipeline.from_pretrained(base.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    asked = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent", "max_sequence_length": 8}
    found: Tensor = pipe(prompt="a cat", generator=generator, **asked).images
    return found


def in_groups(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def model_by_model(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def layer_by_layer(pipe: Any) -> None:
    # What `enable_sequential_cpu_offload` does to each model; accelerate cannot do it to text encoders without a GPU.
    cpu_offload(pipe.transformer, execution_device=CPU)


@pytest.mark.parametrize("offload", [in_groups, model_by_model, layer_by_layer])
def test_an_offloaded_pipeline_draws_what_one_in_memory_draws_and_is_restored(
    flux: Base, term: Term, offload: Callable[[Any], None]
) -> None:
    plain, pipe = loaded(flux), loaded(flux)
    before = drawn(plain)
    Overlay(plain, flux).set([term])
    offload(pipe)
    overlay = Overlay(pipe, flux)
    with overlay.applied([term]):
        # Offloading moves weights in memory, and sums may be taken in another order where they lie otherwise aligned.
        torch.testing.assert_close(drawn(pipe), drawn(plain), rtol=1e-4, atol=1e-5)
        assert (drawn(pipe) - before).abs().max() > 1e-2
        overlay.verify()
        assert overlay.rounding_error() == 0
    torch.testing.assert_close(drawn(pipe), before, rtol=1e-4, atol=1e-5)


def test_what_is_offloaded_to_disk_is_refused(flux: Base, term: Term, tmp_path: Path) -> None:
    pipe = loaded(flux)
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    with pytest.raises(BadPipeline, match="offload the pipeline to the CPU's memory"):
        Overlay(pipe, flux).set([term])


def test_what_accelerate_offloads_to_disk_is_refused_also_where_patches_were_applied_before(
    flux: Base, term: Term, tmp_path: Path
) -> None:
    pipe = loaded(flux)
    overlay = Overlay(pipe, flux)
    overlay.set([term])
    with_patch = drawn(pipe)
    disk_offload(pipe.transformer, tmp_path, execution_device=CPU)
    for terms in ([], [Term(term.id, term.delta, 0.5)]):
        with pytest.raises(BadPipeline, match="offload the pipeline to the CPU's memory"):
            overlay.set(terms)
    torch.testing.assert_close(drawn(pipe), with_patch, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadPipeline, match="offload the pipeline to the CPU's memory"):
        Overlay(pipe, flux).set([term])


def test_weights_in_eight_bits_take_a_patch_nearly_which_is_said_with_the_error(flux: Base, term: Term) -> None:
    pipe = loaded(flux)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    name = "context_embedder.weight"
    before = dict(pipe.transformer.named_parameters())[name].detach().clone()
    overlay = Overlay(pipe, flux)
    with pytest.warns(UserWarning, match="stored as float8_e4m3fn .* rounded"):
        overlay.set([term])
    assert 0.01 < overlay.rounding_error() < 0.2
    overlay.verify()
    overlay.close()
    assert torch.equal(dict(pipe.transformer.named_parameters())[name].view(torch.uint8), before.view(torch.uint8))


def test_weights_in_bfloat16_are_as_near_as_their_digits_allow(flux: Base, term: Term) -> None:
    pipe = loaded(flux).to(torch.bfloat16)
    overlay = Overlay(pipe, flux)
    overlay.set([term])
    assert 0 < overlay.rounding_error() < 0.02


def test_weights_in_eight_bits_but_for_what_reads_the_prompt_take_a_patch_exactly(flux: Base, term: Term) -> None:
    pipe = loaded(flux)
    skipped = ("embedder", "norm", "proj_out")
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=skipped)
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    overlay = Overlay(pipe, flux)
    overlay.set([term])
    assert overlay.rounding_error() == 0


@pytest.fixture
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes computes on the CPU; diffusers wants to see a GPU before it quantises with it."""
    pytest.importorskip("bitsandbytes", reason='pip install -e ".[dev]" installs bitsandbytes')
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})


BITS: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4 bits kept as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
}


def quantised(base: Base, bits: str, skipped: list[str] | None) -> Any:
    config = diffusers.BitsAndBytesConfig(**BITS[bits], llm_int8_skip_modules=skipped)
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(
        base.path, subfolder="transformer", quantization_config=config, torch_dtype=torch.float32
    )
    pipe: Any = diffusers.FluxPipeline.from_pretrained(base.path, transformer=transformer, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bytes_of(pipe: Any) -> dict[str, bytes]:
    named = pipe.transformer.named_parameters()
    return {name: each.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, each in named}


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("bits", BITS)
def test_a_model_quantised_by_bitsandbytes_takes_a_patch_exactly_where_its_text_inputs_are_left_as_they_are(
    flux: Base, term: Term, bits: str
) -> None:
    pipe = quantised(flux, bits, ["context_embedder", "time_text_embed"])
    assert type(pipe.transformer.transformer_blocks[0].attn.to_q.weight).__name__ in ("Int8Params", "Params4bit")
    before, picture = bytes_of(pipe), drawn(pipe)
    overlay = Overlay(pipe, flux)
    overlay.set([term])
    overlay.verify()
    assert overlay.rounding_error() == 0
    composed = compose(flux, [term])
    parameters = dict(pipe.transformer.named_parameters())
    assert all(torch.equal(parameters[name.partition("/")[2]], value) for name, value in composed.items())
    assert (drawn(pipe) - picture).abs().max() > 1e-3
    overlay.set([])
    assert bytes_of(pipe) == before
    assert torch.equal(drawn(pipe), picture)


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("skipped", [None, ["context_embedder"]])
def test_a_text_input_quantised_by_bitsandbytes_is_refused_with_what_to_do(
    flux: Base, term: Term, bits: str, skipped: list[str] | None
) -> None:
    pipe = quantised(flux, bits, skipped)
    before = bytes_of(pipe)
    layer = "time_text_embed.text_embedder.linear_1" if skipped else "context_embedder"
    with pytest.raises(BadPipeline, match=rf"{layer}\.weight is quantised .*llm_int8_skip_modules=\['{layer}'\]"):
        Overlay(pipe, flux).set([term])
    assert bytes_of(pipe) == before


def test_a_quantised_tensor_that_looks_like_the_bases_is_refused(flux: Base, term: Term) -> None:
    """torchao's and quanto's have the shape and dtype of what they stand for; to write to them would quantise anew."""

    class Codes(torch.nn.Parameter):
        """A stand-in."""

    pipe = loaded(flux)
    weight = pipe.transformer.context_embedder.weight
    pipe.transformer.context_embedder.weight = Codes(weight.detach().clone())
    with pytest.raises(BadPipeline, match=r"context_embedder\.weight is quantised in the pipeline \(Codes, float32 \["):
        Overlay(pipe, flux).set([term])
    assert torch.equal(pipe.transformer.context_embedder.weight, weight)


def test_of_a_gguf_model_what_is_quantised_is_refused_and_what_reads_the_prompt_is_changed_exactly(
    flux: Base, term: Term
) -> None:
    pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFParameter
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    pipe, name = loaded(flux), "transformer/transformer_blocks.0.attn.to_q.weight"
    attention = pipe.transformer.transformer_blocks[0].attn.to_q
    blocks = np.zeros((len(attention.weight), 32), np.float32)  # 32 values are the least that is quantised together
    packed = torch.from_numpy(quantize(blocks, GGMLQuantizationType.Q8_0))
    attention.weight = GGUFParameter(packed, quant_type=GGMLQuantizationType.Q8_0)
    overlay = Overlay(pipe, flux)
    overlay.set([term])
    assert overlay.rounding_error() == 0
    quantised_layer = Term("b", Dense({name: torch.ones(flux.places[name].shape)}))
    with pytest.raises(BadPipeline, match="without quantisation"):
        overlay.add(quantised_layer)
    overlay.verify()
