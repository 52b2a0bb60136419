"""What everything else stands on: errors, concepts, names, atomic files. Needs neither torch nor a database."""

from __future__ import annotations

__version__: str


def __getattr__(name: str) -> str:
    """`__version__`, as installed: the newest tag of git, or what comes after it; looked up when somebody asks."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("overpaint")
    except PackageNotFoundError:
        return "0+unknown"  # a folder on the path that was never installed
