"""Solvers that train: gradient descent on a working copy of the denoiser or the text encoder."""

from __future__ import annotations
