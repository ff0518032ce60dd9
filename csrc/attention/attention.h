// Attention on pages of codes.
//
// | tensor             | type           | shape                                                 |
// | ------------------ | -------------- | ----------------------------------------------------- |
// | query              | float          | [batch, kv_heads, rows, key_dim]                      |
// | pool.keys          | uint8          | [slots, kv_heads, page_bytes] (docs/format.md, 3)     |
// | pool.key_scales    | float16        | [slots, kv_heads, 64] (docs/format.md, 4)             |
// | page_pool          | int32          | [pages]: which of the pools a page is in              |
// | slots              | int64          | [batch, pages]: its slot there                        |
// | starts, lengths    | int64          | [batch or 1, pages], see `page_stride`                |
// | first_token        | int64          | [batch, queries]                                      |
// | logit_offset       | float          | [batch, kv_heads, rows], or null                      |
// | mask               | bool or float  | [batch, heads, queries, columns] by strides, or null  |
// | out, lse           | float          | [batch, kv_heads, rows, value_dim], the same less dim |
//
// rows = heads / kv_heads * queries: all query vectors that share a KV head, head by head.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/paged.h"
#include "common/planes.h"

namespace sixfold {

// Largest 16-bit levels; their product with the sum of all operands stays below 2^31.
constexpr int kWordKey = 8191, kWordValue = 16383;
constexpr int kWordSum[] = {(1 << 18) - 1, (1 << 17) - 1};  // keys, values
constexpr int kWordOperand = 32767;

// What is multiplied: 8-bit levels, 16-bit levels, or the centroids themselves.
enum class Arithmetic { bytes, words, floats };

// A unit is 64 bytes of symbols: one word (4 symbols) of 16 tokens in a page of keys, 4 words of 4
// tokens in a page of values. Where its words lie in one plane, relative to the block, and how far
// to rotate a lane to the right until the plane's bits are at their place in the index; those of the
// first plane, whose place is the lowest, may be shifted.
struct Unit {
    std::int32_t offset[4];
    std::int32_t contiguous;
    std::int32_t rotation[kLanes];
};

// How a page of one side (keys or values) becomes a *tile* of operands: levels, 16 lanes a strip.
//
// | side   | page                           | tile                            | lanes            |
// | ------ | ------------------------------ | ------------------------------- | ---------------- |
// | keys   | 4 blocks, `units` a block      | [4 strips][steps][64 bytes]     | 16 tokens        |
// | values | 16 groups, `units` a group     | [steps][strips][64 bytes]       | 16 symbols       |
//
// `axes` is 2 where a symbol stands for a pair: the second coordinates are further units.
//
// A trellis code (docs/format.md, 2b) has a state of 7 bits a coordinate in place of a symbol: windows
// of a row's one plane of bytes, which windows-inl.h reads. Tiles are the same.
struct Codec {
    int dim, symbol_bits, axes;
    int half_bits;  // of a trellis: twice the bits a coordinate; 0: a codebook
    bool values;
    Arithmetic arithmetic;
    int parts;  // 64-byte pieces of the tile a unit gives: 1 (bytes), 2 (words) or 4 (floats)
    Planes planes;
    int blocks, units;
    int strips, steps;
    std::int64_t strip_stride, step_stride;                // bytes of the tile
    std::int64_t block_stride, unit_stride, part_stride;   // likewise
    std::int64_t plane_offset[3], plane_stride[3];         // bytes of the page: start, a block
    std::int64_t page_bytes, tile_bytes;
    float scale;        // centroid ~ scale * level
    const Unit* table;  // [units, planes.count], of a codebook
    // By index (a symbol's planes, the first in the lowest bits), over and over.
    alignas(64) std::uint8_t low[2][256];   // levels: all of 8 bits, or the low byte
    alignas(64) std::uint8_t high[2][256];  // high byte of 16-bit levels
    float exact[2][256];                    // centroids
};

// What a codec follows from.
struct CodecKey {
    int dim, symbol_bits, axes, half_bits;
    bool values, exact;
    const float* centroids;  // [1 << symbol_bits, axes]
};

// Memory of pages. A cache that grew has several.
struct PagePool {
    PoolTensor<const std::uint8_t> keys;
    PoolTensor<const std::uint16_t> key_scales;
    PoolTensor<const std::uint8_t> values;
    PoolTensor<const std::uint16_t> value_scales;
    std::int64_t slots;
};

struct PageSide {
    CodecKey key;
    const Codec* codec;  // of `key`; `attend` finds it
};

enum class Mask { none, boolean, additive };

struct AttentionTask {
    std::int64_t batch, kv_heads, rows, queries, pages;
    const float* query;
    PageSide keys, values;
    const PagePool* pools;
    const std::int32_t* page_pool;
    const std::int64_t *slots, *starts, *lengths, *first_token;
    std::int64_t page_stride;  // of starts and lengths, a sequence: `pages`, or 0 if all share them
    const float* logit_offset;
    Mask mask_kind;
    const void* mask;
    std::int64_t mask_strides[3], mask_columns;  // strides in elements; columns are contiguous
    float never;    // additive masks: what is as low as this hides a token
    float softcap;  // 0: none
    float *out, *lse;
};

// Rows that one thread works on together: their online softmax over a range of pages.
struct AttentionState {
    float* maximum;  // [heads * rows], of the logits in units of ln 2
    float* total;    // [heads * rows], of 2^(logit - maximum)
    float* out;      // [heads * rows, strips * 16], in the order of the value tile
};

// Some rows of some KV heads, over a range of pages. Heads of a page follow one another in memory:
// the more of them in turn, the better hardware fetches ahead.
struct AttentionWork {
    const AttentionTask* task;
    std::int64_t batch, first_head, first_row, first_page, last_page;
    int heads, rows;
    AttentionState state;
    std::byte* scratch;  // of scratch_bytes, aligned to 64
};

constexpr int kMaxRows = 64;  // heads * rows, at most

struct AttentionKernels {
    // Runs the online softmax of `work.rows` (at most kMaxRows) rows over its pages.
    void (*attend)(const AttentionWork& work);
    std::int64_t (*scratch_bytes)(const AttentionTask& task);
};

// Throws std::invalid_argument if slots, lengths or mask columns lie outside of their tensors.
void check_bounds(const AttentionTask& task);

// Attends on at most `threads` threads with the kernels of one instruction set. The result does not
// depend on `threads`. Returns false where the interrupt check stopped it (pool.h).
bool attend(const AttentionKernels& kernels, AttentionTask task, int threads);

}  // namespace sixfold
