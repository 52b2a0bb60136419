"""Print what the house is measured by, and fail where a bar is missed: `python -m tools.house`.

Cycles count every import, those inside functions and those for types too, since a reader follows them all the same.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import grimp

PACKAGE = "overpaint"
MODULES, LINES, MEDIAN_FUNCTION, LONGEST_FUNCTION = 140, 25_000, 8, 60
FREE_OF_TORCH = ("overpaint.registry", "overpaint.core", "overpaint.cli")
TORCH = {"torch", "diffusers", "transformers", "safetensors"}

Sources = Mapping[Path, ast.Module]


def main() -> int:
    """One line for each measure; the exit code is the number of bars that are missed."""
    sources = {path: ast.parse(path.read_text("utf-8")) for path in sorted(Path(PACKAGE).rglob("*.py"))}
    lengths, shared = _function_lengths(sources), _shared_class_names(sources)
    cycles, loads_torch = _modules_in_cycles(), _modules_that_load_torch(sources)
    rows = (
        ("modules", len(sources), MODULES),
        ("lines", sum(len(path.read_text("utf-8").splitlines()) for path in sources), LINES),
        ("lines of a function, median", statistics.median(lengths), MEDIAN_FUNCTION),
        ("lines of a function, longest", max(lengths), LONGEST_FUNCTION),
        ("class names that stand for two things", len(shared), 0),
        ("modules in import cycles", len(cycles), 0),
        ("torch-free modules that load torch", len(loads_torch), 0),
    )
    for what, value, bar in rows:
        print(f"{'missed' if value > bar else 'holds':6}  {what:40} {value:>8}  at most {bar}")
    for line in (*(f"{name}: {', '.join(paths)}" for name, paths in shared.items()), *cycles, *loads_torch):
        print(f"        {line}")
    return sum(value > bar for _, value, bar in rows)


def _function_lengths(sources: Sources) -> list[int]:
    return [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for tree in sources.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def _shared_class_names(sources: Sources) -> dict[str, list[str]]:
    paths = defaultdict(list)
    for path, tree in sources.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                paths[node.name].append(str(path))
    return {name: places for name, places in paths.items() if len(places) > 1}


def _modules_in_cycles() -> list[str]:
    """Modules from which a chain of imports leads back to themselves, imports for types included."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=False)
    return sorted(
        module
        for module in graph.modules
        if any(
            imported == module or graph.chain_exists(importer=imported, imported=module)
            for imported in graph.find_modules_directly_imported_by(module)
        )
    )


def _modules_that_load_torch(sources: Sources) -> list[str]:
    """Modules of the rooms that answer at once, but import PyTorch or its kin when they are imported."""
    return [
        module
        for path, tree in sources.items()
        if (module := ".".join(path.with_suffix("").parts).removesuffix(".__init__")).startswith(FREE_OF_TORCH)
        and TORCH & {name for node in tree.body for name in _imported_by(node)}
    ]


def _imported_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [(node.module or "").split(".")[0]] if isinstance(node, ast.ImportFrom) else []


if __name__ == "__main__":
    sys.exit(main())
