"""Sharing patches and recipes: OCI image layouts in folders and behind URLs, archives of one file, signatures."""

from __future__ import annotations
