"""The package's modules need each other in one direction."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from countdown_kd.config import ROOT

MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in (ROOT / "countdown_kd").rglob("*.py")
}


def needed(module: str) -> set[str]:
    """The modules of the package that a module imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("countdown_kd"):
            names = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= names or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found - {module}


def test_no_module_needs_one_that_needs_it():
    graph = TopologicalSorter({module: needed(module) for module in MODULES})
    try:
        graph.prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))
