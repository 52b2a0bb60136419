"""The U-Net's modules as its first publication numbers them: `input_blocks`, `middle_block`, `output_blocks`.

Layouts read checkpoints in this spelling; here is the way back, for the tools that name a LoRA's layers so.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def ldm_modules(modules: Collection[str]) -> dict[str, str]:
    """The old name of each of a U-Net's modules, by diffusers' name (both without a component).

    All modules of the U-Net must be given: blocks are numbered through. What has no old name is left out.
    """
    blocks = [found for module in modules if (found := _BLOCK.fullmatch(module))]
    per_level = 2 + max((int(b[4]) for b in blocks if b[1] == "down" and b[3] == "resnets"), default=0)
    attended = {int(b[2]) for b in blocks if b[1] == "up" and b[3] == "attentions"}
    names = {module: _name(module, per_level, attended) for module in modules}
    return {module: name for module, name in names.items() if name is not None}


def _name(module: str, per_level: int, attended: set[int]) -> str | None:
    if module in _ENDS:
        return _ENDS[module]
    if found := _MIDDLE.fullmatch(module):
        part, number, rest = found[1], int(found[2]), found[3]
        return f"middle_block.{2 * number}.{_RESNET[rest]}" if part == "resnets" else f"middle_block.1.{rest}"
    found = _BLOCK.fullmatch(module)
    if found is None:
        return None
    side, block, part, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if part == "downsamplers":
        return f"input_blocks.{per_level * (block + 1)}.0.op"
    if part == "upsamplers":
        return f"output_blocks.{per_level * (block + 1) - 1}.{1 + (block in attended)}.conv"
    at = per_level * block + layer + (side == "down")
    inner = f"0.{_RESNET[rest]}" if part == "resnets" else f"1.{rest}"
    return f"{'input' if side == 'down' else 'output'}_blocks.{at}.{inner}"
