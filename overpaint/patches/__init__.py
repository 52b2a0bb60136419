"""What a patch is: a change to named tensors, how changes compose, and how they reach a pipeline or a checkpoint."""

from __future__ import annotations
