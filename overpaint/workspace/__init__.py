"""Solving on a registry: many concepts from one file, once each, compressed if asked, and anew when others joined."""

from __future__ import annotations
