"""The dialects that are read, in the order in which they are tried."""

from __future__ import annotations

from overpaint.patches.formats.comfy import COMFY
from overpaint.patches.formats.dialect import Dialect
from overpaint.patches.formats.diffusers_lora import DIFFUSERS, PEFT, PROCESSORS
from overpaint.patches.formats.kohya import KOHYA
from overpaint.patches.formats.weights import WEIGHTS

DIALECTS: tuple[Dialect, ...] = (KOHYA, DIFFUSERS, PEFT, PROCESSORS, COMFY, WEIGHTS)
