"""A name that is imported for types alone is used for types alone.

A command imports what it needs when it runs. Where a function uses a name that only the checker of
types has seen imported, neither mypy nor ruff complains, and the command ends in a NameError.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src/sempervirt"
FOR_TYPES = [path for path in sorted(SOURCE.rglob("*.py")) if "TYPE_CHECKING" in path.read_text()]


def for_types_alone(node: ast.AST) -> bool:
    """Whether `node` is the block of imports that exist for the checker of types."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported(tree: ast.AST) -> set[str]:
    """The names that the imports below `tree` bind."""
    return {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def missing(node: ast.AST, wanted: set[str]) -> list[str]:
    """Uses below `node` of names in `wanted`, each as `line: name`; annotations are no uses."""
    if for_types_alone(node):
        return []
    parts = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        bound = {one.id for one in ast.walk(node) if _is_stored(one) and isinstance(one, ast.Name)}
        wanted = wanted - imported(node) - bound
        parts = [*node.body, *node.decorator_list]
    elif isinstance(node, ast.AnnAssign):
        parts = [node.value] if node.value is not None else []
    elif isinstance(node, ast.Name) and node.id in wanted:
        return [f"{node.lineno}: {node.id}"]
    return [use for part in parts for use in missing(part, wanted)]


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def uses(text: str) -> list[str]:
    """What would be a NameError in a module."""
    tree = ast.parse(text)
    blocks = [node for node in ast.walk(tree) if for_types_alone(node)]
    return missing(tree, {name for block in blocks for name in imported(block)})


@pytest.mark.parametrize("path", FOR_TYPES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_name_is_missing_when_it_is_used(path: Path) -> None:
    assert uses(path.read_text()) == []


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("def f(a: View) -> View:\n    return View()\n", ["4: View"]),
        ("def f(a: View) -> View:\n    from a import View\n    return View()\n", []),
        ("def f(a: View) -> None:\n    b: View = a\n", []),
    ],
)
def test_a_use_is_told_from_an_annotation(body: str, found: list[str]) -> None:
    assert uses(f"if TYPE_CHECKING:\n    from a import View\n{body}") == found
