// Vectors to codes and back: rotate, encode, decode, scores.
//
// Sixteen vectors are worked on side by side, one a lane, so that every operation of the rules
// (src/sixfold/kernels/*/README.md) is a vertical one and no ISA changes the order of a sum.
//
// | name     | shape                       | what                                                |
// | -------- | --------------------------- | --------------------------------------------------- |
// | tile     | f32 [dim, 16]               | coordinates of 16 vectors                           |
// | symbols  | i32 [symbols, 16]           | codebook indices of 16 vectors                      |
// | words    | u32 [row_bytes / 4, 16]     | codes of 16 vectors, planes one after another       |
// | turns    | f32 [rounds, 2, dim / 2]    | cosines and sines of the plane rotations            |
// | factor   | f32 [order, order]          | +-1 with rounds; orthonormal, order = dim, without  |
// | points   | f32 [levels] or [levels, 2] | codebook; pairs where a symbol is two coordinates   |
// | pages    | u8 [slots, heads, 64 rows]  | codes of 64 tokens (docs/format.md, section 3)      |
// | scales   | u16 [slots, heads, 64]      | float16 bits (docs/format.md, section 4)            |
#pragma once

#include <cstdint>

#include "common/paged.h"
#include "common/planes.h"

namespace sixfold::vectors {

// Internal linkage and no member functions below, here and in what the kernels include: the linker
// must not pick one instruction set's copy of a function for another.
constexpr int kMaxLevels = 256;
constexpr int kMaxCells = 128;

// A tile in scratch: whole blocks of 32 rows, which loads and stores may touch.
static constexpr std::int64_t tile_floats(std::int64_t rows) {
    return (rows + 31) / 32 * 32 * kLanes;
}

// Where Codebook::splits has the 2^level boundaries of a level: each starts a 64-byte register.
static constexpr int splits_at(int level) { return level < 4 ? 16 * level : 48 + (1 << level); }

// Cells of the grid of a codebook of `bits`; more than there are registers for above 6.
static constexpr int grid_cells(int bits) { return bits <= 4 ? 32 : bits == 5 ? 64 : 128; }

enum class Dtype : int { f32, bf16, f16 };
enum class Layout : int { rows, key, value };
enum class ScaleKind : int { norm, optimal, unbiased };

struct Rotation {
    int dim = 0, order = 0, rounds = 0;
    const float* turns = nullptr;
    const float* factor = nullptr;
};

// Up to 16 vectors in memory; lanes from `count` on stand for the last vector once more, so that
// no kernel has a case for a tile that is not full.
struct VectorTile {
    char* base;
    std::int64_t stride;  // bytes
    int count;
    Dtype dtype;
};

// Up to 16 rows of codes, or the tokens 16·group to 16·group + 15 of a page.
struct CodeTile {
    std::uint8_t* base;
    std::int64_t stride;  // bytes between rows; pages have none
    int count;
    int group;
    std::uint16_t* scales;  // of the first lane; contiguous
};

// Tile i of more than one; pages go on by groups.
static constexpr VectorTile slice_of(const VectorTile& tiles, int i) {
    const int count = tiles.count - i * kLanes;
    return {tiles.base + i * kLanes * tiles.stride, tiles.stride, count < kLanes ? count : kLanes,
            tiles.dtype};
}
static constexpr CodeTile slice_of(const CodeTile& tiles, int i) {
    const int count = tiles.count - i * kLanes;
    return {tiles.base + i * kLanes * tiles.stride, tiles.stride, count < kLanes ? count : kLanes,
            tiles.group + i, tiles.scales + i * kLanes};
}

struct CodeShape {
    CodeShape(int dim, int symbol_bits, bool paired, Layout layout);

    int dim, symbol_bits;
    bool paired;
    Layout layout;
    int symbols;  // a vector
    Planes planes;
    int symbol_rows;  // `symbols`, rounded up to whole words of every plane
};

// A codebook in the forms that kernels look things up in.
struct Codebook {
    Codebook(const float* points, const CodeShape& shape);

