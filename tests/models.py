"""Small models with random weights, as real folders: safetensors, tokenizer, chat template.

Big enough that greedy answers vary and depend on the whole prompt, small enough that float64 on one
core is fast. The same family and seed always give the same folder content.
"""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 512
CONTEXT = 512
WINDOW = 40  # of the families that slide: several blocks, far below the context

BOS, EOS, START, END, PAD = "<s>", "</s>", "<|start|>", "<|end|>", "<pad>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog while the rain in Spain stays in the plain.",
    "A block of tokens travels from the worker that reads to the worker that writes.",
    "Numbers: 0 1 2 3 4 5 6 7 8 9, sums and differences; (brackets) [too] {as well}.",
    "Größe, naïve café, Ελληνικά, 日本語, emoji 🙂 — so that bytes are split inside characters.",
)


def lasting_folder(name: str) -> Path:
    """For what is made once and used by many tests: there until this process ends."""
    folder = Path(mkdtemp(prefix=f"pdserve-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 4,
    "tie_word_embeddings": False,
}
_SLIDING = {"sliding_window": WINDOW}
_MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

FAMILIES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, **_SLIDING, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**_COMMON, head_dim=12),
    "gemma2": lambda: transformers.Gemma2Config(
        **_COMMON,
        **_SLIDING,
        **_MIXED_LAYERS,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_COMMON, **_SLIDING, **_MIXED_LAYERS, head_dim=8, query_pre_attn_scalar=8
    ),
}


def tiny_model(family: str, folder: Path, seed: int) -> Path:
    """Writes a model of one of FAMILIES into ``folder`` (float64) and returns the folder."""
    config = FAMILIES[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    randomize(model, seed)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=4
    )
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough for sharp attention and well separated logits."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
            if weight.dim() == 1:  # norms and biases: near their neutral value
                weight.add_(0.1 * noise)
            elif "embed" in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise * (1.6 / weight.shape[1] ** 0.5))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of VOCAB entries with special tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=1,
        special_tokens=[BOS, EOS, START, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    fast.chat_template = TEMPLATE
    fast.model_max_length = CONTEXT
    fast.save_pretrained(folder)
