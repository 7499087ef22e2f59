"""What our packages must not contain: unsafe loading, swallowed errors, unfinished work."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest

from tests.source_tree import dotted, imports, sources

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "marshal", "shelve", "dill"}
UNSAFE_MODULES |= {"joblib", "jsonpickle"}
UNSAFE_CALLS = {
    *("eval", "exec", "__import__", "os.system", "os.popen"),
    *("torch.load", "torch.package.PackageImporter", "ray.cloudpickle.loads"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"),
}
UNSAFE_KEYWORDS = {
    ("allow_pickle", True),
    ("trust_remote_code", True),
    ("weights_only", False),
    ("shell", True),
}
# In pieces, so that who looks for such words does not find this file.
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
UNWRITTEN = "NotImplemented" + "Error"
BROAD = {"Exception", "BaseException"}


def problems(code: str, package: str = "pdserve") -> Iterator[tuple[int, str]]:
    """(line, what is wrong) for one file's text."""
    tree = ast.parse(code)
    for line, module in imports(tree, package):
        for name in module.split("."):
            if name in UNSAFE_MODULES:
                yield line, f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((node.lineno, text) for text in call_problems(node))
        elif isinstance(node, ast.ExceptHandler) and swallows(node):
            yield node.lineno, "swallows every exception"
        elif isinstance(node, ast.Name) and node.id == UNWRITTEN:
            yield node.lineno, "is not implemented"
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT and UNFINISHED.search(token.string):
            yield token.start[0], token.string


def call_problems(node: ast.Call) -> Iterator[str]:
    name = dotted(node.func)
    if name in UNSAFE_CALLS:
        yield f"calls {name}"
    for keyword in node.keywords:
        value = keyword.value
        if isinstance(value, ast.Constant) and (keyword.arg, value.value) in UNSAFE_KEYWORDS:
            yield f"passes {keyword.arg}={value.value}"
    if name.rpartition(".")[2] == "suppress" and any(
        dotted(argument) in BROAD for argument in node.args
    ):
        yield "suppresses every exception"


def swallows(handler: ast.ExceptHandler) -> bool:
    """Catches everything and does nothing about it."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    broad = any(kind is None or dotted(kind) in BROAD for kind in kinds)
    return broad and all(
        isinstance(statement, ast.Pass | ast.Continue)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in handler.body
    )


def test_our_packages_contain_none_of_it() -> None:
    found = [
        f"{source.name}:{line}: {what}"
        for source in sources()
        for line, what in problems(source.text, source.package)
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from ray import cloudpickle",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "import yaml\nyaml.load(f, Loader=yaml.Loader)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "load(x, trust_remote_code=True)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept:\n    ...",
        "for x in y:\n    try:\n        f()\n    except (ValueError, Exception):\n        continue",
        "import contextlib\nwith contextlib.suppress(Exception):\n    f()",
        f"def f():\n    raise {UNWRITTEN}",
        "x = 1  # TO" + "DO later",
    ],
)
def test_the_scan_sees_each_kind(code: str) -> None:
    assert list(problems(code))


@pytest.mark.parametrize(
    "code",
    [
        "try:\n    f()\nexcept OSError:\n    pass",
        "try:\n    f()\nexcept Exception:\n    log.exception('x')",
        "import yaml\nyaml.safe_load(f)",
        "model.eval()",
        "import safetensors.torch\nsafetensors.torch.load(b)",
    ],
)
def test_the_scan_leaves_the_rest_alone(code: str) -> None:
    assert list(problems(code)) == []
