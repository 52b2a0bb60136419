"""The embedded base: a small Stable Diffusion trained on emoji artwork, with its judges and its vocabulary."""

from __future__ import annotations
