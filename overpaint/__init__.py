"""Overpaint: small, exact, removable weight patches that erase concepts from text-to-image models.

`overpaint.open(path)` gives the workspace: bases, concepts, solvers, patches, recipes. Importing this costs nothing;
PyTorch is loaded when something is solved, composed or drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from overpaint import core
from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError

if TYPE_CHECKING:
    from overpaint.core import __version__
    from overpaint.workspace.workspace import Workspace

__all__ = ["AlreadyExists", "Concept", "NotFound", "OverpaintError", "__version__", "open"]


def open(location: str | Path, *, create: bool = True) -> Workspace:
    """Open the registry at `location` (a folder, or an sqlite:/// or postgresql:// URL), made if nothing is there.

    Raises OverpaintError when there is no registry and `create` is False, when its schema is of another version, or
    when nothing can be written there.
    """
    from overpaint.workspace.workspace import Workspace

    return Workspace.open(location, create=create)


def __getattr__(name: str) -> str:
    """`__version__`; see `overpaint.core`."""
    if name == "__version__":
        return core.__version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
