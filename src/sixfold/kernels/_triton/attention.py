"""Attention of a block of query rows over a range of compressed pages, and the merge of ranges.

Row r of a KV head is query r % queries of its group's head r // queries. Tiles have rows on their
last axis: a group has few, and tensor cores take as few as eight there. What happens to a page is
derived in kernels/attention/README.md.
"""

import triton
import triton.language as tl

from sixfold.kernels._triton.levels import level_tiles, table_registers, tile_coordinates
from sixfold.kernels._triton.pages import decoded_scale

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Weights below it are zero beside those of any token that counts.
LEAST_UNIT = tl.constexpr(1e-33)


@triton.jit
def query_tiles(
    query,
    unit,
    columns,
    SYMBOL_BITS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRED: tl.constexpr,
    HALF_BITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The coordinates of rows that meet each of `level_tiles`, over `unit`; 0 in padding."""
    found = ()
    for part in tl.static_range(PARTS):
        place = tile_coordinates(columns, part, SYMBOL_BITS, DIM, PAIRED, HALF_BITS)[:, None]
        x = tl.load(query + place, mask=place < DIM, other=0.0)
        found = found + ((x / unit[None, :]).to(tl.float16),)
    return found


@triton.jit
def softcapped(x, softcap):
    """softcap·tanh(x / softcap), which the interpreter's `tl` has no name for."""
    # Beyond 15 tanh is 1 in float32, and the exponential could overflow.
    y = tl.minimum(tl.maximum(x / softcap, -15.0), 15.0)
    e = tl.exp2(y * (2.0 * LOG2_E))
    # A NaN stays one, whatever minimum does with it.
    # e - 1 has no digits left near 0, where the series of tanh has all of them.
    square = y * y
    series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315)))
    capped = tl.where(tl.abs(y) < 0.15, y * series, (e - 1.0) / (e + 1.0))
    return tl.where(x == x, softcap * capped, x)


@triton.jit
def masked(x, pointers, visible, never, ADDITIVE: tl.constexpr):
    """Logits under a mask; numbers up to `never` mean -inf."""
    found = tl.load(pointers, mask=visible, other=0)
    if ADDITIVE:
        found = found.to(tl.float32)
        return tl.where(visible & (found > never), x + found, float("-inf"))
    return tl.where(found != 0, x, float("-inf"))


@triton.jit
def pages_used(lengths, n_pages):
    """Pages up to the last that has a token: the others need not even be looked at."""
    used = 0
    for block in range(0, n_pages, 1024):
        page = block + tl.arange(0, 1024)
        length = tl.load(lengths + page, mask=page < n_pages, other=0)
        used = tl.maximum(used, tl.max(tl.where(length > 0, page + 1, 0), 0))
    return used