    // Integer bits: [0] is the codebook. Pairs: first and second coordinates.
    alignas(64) float points[2][kMaxLevels] = {};
    // Boundaries by the comparisons that lead to them, level by level of a bisection.
    alignas(64) float splits[splits_at(8)] = {};
    // Boundaries by cell of a uniform grid that has at most one in each; `below` counts those of
    // the cells before. Cell: round(min(|u|, reach)·cells_a_unit) with the sign of u, from the
    // bits of a sum with `centre`.
    alignas(64) float thresholds[kMaxCells];
    alignas(64) std::uint8_t below[kMaxCells];
    float reach = 0, cells_a_unit = 0, centre = 0;
    bool uniform = false;  // there is such a grid

  private:
    void fill_splits(const float* boundaries, int bits);
    void fill_grid(const float* boundaries, int count, int cells);
};

struct EncodeTask {
    Rotation rotation;
    CodeShape shape;
    Codebook book;
    ScaleKind scale;
    double stretch;  // dim^(1/2 - rounds/2): what turns norm'/y into u
    double unit;     // dim^(-1/2)
};

struct DecodeTask {
    Rotation rotation;
    CodeShape shape;
    Codebook book;
    float shrink;  // dim^(-rounds/2): normalises the rotation
};

// (x - mean)·scale a channel; either may be null.
struct Affine {
    const float* mean = nullptr;
    const float* scale = nullptr;
};

struct ScoresTask {
    CodeShape shape;
    Codebook book;
};

struct VectorKernels {
    // out = R·in or its inverse. `shrink`: see DecodeTask.
    void (*rotate)(const Rotation&, bool inverse, float shrink, const VectorTile& in,
                   const VectorTile& out, float* scratch);
    void (*encode)(const EncodeTask&, const Affine&, const VectorTile& in, const CodeTile& out,
                   float* scratch);
    void (*decode)(const DecodeTask&, const Affine&, const CodeTile& in, const VectorTile& out,
                   float* scratch);
    // out[query, lane] for `queries` f32 [n_queries, dim]; rows of `out` are `stride` floats apart.
    void (*scores)(const ScoresTask&, const CodeTile& in, const float* queries,
                   std::int64_t n_queries, float* out, std::int64_t stride, float* scratch);
};

// What the drivers work on. All strides are in bytes.

struct VectorArray {
    char* base;
    std::int64_t count, stride;
    Dtype dtype;
};

// [batch, heads, pages·64, dim], the last axis contiguous.
struct PagedVectors {
    char* base;
    std::int64_t batch_stride, head_stride, token_stride;
    Dtype dtype;
};

struct Pages {
    PoolTensor<std::uint8_t> codes;
    PoolTensor<std::uint16_t> scales;
    const std::int64_t* slots;  // [batch, pages], see check_slots
    std::int64_t batch, pages, heads;
};

struct Rows {
    std::uint8_t* codes;
    std::uint16_t* scales;
};

void rotate(const VectorKernels& kernels, const Rotation& rotation, bool inverse, float shrink,
            const VectorArray& in, const VectorArray& out, int threads);
void encode(const VectorKernels& kernels, const EncodeTask& task, const VectorArray& in,
            const Rows& out, int threads);
void decode(const VectorKernels& kernels, const DecodeTask& task, const Rows& in,
            const VectorArray& out, int threads);
// The maps' rows are [batch, heads, dim].
void encode_pages(const VectorKernels& kernels, const EncodeTask& task, const Affine& maps,
                  const PagedVectors& in, const Pages& out, int threads);
void decode_pages(const VectorKernels& kernels, const DecodeTask& task, const Affine& maps,
                  const Pages& in, const PagedVectors& out, int threads);
// out[batch, query, row] for queries [batch, n_queries, dim] and rows [batch, n, row_bytes].
void scores(const VectorKernels& kernels, const ScoresTask& task, const Rows& in,
            std::int64_t batch, std::int64_t n, const float* queries, std::int64_t n_queries,
            float* out, int threads);

// Throws std::invalid_argument if one of the pages' slots is not in [0, count).
void check_slots(const Pages& pages, std::int64_t count);

// Floats that VectorKernels::rotate needs, aligned to 64 bytes.
std::int64_t rotate_scratch(const Rotation& rotation);

}  // namespace sixfold::vectors

namespace sixfold {

using vectors::VectorKernels;

}  // namespace sixfold
