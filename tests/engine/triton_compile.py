"""Compiles Triton's kernels for a GPU that need not be here (test_triton_paged.py starts it).

The interpreter takes what the compiler refuses, such as a variable whose type changes in a loop.
"""

from __future__ import annotations

import itertools
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pdserve.engine import triton_paged
from pdserve.engine.triton_layer import LEAST_ROWS, STEP_KEYS

HOPPER = GPUTarget("cuda", 90, 32)


def compiled(kernel: object, types: dict[str, str], constants: dict[str, object]) -> int:
    """Bytes of the machine code."""
    names = kernel.arg_names  # type: ignore[attr-defined]
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return len(triton.compile(source, target=HOPPER).asm["cubin"])


def attention(kind: str, parts: int, capped: bool, group: int, head: int) -> int:
    plan = dict.fromkeys(("width", "item_tokens", "item_rows", "item_contexts", "tables"), "*i32")
    numbers = dict.fromkeys(
        ("query_head", "query_token", "block_stride", "key_offset", "value_offset", "heads"), "i64"
    )
    sizes = {
        "GROUP": group,
        "ROWS": max(LEAST_ROWS, group),
        "VALUE": head,
        "VALUE_WIDE": head,
        "PARTS": parts,
    }
    size = compiled(
        triton_paged.attend_part,
        {
            **{"query": f"*{kind}", "pool": f"*{kind}", "parts": "*fp32", "sums": "*fp32"},
            **{**plan, **numbers, "heads": "i32"},
            **{"scale": "fp32", "softcap": "fp32", "window": "i32"},
        },
        {
            **sizes,
            **{"KEY": head, "KEY_WIDE": head, "BLOCK": 16, "STEP": STEP_KEYS, "CAPPED": capped},
        },
    )
    join = {"parts": "*fp32", "sums": "*fp32", "out": f"*{kind}"}
    join |= {"item_tokens": "*i32", "out_token": "i32"}
    return size + compiled(triton_paged.join_parts, join, sizes)


def writing(kind: str, head: int) -> int:
    names = triton_paged.write_kv.arg_names
    types = dict.fromkeys(names, "i32")
    types |= dict.fromkeys(names[:2], f"*{kind}")
    types |= dict.fromkeys(("slot_blocks", "slot_offsets"), "*i32")
    return compiled(triton_paged.write_kv, types, {"SIZE": head, "WIDE": head})


def main() -> int:
    shapes = ((4, 128), (3, 64))  # Llama-3.1's and SmolLM2's
    for kind, (parts, capped), (group, head) in itertools.product(
        ("bf16", "fp32"), ((16, False), (1, True)), shapes
    ):
        print(kind, parts, capped, group, head, attention(kind, parts, capped, group, head))
    for kind in ("bf16", "fp16", "fp32"):
        print(kind, writing(kind, 128))
    return 0


if __name__ == "__main__":
    sys.exit(main())
