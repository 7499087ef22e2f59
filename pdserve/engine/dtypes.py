"""Which number type a configuration asks for; torch-free, so that any part may ask."""

from __future__ import annotations

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.types import Numerics

EXACT = frozenset({"float32", "float64"})


def resolve_dtype(model: ModelConfig) -> str:
    """A key of ``ITEM_BYTES``. ConfigError when numerics and dtype contradict each other."""
    exact = Numerics(model.numerics) is Numerics.EXACT
    if model.dtype == "auto":
        return "float32" if exact else "bfloat16"
    if exact and model.dtype not in EXACT:
        raise ConfigError(
            f"model.numerics exact needs float32 or float64, model.dtype is {model.dtype}",
            param="model.dtype",
        )
    return model.dtype
