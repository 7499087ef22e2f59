"""The source files of our own packages, parsed: for tests that read code instead of running it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pdserve", "kv_transfer", "cache_tiers", "prefill_worker", "decode_worker", "router")
# Measures the others; no part of what is installed.
BENCH = "bench"
GENERATED = ROOT / "pdserve" / "v1"


@dataclass(frozen=True)
class Source:
    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def room(self) -> str:
        return self.path.relative_to(ROOT).parts[0]

    @property
    def package(self) -> str:
        """The dotted package that the file lies in."""
        return ".".join(self.path.relative_to(ROOT).parts[:-1])


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file of our packages that was written by hand."""
    found = []
    for room in (*ROOMS, BENCH):
        for path in sorted((ROOT / room).rglob("*.py")):
            if GENERATED not in path.parents:
                text = path.read_text(encoding="utf-8")
                found.append(Source(path, text, ast.parse(text, str(path))))
    return tuple(found)


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, wherever in the file; relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            yield node.lineno, base
            # "from a import b" may import the module a.b.
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def dotted(node: ast.expr) -> str:
    """``a.b.c`` for such an expression, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""
