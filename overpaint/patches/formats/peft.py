"""A PEFT adapter made of a LoRA file that has been exported for diffusers: the same arrays by PEFT's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overpaint.patches.formats.dialects import PEFT_PREFIX, TRANSFORMERS, UNET

DENOISERS = (UNET, *TRANSFORMERS)
_DOWN = ".lora_A.weight"


def write_adapter(lora: Path, out: Path, base: str = "") -> dict[str, Any] | None:
    """Write `out` and return what belongs in `adapter_config.json`; None, and nothing, if more than one component is changed.

    A PEFT adapter is for one module, here the denoiser (`pipeline.unet` or `pipeline.transformer`). `base` is its name or
    its id on the Hub, for the config.
    """
    from safetensors.torch import load_file, save_file

    arrays = load_file(lora)
    components = {key.partition(".")[0] for key in arrays}
    if len(components) != 1 or not components <= set(DENOISERS):
        return None
    prefix = f"{components.pop()}."
    # One text in the header, because safetensors writes several in an order of chance.
    save_file(
        {f"{PEFT_PREFIX}{key.removeprefix(prefix)}": array for key, array in arrays.items()}, out, {"format": "pt"}
    )
    ranks = {len(array) for key, array in arrays.items() if key.endswith(_DOWN)}
    assert len(ranks) == 1, "an export gives all layers one rank"
    rank = ranks.pop()
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(key.removeprefix(prefix).removesuffix(_DOWN) for key in arrays if key.endswith(_DOWN)),
    }
