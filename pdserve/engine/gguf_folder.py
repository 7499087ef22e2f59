"""Reads a GGUF file with transformers and writes it as a plain bfloat16 model folder."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pdserve.engine.progress import Progress, ProgressSink
from pdserve.engine.quiet import quiet_transformers


def write_folder(gguf: Path, folder: Path, progress: ProgressSink) -> None:
    """Config, generation config, tokenizer, chat template and safetensors. OSError."""
    with quiet_transformers():
        progress(Progress("reading the tokenizer", 1, 3))
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        progress(Progress("reading the weights", 2, 3))
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
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
        except SafetensorError as error:
            # The writer puts the system's error into its text alone; tell a full disk by its room.
            full = shutil.disk_usage(folder).free < model.get_memory_footprint()
            code = errno.ENOSPC if full else errno.EIO
            raise OSError(code, os.strerror(code), str(folder)) from error
        tokenizer.save_pretrained(folder)