@triton.jit
def attend_pages(
    query,
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    slots,
    starts,
    lengths,
    first_token,
    key_book,
    value_book,
    offset,
    mask,
    out,
    lse,
    kv_heads,
    n_pages,
    n_rows,
    n_queries,
    origin,
    slots_stride,
    starts_stride,
    lengths_stride,
    key_slot_stride,
    key_head_stride,
    key_scale_slot_stride,
    key_scale_head_stride,
    value_slot_stride,
    value_head_stride,
    value_scale_slot_stride,
    value_scale_head_stride,
    first_batch_stride,
    first_query_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_query_stride,
    mask_columns,
    never,
    softcap,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_SYMBOL_BITS: tl.constexpr,
    VALUE_SYMBOL_BITS: tl.constexpr,
    KEY_PAIRED: tl.constexpr,
    VALUE_PAIRED: tl.constexpr,
    KEY_HALF_BITS: tl.constexpr,
    VALUE_HALF_BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    MASK: tl.constexpr,
    ADDITIVE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PERMUTE: tl.constexpr,
):
    """One split of the pages, one block of rows and of value coordinates, one KV head.

    The output is normalised; `out` is [splits, batch, kv_heads, n_rows, VALUE_DIM] and `lse` the
    same without the last axis, both float32.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    block = tl.program_id(1) // VALUE_BLOCKS
    value_start = tl.program_id(1) % VALUE_BLOCKS * BLOCK_VALUE
    # int64: what it is multiplied with may be large.
    head = tl.program_id(2).to(tl.int64)
    batch, kv_head = head // kv_heads, head % kv_heads

    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid_row = row < n_rows
    row = tl.minimum(row, n_rows - 1)
    query_index = row % n_queries
    query += (head * n_rows + row)[None, :] * KEY_DIM
    key_column = tl.arange(0, BLOCK_KEY)
    # Float16 with a unit a row: a product then depends on no row's magnitude.
    unit = tl.full([BLOCK_ROWS], LEAST_UNIT, tl.float32)
    for block_start in tl.static_range(0, KEY_DIM, BLOCK_KEY):
        place = block_start + key_column[:, None]
        x = tl.load(query + place, mask=place < KEY_DIM, other=0.0)
        unit = tl.maximum(unit, tl.max(tl.abs(x), 0))
    if KEY_BLOCKS == 1:
        queries = query_tiles(
            query,
            unit,
            key_column,
            KEY_SYMBOL_BITS,
            KEY_DIM,
            KEY_PAIRED,
            KEY_HALF_BITS,
            KEY_PARTS,
        )

    added = tl.zeros([BLOCK_ROWS], tl.float32)
    if OFFSET:
        added = tl.load(offset + head * n_rows + row)
    first = tl.load(first_token + batch * first_batch_stride + query_index * first_query_stride).to(
        tl.int64
    )
    if MASK:
        mask_head = kv_head * (n_rows // n_queries) + row // n_queries
        mask += batch * mask_batch_stride + mask_head * mask_head_stride
        mask += query_index * mask_query_stride

    key_tables = (0, 0, 0, 0)
    value_tables = (0, 0, 0, 0)
    if PERMUTE:
        if KEY_SYMBOL_BITS <= 4:
            key_tables = table_registers(key_book, KEY_SYMBOL_BITS)
        if VALUE_SYMBOL_BITS <= 4:
            value_tables = table_registers(value_book, VALUE_SYMBOL_BITS)

    token = tl.arange(0, 64)
    value_column = value_start + tl.arange(0, BLOCK_VALUE)
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weight_unit = tl.full([BLOCK_ROWS], LEAST_UNIT, tl.float32)
    sums = ()
    for _ in tl.static_range(VALUE_PARTS):
        sums = sums + (tl.zeros([BLOCK_VALUE, BLOCK_ROWS], tl.float32),)

    slots += batch * slots_stride
    starts += batch * starts_stride
    lengths += batch * lengths_stride
    n_pages = pages_used(lengths, n_pages)
    # Pages hold at most 64 tokens: no token before `first` is in the pages from here on.
    hidden_pages = (tl.min(first) - tl.load(starts) - origin) // 64
    hidden_pages = tl.minimum(tl.maximum(hidden_pages, 0), n_pages).to(tl.int32)
    each = tl.cdiv(n_pages - hidden_pages, splits)
    page_start = hidden_pages + split * each
    for page in range(page_start, tl.minimum(page_start + each, n_pages)):
        slot = tl.load(slots + page).to(tl.int64)
        start, length = tl.load(starts + page).to(tl.int64) + origin, tl.load(lengths + page)
        valid = token < length
        scales = slot * key_scale_slot_stride + kv_head * key_scale_head_stride
        key_scale = tl.load(key_scales + scales + token, mask=valid, other=0.0)
        scales = slot * value_scale_slot_stride + kv_head * value_scale_head_stride
        value_scale = tl.load(value_scales + scales + token, mask=valid, other=0.0)

        logits = tl.zeros([64, BLOCK_ROWS], tl.float32)
        for block_number in tl.static_range(KEY_BLOCKS):
            columns = block_number * BLOCK_KEY + key_column
            keys = level_tiles(
                key_codes + slot * key_slot_stride + kv_head * key_head_stride,
                key_book,
                key_tables,
                token[:, None],
                columns[None, :],
                KEY_SYMBOL_BITS,
                KEY_DIM,
                KEY_PAIRED,
                KEY_HALF_BITS,
                True,
                PERMUTE,
            )
            if KEY_BLOCKS > 1:
                queries = query_tiles(
                    query,
                    unit,
                    columns,
                    KEY_SYMBOL_BITS,
                    KEY_DIM,
                    KEY_PAIRED,
                    KEY_HALF_BITS,
                    KEY_PARTS,
                )
            for part in tl.static_range(KEY_PARTS):
                logits = tl.dot(keys[part], queries[part], logits)
        logits = logits * (unit[None, :] * decoded_scale(key_scale)[:, None])
        if OFFSET:
            logits += added[None, :]
        if SOFTCAP:
            logits = softcapped(logits, softcap)
        position = start + token
        visible = valid[:, None] & (position[:, None] >= first[None, :])
        if MASK:
            visible = visible & (position < mask_columns)[:, None]
            pointers = mask[None, :] + position[:, None]
            logits = masked(logits, pointers, visible, never, ADDITIVE)
        else:
            logits = tl.where(visible, logits, float("-inf"))
        logits = logits * LOG2_E

        new_maximum = tl.maximum(maximum, tl.max(logits, 0))
        # A row that has seen nothing has no maximum: 0 stands in.
        anchor = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(logits - anchor[None, :])
        decay = tl.exp2(maximum - anchor)
        total = total * decay + tl.sum(weights, 0)
        maximum = new_maximum
        # Weights in float16 too, in units of the largest so far.
        # A token without weight may hold anything: 0 times NaN would be NaN.
        weights = tl.where(weights == 0.0, 0.0, weights * decoded_scale(value_scale)[:, None])
        new_unit = tl.maximum(weight_unit * decay, tl.max(weights, 0))
        new_unit = tl.maximum(new_unit, LEAST_UNIT)
        inverse = 1.0 / new_unit
        kept = (weight_unit * decay * inverse)[None, :]
        weight_unit = new_unit
        weights = (weights * inverse[None, :]).to(tl.float16)
        values = level_tiles(
            value_codes + slot * value_slot_stride + kv_head * value_head_stride,
            value_book,
            value_tables,
            token[None, :],
            value_column[:, None],
            VALUE_SYMBOL_BITS,
            VALUE_DIM,
            VALUE_PAIRED,
            VALUE_HALF_BITS,
            False,
            PERMUTE,
        )
        new_sums = ()
        for part in tl.static_range(VALUE_PARTS):
            new_sums = new_sums + (tl.dot(values[part], weights, sums[part] * kept),)
        sums = new_sums

    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    stretch = weight_unit / total
    target = (split * tl.num_programs(2) + head) * n_rows + row
    for part in tl.static_range(VALUE_PARTS):
        place = tile_coordinates(
            value_column, part, VALUE_SYMBOL_BITS, VALUE_DIM, VALUE_PAIRED, VALUE_HALF_BITS
        )
        inside = valid_row[None, :] & (place < VALUE_DIM)[:, None]
        pointers = out + (target[None, :] * VALUE_DIM + place[:, None])
        tl.store(pointers, sums[part] * stretch[None, :], mask=inside)
    if value_start == 0:
        log = tl.where(seen, (maximum + tl.log2(total)) * LN_2, float("-inf"))
        tl.store(lse + target, log, mask=valid_row)


@triton.jit
def merge_ranges(
    out,
    lse,
    merged,
    merged_lse,
    n_ranges,
    n_rows,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge `n_ranges` normalised outputs of one row by log-sum-exp, as `merge_partials` does."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    maximum = float("-inf")
    total = 0.0
    sums = tl.zeros([BLOCK], tl.float32)
    for number in range(n_ranges):
        source = number * n_rows.to(tl.int64) + row
        found = tl.load(lse + source)
        part = tl.load(out + source * DIM + column, mask=column < DIM, other=0.0)
        # NaN must win, and `maximum` may drop it: it shows in `weight`.
        new_maximum = tl.maximum(maximum, found)
        anchor = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        decay = tl.exp2((maximum - anchor) * LOG2_E)
        weight = tl.exp2((found - anchor) * LOG2_E)
        total = total * decay + weight
        sums = sums * decay + part * weight
        maximum = new_maximum
    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    tl.store(merged + row * DIM + column, sums / total, mask=column < DIM)
    log = tl.where(seen, maximum + tl.log2(total) * LN_2, float("-inf"))
    tl.store(merged_lse + row, log)
