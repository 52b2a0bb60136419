"""Judges, metrics, picture grids and reports. Nothing here is imported until it is asked for."""

from __future__ import annotations
