"""Finds sets whose order would differ from run to run: `.venv/bin/python tools/sets.py src/hwpoison/core`.

Iteration over a set goes by the hashes of its members. Only those of numbers are the same in every run, so in code that is
to do the same in every run a set is declared as `set[int]`, or sorted; what else would be a set is a dict, which keeps its
order.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

NAMES = ("set", "frozenset")
ALLOWED = ("set[int]", "frozenset[int]")


def unordered(tree: ast.AST) -> Iterator[int]:
    """The lines on which a set is made or declared that is not one of numbers."""
    harmless = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) in ALLOWED:
            harmless.add(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "sorted":
            harmless.update(node.args)
    for node in ast.walk(tree):
        wrong = _declares(node) or _makes(node) or _by_identity(node) or _of_keys(node) or _of_tasks(node)
        if node not in harmless and (wrong or _inside_asyncio(node)):
            yield node.lineno  # type: ignore[attr-defined]


def _declares(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and ast.unparse(node.value) in NAMES and ast.unparse(node) not in ALLOWED


def _makes(node: ast.AST) -> bool:
    called = isinstance(node, ast.Call) and ast.unparse(node.func) in NAMES
    return called or isinstance(node, ast.Set | ast.SetComp)


def _by_identity(node: ast.AST) -> bool:
    """Addresses of objects differ too, and hashes of text."""
    dunder = isinstance(node, ast.Attribute) and node.attr == "__hash__"
    return dunder or (isinstance(node, ast.Name) and node.id in ("id", "hash"))


def _of_tasks(node: ast.AST) -> bool:
    """What `asyncio.wait` returns is two sets: it may be waited for, and not looked at."""
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr | ast.For | ast.comprehension | ast.Return):
        return False
    return "asyncio.wait(" in ast.unparse(node.iter if isinstance(node, ast.For | ast.comprehension) else node)


def _inside_asyncio(node: ast.AST) -> bool:
    """Modules that asyncio has imported: the clock, among others."""
    inner = node.value if isinstance(node, ast.Attribute) else None
    outside = isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == "asyncio"
    return outside and isinstance(inner, ast.Attribute) and inner.attr.islower()


def _of_keys(node: ast.AST) -> bool:
    """What the keys of two dicts have in common, or one has more, is a set."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.BitAnd | ast.BitOr | ast.BitXor | ast.Sub):
        return False
    sides = (node.left, node.right)
    return any(
        isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr in ("keys", "items")
        for one in sides
    )


def main(folder: str) -> int:
    """Say where; the exit status."""
    found = [
        f"{path}:{line}: this has no order, or no value, that is the same in every run: use a dict, a tuple, the machine"
        for path in sorted(Path(folder).rglob("*.py"))
        for line in sorted(set(unordered(ast.parse(path.read_text()))))
    ]
    print("\n".join(found) or "No set without an order.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
