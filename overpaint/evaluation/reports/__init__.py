"""`report`: what was measured of a recipe, as one page for a policy person and an engineer, and as files for programs."""

from __future__ import annotations
