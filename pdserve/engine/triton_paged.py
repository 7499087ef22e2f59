"""Attention of single tokens over the paged pool, in Triton; imported only where triton is there.

    write_kv       each token's keys and values into its slot; none for a slot of no block
    attend_part    one token, the query heads of one KV head, one part of its keys
    join_parts     the parts' results, weighed by their sums

The pool is read where it lies: a block's offset, a layer's offset in it, then tokens, heads and
elements. Long contexts are cut into parts so that few tokens still fill the device. A token that
sees no key gets zeros. Launched by triton_layer.py; not run on a GPU yet, tested in Triton's
interpreter.
"""

# Triton's language is no Python that types could describe.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_kv(
    source,
    pool,
    slot_blocks,
    slot_offsets,
    source_head,
    source_token,
    block_stride,
    layer_offset,
    heads,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,  # SIZE, rounded up to a power of two
):
    token, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(slot_blocks + token).to(tl.int64)
    if block >= 0:
        place = tl.load(slot_offsets + token).to(tl.int64)
        element = tl.arange(0, WIDE)
        own = element < SIZE
        value = tl.load(source + head * source_head + token * source_token + element, mask=own)
        target = block * block_stride + layer_offset + (place * heads + head) * SIZE
        tl.store(pool + target + element, value, mask=own)


@triton.jit
def rows_at(source, at, here, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Rows of SIZE elements from ``at`` on, zeros where ``here`` is false and beyond SIZE."""
    element = tl.arange(0, WIDE)
    mask = here[:, None] & (element[None, :] < SIZE)
    return tl.load(source + at[:, None] + element[None, :], mask=mask, other=0.0)


@triton.jit
def add_keys(q, k, v, seen, scale, softcap, most, total, mixed, CAPPED: tl.constexpr):
    """The sums after some more keys, of which at least one is seen."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:
        # tanh by the exponential function, which cannot overflow here.
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    larger = tl.maximum(most, tl.max(scores, 1))
    shrink = tl.exp(most - larger)
    weights = tl.exp(scores - larger[:, None])
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None]
    mixed += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return larger, total, mixed


@triton.jit
def attend_part(
    query,
    pool,
    width,  # of the tables, on the device
    item_tokens,
    item_rows,
    item_contexts,
    tables,
    parts,
    sums,
    query_head,
    query_token,
    block_stride,
    key_offset,
    value_offset,
    heads,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,  # query heads of a KV head
    ROWS: tl.constexpr,  # GROUP, rounded up to what a matrix product takes
    KEY: tl.constexpr,
    KEY_WIDE: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_WIDE: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens of a block
    STEP: tl.constexpr,  # keys at a time
    PARTS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    item, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(item_contexts + item)
    first = tl.where(window > 0, tl.maximum(context - window, 0), 0)
    length = tl.cdiv(tl.cdiv(context - first, PARTS), STEP) * STEP
    begin = first + part * length
    end = tl.minimum(context, begin + length)
    token = tl.load(item_tokens + item).to(tl.int64)
    table = tables + tl.load(item_rows + item).to(tl.int64) * tl.load(width)

    row = tl.arange(0, ROWS)
    own = row < GROUP
    at = (head * GROUP + row).to(tl.int64) * query_head + token * query_token
    q = rows_at(query, at, own, KEY, KEY_WIDE)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_WIDE], tl.float32)
    for start in range(begin, end, STEP):
        position = start + tl.arange(0, STEP)
        seen = position < end
        block = tl.load(table + position // BLOCK, mask=seen, other=0).to(tl.int64)
        slot = (position % BLOCK) * heads + head
        k = rows_at(pool, block * block_stride + key_offset + slot * KEY, seen, KEY, KEY_WIDE)
        value_at = block * block_stride + value_offset + slot * VALUE
        v = rows_at(pool, value_at, seen, VALUE, VALUE_WIDE)
        most, total, mixed = add_keys(q, k, v, seen, scale, softcap, most, total, mixed, CAPPED)

    here = ((item * heads + head) * PARTS + part) * ROWS + row
    target = parts + here[:, None] * VALUE_WIDE + tl.arange(0, VALUE_WIDE)[None, :]
    tl.store(target, mixed, mask=own[:, None])
    tl.store(sums + 2 * here, most, mask=own)
    tl.store(sums + 2 * here + 1, total, mask=own)


@triton.jit
def join_parts(
    parts,
    sums,
    out,
    item_tokens,
    out_token,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_WIDE: tl.constexpr,
    PARTS: tl.constexpr,
):
    item, query_head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1) // GROUP
    head, row = query_head // GROUP, query_head % GROUP
    part = tl.arange(0, PARTS)
    value_at = tl.arange(0, VALUE_WIDE)
    here = ((item * heads + head) * PARTS + part) * ROWS + row
    most = tl.load(sums + 2 * here)
    total = tl.load(sums + 2 * here + 1)
    largest = tl.max(most, 0)
    weight = tl.where(total > 0, tl.exp(most - largest), 0.0)
    mixed = tl.load(parts + here[:, None] * VALUE_WIDE + value_at[None, :])
    whole = tl.sum(total * weight, 0)
    result = tl.sum(mixed * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    token = tl.load(item_tokens + item).to(tl.int64)
    target = out + token * out_token + query_head * VALUE + value_at
    tl.store(target, result.to(out.dtype.element_ty), mask=value_at < VALUE)
