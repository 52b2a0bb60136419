"""Solvers whose answer is a formula: one linear system for each text input, no training."""

from __future__ import annotations
