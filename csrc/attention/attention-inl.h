// Attention of some rows on a range of pages.
#pragma once

#include "attention/attention.h"
#include "attention/direct-inl.h"
#include "attention/products-inl.h"
#include "attention/softmax-inl.h"
#include "attention/unpack-inl.h"
#include "common/scale.h"

namespace sixfold {
namespace {

constexpr std::int64_t rounded_up(std::int64_t n, std::int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

// Coordinates of a query in the order of the tile, and zeros.
constexpr std::int64_t tile_length(const Codec& codec) { return 4 * codec.steps / codec.parts; }
constexpr std::int64_t padded_length(const Codec& codec) {
    return rounded_up(tile_length(codec), kLanes);
}

// One thread's memory: tiles of the page at hand, and what the rows carry from page to page.
struct Scratch {
    std::uint8_t *key_tile, *value_tile;
    // Below, rows are those of all heads, head by head.
    std::int32_t* queries;  // [kMaxRows, query_stride]: operands
    std::int64_t query_stride;
    float* padded;  // one query in the order of the tile
    RowView* rows;
    float *factor, *slack, *carry, *totals;  // [kMaxRows] each, [kMaxRows, 16] each
    std::int32_t *start, *scores, *weights, *fine;
    std::int64_t bytes;

    Scratch(const AttentionTask& task, std::byte* memory) {
        const Codec &keys = *task.keys.codec, &values = *task.values.codec;
        std::int64_t used = 0;
        auto take = [&]<class T>(T*& pointer, std::int64_t count) {
            pointer = reinterpret_cast<T*>(memory + used);
            used += rounded_up(count * static_cast<std::int64_t>(sizeof(T)), kUnitBytes);
        };
        // 64-byte stores of packed operands may end beyond the last step.
        query_stride = rounded_up(keys.steps, kLanes);
        take(key_tile, keys.tile_bytes);
        take(value_tile, values.tile_bytes);
        take(queries, kMaxRows * query_stride);
        take(padded, padded_length(keys));
        take(rows, kMaxRows);
        take(factor, kMaxRows);
        take(carry, kMaxRows * kLanes);
        take(totals, kMaxRows * kLanes);
        take(slack, kMaxRows);
        take(start, kMaxRows);
        take(scores, kRowBlock * kPageTokens);
        take(weights, kRowBlock * kPageTokens);
        take(fine, kRowBlock * kPageTokens);
        bytes = used;
    }
};

std::int64_t attention_scratch_bytes(const AttentionTask& task) {
    return Scratch(task, nullptr).bytes;
}

// Quantizes the padded query to the operands of the key tile; returns score -> logit.
float quantize_query(const Codec& codec, const float* padded, int length, std::int32_t* operands,
                     std::int32_t* start) {
    *start = 0;
    F32x16 most = set1(0.0f), all = set1(0.0f);
    for (int i = 0; i < length; i += kLanes) {
        const F32x16 x = magnitude(load(padded + i));
        most = larger(x, most);
        all = add(all, x);
    }
    const float top = largest(most), total = sum(all);
    const bool words = codec.arithmetic == Arithmetic::words;
    float range = words ? kWordOperand : 127.0f;
    if (words && total > 0.0f) {
        const float bounded = (kWordSum[0] - length) / total * top;
        range = bounded < range ? bounded : range;
    }
    const bool finite = total < kInfinity;
    const float inverse = finite && top > 1e-30f ? range / top : 0.0f;
    I32x16 sums = set1(0);
    for (int i = 0; i < length; i += kLanes) {
        const F32x16 x = finite ? load(padded + i) : set1(0.0f);
        const I32x16 whole = to_ints(mul(x, set1(inverse)));
        sums = add(sums, whole);
        if (words)
            store_words(reinterpret_cast<std::int16_t*>(operands + i / 2), swap_middle(whole));
        else
            store_bytes(reinterpret_cast<std::uint8_t*>(operands + i / 4), whole);
    }
    if (!words) *start = -Simd::kKeyFlip * static_cast<std::int32_t>(sum(to_floats(sums)));
    if (!finite) return __builtin_nanf("");
    return inverse > 0.0f ? codec.scale / inverse : 0.0f;
}

// Where row `r` of the work lies in the task.
std::int64_t source_row(const AttentionWork& work, int r) {
    const std::int64_t head = work.batch * work.task->kv_heads + work.first_head + r / work.rows;
    return head * work.task->rows + work.first_row + r % work.rows;
}

void clear_padded(const Codec& codec, float* padded) {
    for (int i = 0; i < padded_length(codec); ++i) padded[i] = 0.0f;
}

// One query as operands of the key tile; returns score -> logit. `padded` was cleared.
float prepare_query(const Codec& codec, const float* query, float* padded, std::int32_t* operands,
                    std::int32_t* start) {
    const std::int64_t length = tile_length(codec);
    const int first_axis = symbols_of(codec.dim, codec.axes);
    __builtin_memcpy(padded, query, first_axis * sizeof(float));
    if (codec.axes == 2)
        __builtin_memcpy(padded + length / 2, query + first_axis,
                         (codec.dim - first_axis) * sizeof(float));
    if (codec.arithmetic != Arithmetic::floats)
        return quantize_query(codec, padded, static_cast<int>(padded_length(codec)), operands,
                              start);
    __builtin_memcpy(operands, padded, length * sizeof(float));
    return 1.0f;
}

void prepare_queries(const AttentionWork& work, const Scratch& scratch) {
    const AttentionTask& task = *work.task;
    const Codec& codec = *task.keys.codec;
    clear_padded(codec, scratch.padded);
    for (int r = 0; r < work.heads * work.rows; ++r)
        scratch.factor[r] = prepare_query(codec, task.query + source_row(work, r) * codec.dim,
                                          scratch.padded, scratch.queries + r * scratch.query_stride,
                                          scratch.start + r);
}

void reset(const AttentionWork& work, const Scratch& scratch) {
    const std::int64_t width = work.task->values.codec->strips * kLanes;
    const int rows = work.heads * work.rows;
    for (int r = 0; r < rows; ++r) {
        work.state.maximum[r] = -kInfinity;
        scratch.slack[r] = -1.0f;
    }
    for (std::int64_t i = 0; i < rows * width; ++i) work.state.out[i] = 0.0f;
    for (int i = 0; i < rows * kLanes; ++i) scratch.carry[i] = scratch.totals[i] = 0.0f;
}

RowView view_row(const AttentionWork& work, const Scratch& scratch, int r) {
    const AttentionTask& task = *work.task;
    const std::int64_t row = work.first_row + r % work.rows, groups = task.rows / task.queries;
    const std::int64_t query = row % task.queries;
    const std::int64_t kv_head = work.first_head + r / work.rows;
    const std::int64_t head = kv_head * groups + row / task.queries;
    const int width = task.values.codec->strips * kLanes;
    const std::int64_t columns = work.batch * task.mask_strides[0] +
                                 head * task.mask_strides[1] + query * task.mask_strides[2];
    const int bytes = task.mask_kind == Mask::additive ? 4 : 1;
    const float unit = task.softcap != 0.0f ? 1.0f : kLog2E;
    return {scratch.factor[r] * unit,
            task.logit_offset ? task.logit_offset[source_row(work, r)] * unit : 0.0f,
            task.softcap,
            task.first_token[work.batch * task.queries + query],
            task.mask_kind,
            static_cast<const std::uint8_t*>(task.mask) + columns * bytes,
            task.never,
            work.state.maximum + r,
            scratch.totals + r * kLanes,
            work.state.out + static_cast<std::int64_t>(r) * width,
            width,
            scratch.carry + r * kLanes,
            scratch.slack + r};
}

inline void decode_scales(const std::uint16_t* stored, float* scales) {
    for (int t = 0; t < kPageTokens; t += kLanes) store(scales + t, load_half(stored + t));
    std::uint16_t any = 0;
    for (int t = 0; t < kPageTokens; ++t) any |= stored[t];
    if (!(any & kFlag)) return;
    for (int t = 0; t < kPageTokens; ++t)
        if (stored[t] & kFlag) scales[t] = flagged_scale(stored[t]);
}

// How one side is multiplied: from a tile, which `unpack` fills, or (null) from the page itself.
struct Method {
    const Codec& codec;
    Unpack unpack;
    Multiply direct;

    Method(const Codec& codec_, int rows)
        : codec(codec_), unpack(nullptr), direct(direct_multiplier(codec, rows)) {
        if (!direct) unpack = unpacker(codec);
    }
    // What to multiply with: the tile, filled, or the page.
    const std::uint8_t* levels(const std::uint8_t* page, std::uint8_t* tile) const {
        if (!unpack) return page;
        unpack(codec, page, tile);
        return tile;
    }
    template <bool kValues>
    Multiply multiply(int rows) const {
        return direct ? direct : multiplier<kValues>(codec.arithmetic, rows);
    }
};

// Up to kRowBlock rows on one page; the first ones fetch the next.
void attend_rows(const AttentionWork& work, const Scratch& scratch, const PageView& page,
                 const Method& key_method, const Method& value_method, int first, int rows) {
    const Codec &keys = *work.task->keys.codec, &values = *work.task->values.codec;
    const std::int64_t width = values.strips * kLanes;
    const bool fetches = first % work.rows == 0;
    Products products{page.keys,
                      scratch.queries + first * scratch.query_stride,
                      scratch.query_stride,
                      scratch.start + first,
                      scratch.scores,
                      work.state.out + first * width,
                      width,
                      nullptr,
                      page.next_keys,
                      fetches ? keys.page_bytes : 0};
    key_method.multiply<false>(rows)(keys, products);
    Weights weights{scratch.weights, scratch.fine, {}, {}, false};
    const RowView* views = scratch.rows + first;
    float* scores = reinterpret_cast<float*>(scratch.scores);
    switch (values.arithmetic) {
        case Arithmetic::bytes: weigh<Arithmetic::bytes>(page, views, rows, scores, weights); break;
        case Arithmetic::words: weigh<Arithmetic::words>(page, views, rows, scores, weights); break;
        default: weigh<Arithmetic::floats>(page, views, rows, scores, weights);
    }
    products.tile = page.values;
    products.operand_stride = kPageTokens;
    products.operands = weights.operands;
    products.step = weights.step;
    products.next = page.next_values;
    products.next_bytes = fetches ? values.page_bytes : 0;
    const Multiply multiply = value_method.multiply<true>(rows);
    multiply(values, products);
    if (!weights.any_fine) return;
    products.operands = weights.fine;
    products.step = weights.fine_step;
    products.next_bytes = 0;
    multiply(values, products);
}

// One head of one page.
struct Block {
    const PagePool* pool;
    std::int64_t slot, first_head;

    Block head(int further) const { return {pool, slot, first_head + further}; }
    const std::uint8_t* keys() const { return page_of(pool->keys, slot, first_head); }
    const std::uint8_t* values() const { return page_of(pool->values, slot, first_head); }
    const std::uint16_t* key_scales() const { return page_of(pool->key_scales, slot, first_head); }
    const std::uint16_t* value_scales() const { return page_of(pool->value_scales, slot, first_head); }
};

// The first head of the work in its page `i`.
Block block_of(const AttentionWork& work, std::int64_t i) {
    const AttentionTask& task = *work.task;
    return {task.pools + task.page_pool[i], task.slots[work.batch * task.pages + i],
            work.first_head};
}

// `next` is the block that follows.
void attend_block(const AttentionWork& work, const Scratch& scratch, const Method& key_method,
                  const Method& value_method, int head, Block block, Block next, PageView& page) {
    for (int half = 0; half < 2; ++half) {
        __builtin_prefetch(next.key_scales() + half * kPageTokens / 2);
        __builtin_prefetch(next.value_scales() + half * kPageTokens / 2);
    }
    page.next_keys = next.keys();
    page.next_values = next.values();
    page.keys = key_method.levels(block.keys(), scratch.key_tile);
    page.values = value_method.levels(block.values(), scratch.value_tile);
    decode_scales(block.key_scales(), page.key_scales);
    decode_scales(block.value_scales(), page.value_scales);
    const int end = (head + 1) * work.rows;
    for (int rows, r = head * work.rows; r < end; r += rows) {
        rows = rows_at_once(end - r);
        attend_rows(work, scratch, page, key_method, value_method, r, rows);
    }
}

void attend_pages(const AttentionWork& work) {
    const AttentionTask& task = *work.task;
    const Scratch scratch(task, work.scratch);
    const Method key_method(*task.keys.codec, work.rows), value_method(*task.values.codec, work.rows);
    reset(work, scratch);
    prepare_queries(work, scratch);
    std::int64_t first_token = INT64_MAX;
    for (int r = 0; r < work.heads * work.rows; ++r) {
        const RowView row = scratch.rows[r] = view_row(work, scratch, r);
        first_token = row.first_token < first_token ? row.first_token : first_token;
    }
    alignas(64) PageView page;
    for (std::int64_t i = work.first_page; i < work.last_page; ++i) {
        page.start = task.starts[work.batch * task.page_stride + i];
        page.length = task.lengths[work.batch * task.page_stride + i];
        if (page.length == 0 || page.start + page.length <= first_token) continue;
        const Block block = block_of(work, i);
        const Block next = block_of(work, i + 1 < work.last_page ? i + 1 : i);
        for (int head = 0; head < work.heads; ++head)
            attend_block(work, scratch, key_method, value_method, head, block.head(head),
                         head + 1 < work.heads ? block.head(head + 1) : next, page);
    }
    for (int r = 0; r < work.heads * work.rows; ++r)
        work.state.total[r] = sum(load(scratch.totals + r * kLanes));
}

constexpr AttentionKernels kAttentionKernels{attend_pages, attention_scratch_bytes};

}  // namespace
}  // namespace sixfold
