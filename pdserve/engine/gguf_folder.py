"""Reads a GGUF file with transformers and writes it as a bfloat16 folder, with its blocks aside."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    modeling_gguf_pytorch_utils,
)

from pdserve.engine.gguf_blocks import keep_blocks
from pdserve.engine.progress import Progress, ProgressSink
from pdserve.engine.quiet import LOADING_ERRORS, first_line, quiet_transformers
from pdserve.errors import ConfigError


def write_folder(gguf: Path, folder: Path, progress: ProgressSink) -> None:
    """Config, generation config, tokenizer, chat template and safetensors.

    ConfigError when the file cannot be read, OSError when the folder cannot be written.
    """
    with quiet_transformers(), _no_bar():
        tokenizer, model = _read(gguf, progress)
        # Dense by now, but still marked as quantized, which save_pretrained refuses to write.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer.model_max_length = min(
            tokenizer.model_max_length, model.config.max_position_embeddings
        )
        progress(Progress("writing safetensors", 3, 3))
        try:
            model.save_pretrained(folder)
            keep_blocks(gguf, model, folder)
        except SafetensorError as error:
            # The writer puts the system's error into its text alone; tell a full disk by its room.
            full = shutil.disk_usage(folder).free < model.get_memory_footprint()
            code = errno.ENOSPC if full else errno.EIO
            raise OSError(code, os.strerror(code), str(folder)) from error
        tokenizer.save_pretrained(folder)


@contextmanager
def _no_bar() -> Iterator[None]:
    """The reader of GGUF files takes its bar from tqdm itself, past the library's own switch."""
    module: Any = modeling_gguf_pytorch_utils
    bar = module.tqdm
    module.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        module.tqdm = bar


def _read(gguf: Path, progress: ProgressSink) -> tuple[Any, Any]:
    """The file's tokenizer and its model with dense weights."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        progress(Progress("reading the tokenizer", 1, 3))
        tokenizer = AutoTokenizer.from_pretrained(**where)
        progress(Progress("reading the weights", 2, 3))
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except LOADING_ERRORS as error:
        raise ConfigError(f"{gguf} cannot be read: {first_line(error)}") from error
    return tokenizer, model
