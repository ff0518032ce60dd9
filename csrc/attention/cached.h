// Attention over all a compressed layer holds (src/sixfold/kernels/attention/README.md).
//
// | tensor              | type             | shape                                  |
// | ------------------- | ---------------- | -------------------------------------- |
// | query, out          | f32, bf16 or f16 | [batch, heads, queries, dim]           |
// | mean, channel_scale | float            | [maps, kv_heads, key_dim]              |
// | map_index           | int64            | [batch], or null: sequence b has map b |
// | position, start     | int64            | [batch]                                |
// | segment.keys        | as query         | [rows, kv_heads, tokens, key_dim]      |
// | segment.slots       | int64            | [batch]: rows; null: b is in row b     |
// | segment.first, ...  | int64            | [batch]; stop may be null: no end      |
// | sink_logits         | float            | [heads], or null                       |
#pragma once

#include <vector>

#include "attention/attention.h"
#include "attention/tokens.h"
#include "vectors/vectors.h"

namespace sixfold {

struct Kernels;

// Tokens in full precision; those at positions outside start <= p < stop are hidden.
struct TokenSegment {
    // Vectors are contiguous; strides of rows, heads and tokens in bytes.
    struct Vectors {
        const char* base;
        std::int64_t row_stride, head_stride, token_stride;
    };
    Vectors keys, values;
    std::int64_t rows, tokens;
    const std::int64_t *first, *start, *stop, *slots;

    std::int64_t row_of(std::int64_t b) const { return slots ? slots[b] : b; }
    std::int64_t stop_of(std::int64_t b) const { return stop ? stop[b] : INT64_MAX; }
};

// Pages in one pool. `starts` count from `first`; for `page_stride` see AttentionTask.
struct PageSegment {
    PagePool pool;
    const std::int64_t *slots, *starts, *lengths;
    std::int64_t pages, page_stride, first;
};

struct CachedTask {
    std::int64_t batch, heads, kv_heads, queries;
    vectors::Dtype dtype;
    const char* query;
    char* out;
    std::vector<TokenSegment> tokens;
    std::vector<PageSegment> pages;
    CodecKey keys, values;
    vectors::Rotation key_rotation, value_rotation;
    const float *mean, *channel_scale;
    std::int64_t maps;
    const std::int64_t* map_index;
    const std::int64_t* position;  // of each sequence's first query
    const std::int64_t* start;
    std::int64_t sliding_window;  // 0: none
    float scaling;
    Mask mask_kind;
    const void* mask;
    std::int64_t mask_strides[3], mask_columns;
    float never, softcap;
    const float* sink_logits;

    std::int64_t rows() const { return heads / kv_heads * queries; }
};

// Throws std::invalid_argument if tables or masks lead outside of their tensors.
void check_bounds(const CachedTask& task);

void attend(const Kernels& kernels, const CachedTask& task, int threads);

}  // namespace sixfold
