"""The demo: the main job end to end on the embedded base, measured, in one table and one report."""

from overpaint.demo.run import run

__all__ = ["run"]
