"""One method per file: a problem in, a delta out."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from overpaint.errors import NotFound

SOLVERS = {
    "separable": "overpaint.solvers.separable:Separable",
    "sepme": "overpaint.solvers.sepme:SepME",
}
"""Every solver by name; listed without importing any of them."""


def solver_class(name: str) -> type[Any]:
    """The solver of a name. Raises NotFound with the known names."""
    if name not in SOLVERS:
        near = get_close_matches(name, SOLVERS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise NotFound(f"no solver is called {name!r}; {hint}known are: {', '.join(SOLVERS)}")
    module, _, attribute = SOLVERS[name].partition(":")
    found: type[Any] = getattr(import_module(module), attribute)
    return found
