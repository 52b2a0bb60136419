"""Certificates of erasure: what was composed, how it was tested, who says so and until when, for strangers to check."""

from __future__ import annotations
