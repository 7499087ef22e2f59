"""Files and functions stay small enough to be read at once; modules say what they are for."""

import ast
from collections import Counter
from pathlib import Path

from tests.source_tree import sources

FILE_LINES = 500
FUNCTION_LINES = 70


def test_files_are_short() -> None:
    lengths = {source.name: source.text.count("\n") for source in sources()}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = [
        f"{source.name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]
    assert long == []


def test_modules_say_what_they_are_for() -> None:
    silent = [
        source.name
        for source in sources()
        if source.text.strip() and not ast.get_docstring(source.tree)
    ]
    assert silent == []


def test_no_two_tests_have_one_file_name() -> None:
    """They are imported by it: run together, the second could not be collected."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []
