// Vectors to paths through a trellis and back (src/sixfold/kernels/trellis/README.md).
//
// | name      | shape                        | what                                                |
// | --------- | ---------------------------- | --------------------------------------------------- |
// | codewords | f32 [states]                 | what a state stands for                             |
// | words     | i16 [states, 2]              | the same in the whole numbers of the search, twice  |
// | rows      | u32 [path words, 16]         | paths of 16 vectors                                 |
// | places    | i16 [dim, 64]                | coordinates of 64 vectors, in those whole numbers   |
// | left      | u8 [dim, 64]                 | bits that leave the windows of 64 vectors           |
// | kept      | u8 or u16 [groups, lanes]    | least sums by what is left of a window              |
// | decisions | u8 or u16 [steps, decision rows, lanes] | which state of each group had it             |
#pragma once

#include "vectors/vectors.h"

namespace sixfold::vectors {

// Vectors that are searched side by side: those of a page of a head.
constexpr int kSearched = kPageTokens;
constexpr int kIntervals = 128;
constexpr int kMaxStates = 1024;

// Bits that make a state, and twice the bits of a coordinate.
struct PathShape {
    int dim, window, half_bits;
    Layout layout = Layout::rows;
};

static constexpr int states_of(const PathShape& s) { return 1 << s.window; }
// First bit of the window of coordinate t, and the bits of a vector for t = dim.
static constexpr int start_of(const PathShape& s, int t) { return t * s.half_bits / 2; }
// Bits that leave the window behind coordinate t.
static constexpr int advance_of(const PathShape& s, int t) {
    return start_of(s, t + 1) - start_of(s, t);
}
static constexpr int path_words(const PathShape& s) { return (start_of(s, s.dim) + 31) / 32; }
static constexpr Planes path_planes(const PathShape& s) { return planes_of(4 * path_words(s), 8); }

// Codewords of states, where registers can load them from.
struct Codewords {
    Codewords(const float* table, const PathShape& shape);

    alignas(64) float of[kMaxStates] = {};
};

// The whole numbers of the search, see kernels/trellis/grid.py; sums have 8 bits below 3 bits a
// coordinate, else 16.
struct SearchGrid {
    const std::int16_t* words;  // [states, 2], each twice
    int half;     // of the width of an interval
    float rate;   // intervals a standard deviation
    int intervals;
    int margin;   // coordinates on either side of the seam that choose it
};

static constexpr bool is_narrow(const PathShape& s) { return s.half_bits < 6; }

struct PathEncodeTask {
    Rotation rotation;
    PathShape shape;
    Codewords codewords;
    SearchGrid grid;
    ScaleKind scale;
    double stretch, unit;  // see EncodeTask
};

struct PathDecodeTask {
    Rotation rotation;
    PathShape shape;
    Codewords codewords;
    float shrink;  // see DecodeTask
};

struct PathScoresTask {
    PathShape shape;
    Codewords codewords;
};

struct TrellisKernels {
    // Up to kSearched vectors; the others on tiles of 16.
    void (*encode)(const PathEncodeTask&, const Affine&, const VectorTile& in, const CodeTile& out,
                   float* scratch);
    void (*decode)(const PathDecodeTask&, const Affine&, const CodeTile& in, const VectorTile& out,
                   float* scratch);
    void (*scores)(const PathScoresTask&, const CodeTile& in, const float* queries,
                   std::int64_t n_queries, float* out, std::int64_t stride, float* scratch);
};

// Registers of decisions a step: one has those of four groups, or of two where three bits leave in
// turn with two.
static constexpr int decision_rows(const PathShape& s) {
    return states_of(s) >> s.half_bits / 2 >> 2;
}

// Pieces of a search's scratch, in floats.
static constexpr std::int64_t decision_floats(const PathShape& s, const SearchGrid& grid) {
    const std::int64_t steps = s.dim > 2 * grid.margin ? s.dim : 2 * grid.margin;
    return steps * decision_rows(s) * (kSearched / 4);
}
static constexpr std::int64_t kept_floats(const PathShape& s) {
    return (states_of(s) >> s.half_bits / 2) * (kSearched / 4);
}
static constexpr std::int64_t table_floats(const PathShape& s) {
    return is_narrow(s) ? states_of(s) / 2 * (kIntervals / 4) : 0;
}
// Rows, and what windows that reach the end go on with.
static constexpr std::int64_t row_floats(const PathShape& s) {
    return tile_floats(path_words(s) + 2);
}

void encode_paths(const TrellisKernels& kernels, const PathEncodeTask& task, const VectorArray& in,
                  const Rows& out, int threads);
void decode_paths(const TrellisKernels& kernels, const PathDecodeTask& task, const Rows& in,
                  const VectorArray& out, int threads);
// See `encode_pages`.
void encode_path_pages(const TrellisKernels& kernels, const PathEncodeTask& task,
                       const Affine& maps, const PagedVectors& in, const Pages& out, int threads);
void decode_path_pages(const TrellisKernels& kernels, const PathDecodeTask& task,
                       const Affine& maps, const Pages& in, const PagedVectors& out, int threads);
// See `scores`.
void score_paths(const TrellisKernels& kernels, const PathScoresTask& task, const Rows& in,
                 std::int64_t batch, std::int64_t n, const float* queries, std::int64_t n_queries,
                 float* out, int threads);

}  // namespace sixfold::vectors

namespace sixfold {

using vectors::TrellisKernels;

}  // namespace sixfold
