"""One method per file: a problem in, a delta out. Installed packages add solvers of their own (see `listing`)."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from overpaint.errors import NotFound
from overpaint.solvers.listing import Listed, listed

SOLVERS = {
    "separable": "overpaint.solvers.separable:Separable",
    "uce": "overpaint.solvers.uce:UCE",
    "rece": "overpaint.solvers.rece:RECE",
    "nullspace": "overpaint.solvers.nullspace:NullSpace",
    "mace": "overpaint.solvers.mace:MACE",
    "sepme": "overpaint.solvers.sepme:SepME",
    "few_shot": "overpaint.solvers.few_shot:FewShot",
    "few_shot_lora": "overpaint.solvers.few_shot_lora:FewShotLoRA",
    "surgical": "overpaint.solvers.surgical:Surgical",
    "esd": "overpaint.solvers.esd:ESD",
    "ablation": "overpaint.solvers.ablation:Ablation",
    "sdd": "overpaint.solvers.sdd:SDD",
    "spm": "overpaint.solvers.spm:SPM",
}
"""Every solver of this package by name; listed without importing any of them."""


def solvers() -> tuple[dict[str, Listed], list[str]]:
    """Every solver that can be asked for by name, and a sentence for each one that is refused."""
    return listed(SOLVERS)


def solver_class(name: str) -> type[Any]:
    """The solver of a name. Raises NotFound with the known names, BrokenSolver when another package's does not load."""
    if name in SOLVERS:
        return Listed(name, SOLVERS[name]).load()
    found, refused = solvers()
    if name not in found:
        near = get_close_matches(name, found, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        taken = [sentence for sentence in refused if repr(name) in sentence]
        raise NotFound("; ".join([f"no solver is called {name!r}; {hint}known are: {', '.join(found)}", *taken]))
    return found[name].load()
