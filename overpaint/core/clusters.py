"""Opens the executor that the option `--on` names: this process, or a Ray cluster."""

from __future__ import annotations

from overpaint.core.errors import OverpaintError
from overpaint.core.executors import Executor, InProcess


def open_executor(on: str = "") -> Executor:
    """The executor of a word: nothing for this process, `ray` for a cluster on this machine or the one that RAY_ADDRESS
    names, `ray://HOST:PORT` or `HOST:PORT` for a cluster elsewhere.

    Raises OverpaintError for any other word, where Ray is not installed, or where no cluster answers.
    """
    if not on:
        return InProcess()
    if on != "ray" and not on.startswith("ray://") and ":" not in on:
        raise OverpaintError(f"work can run on ray or ray://HOST:PORT; got {on!r}")
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        raise OverpaintError("running on Ray needs the package ray: pip install 'overpaint[ray]'") from None
    from overpaint.core.on_ray import RayExecutor

    return RayExecutor("" if on == "ray" else on)
