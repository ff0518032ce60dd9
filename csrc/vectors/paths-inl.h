// Tiles of vectors to paths and back (kernels/trellis/README.md).
#pragma once

#include "vectors/search-inl.h"

namespace sixfold::vectors {
namespace {

// Windows that reach the end go on with the first bits.
template <class V>
void close_rows(const PathShape& shape, float* rows) {
    const int bit = start_of(shape, shape.dim), shift = bit % 32;
    float* end = rows + bit / 32 * kLanes;
    for (int lane = 0; lane < kLanes; lane += V::kWidth) {
        using u32 = typename V::u32;
        const u32 first = bits<u32>(V::load(rows + lane));
        const u32 last = shift ? bits<u32>(V::load(end + lane)) : u32{};
        V::store(end + lane, bits<typename V::f32>(last | first << shift));
        if (shift) V::store(end + kLanes + lane, bits<typename V::f32>(first >> (32 - shift)));
    }
}

// States of coordinate t.
template <class V>
SIXFOLD_INLINE typename V::i32 window(const PathShape& shape, const float* rows, int t, int lane) {
    using u32 = typename V::u32;
    const int start = start_of(shape, t), shift = start % 32;
    const float* row = rows + start / 32 * kLanes + lane;
    u32 x = bits<u32>(V::load(row)) >> shift;
    if (shift + shape.window > 32) x |= bits<u32>(V::load(row + kLanes)) << (32 - shift);
    return bits<typename V::i32>(x & (states_of(shape) - 1));
}

// body(lookup) for lookup(states) of as many codewords as there are.
template <class V, class Body>
SIXFOLD_INLINE void with_lookup(const PathShape& shape, const float* codewords, const Body& body) {
    using i32 = typename V::i32;
    if (shape.window == 7)
        body([&](i32 s) { return V::template lookup<128>(codewords, s); });
    else if (shape.window == 8)
        body([&](i32 s) { return V::template lookup<256>(codewords, s); });
    else
        body([&](i32 s) { return V::template lookup<1024>(codewords, s); });
}

// Codewords of the closed rows of 16 vectors, each lane times its scale.
template <class V>
void expand_paths(const PathShape& shape, const float* codewords, const float* rows,
                  const float* scales, float* tile) {
    with_lookup<V>(shape, codewords, [&](auto lookup) {
        for (int t = 0; t < shape.dim; ++t)
            for (int lane = 0; lane < kLanes; lane += V::kWidth)
                V::store(tile + t * kLanes + lane,
                         lookup(window<V>(shape, rows, t, lane)) * V::load(scales + lane));
    });
}

template <class V>
void load_paths(const PathShape& shape, const CodeTile& in, float* rows) {
    load_codes<V>(shape.layout, path_planes(shape), in, rows);
    close_rows<V>(shape, rows);
}

// The paths of a tile, for the bits that leave every window; not closed.
template <class V>
void pack_paths(const PathShape& shape, const std::uint8_t* left, float* rows) {
    using u32 = typename V::u32;
    for (int lane = 0; lane < kLanes; lane += V::kWidth) {
        float* row = rows + lane;
        u32 word = {};
        for (int t = 0; t < shape.dim; ++t) {
            const int shift = start_of(shape, t) % 32, end = shift + advance_of(shape, t);
            const u32 x = V::widen_bytes(left + t * kSearched + lane);
            word |= x << shift;
            if (end < 32) continue;
            V::store(row, bits<typename V::f32>(word));
            row += kLanes;
            word = end > 32 ? x >> (32 - shift) : u32{};
        }
        if (start_of(shape, shape.dim) % 32) V::store(row, bits<typename V::f32>(word));
    }
}

// Leaves u in `tile` and what the search takes of it in `places`.
template <class V>
void place_tile(const PathEncodeTask& task, const Norms& norms, float* tile, std::int16_t* places) {
    using i32 = typename V::i32;
    const SearchGrid& grid = task.grid;
    const auto low = V::set(-grid.intervals / 2), high = V::set(grid.intervals / 2 - 1);
    const bool numbered = V::kTableCosts && is_narrow(task.shape);
    for (int d = 0; d < task.shape.dim; ++d) {
        i32 found[kLanes / V::kWidth];
        for (int i = 0; i < kLanes / V::kWidth; ++i) {
            float* x = tile + d * kLanes + i * V::kWidth;
            const auto u = V::load(x) * V::load(norms.stretch + i * V::kWidth);
            V::store(x, u);
            const i32 number =
                V::to_ints(V::max(V::min(u * grid.rate - 0.5f, high), low));
            found[i] = numbered ? number & (kIntervals - 1) : (2 * number + 1) * grid.half;
        }
        V::store_words(places + d * kSearched, found);
    }
}

// Products of u and of codewords with codewords, in the first two rows of `sums`.
template <class V>
void sum_products(const PathShape& shape, const float* codewords, const float* rows,
                  const float* tile, float* sums) {
    with_lookup<V>(shape, codewords, [&](auto lookup) {
        fold_sum<V, 2>(shape.dim, sums, [&](int t, int lane) __attribute__((always_inline)) {
            const auto u = V::load(tile + t * kLanes + lane);
            const auto q = lookup(window<V>(shape, rows, t, lane));
            return Sums<V, 2>{{u * q, q * q}};
        });
    });
}

// A path of hardly more than one window may point away from a vector, where nearest codewords never
// do; a negative scale would be read as a large one.
inline void correct_forward(ScaleKind kind, int dim, const float* sums, double* correction) {
    correct(kind, dim, sums, correction);
    for (int lane = 0; lane < kLanes; ++lane)
        if (correction[lane] < 0) correction[lane] = 0;
}

template <class V>
void encode_paths_tile(const PathEncodeTask& task, const Affine& affine, const VectorTile& in,
                       const CodeTile& out, float* scratch) {
    constexpr int kTiles = kSearched / kLanes;
    const int dim = task.shape.dim, tiles = (in.count + kLanes - 1) / kLanes;
    Norms norms[kTiles];
    float *tile = scratch, *rows = tile + kTiles * tile_floats(dim);
    float *sums = rows + row_floats(task.shape), *places = sums + tile_floats(dim + 32);
    float *left = places + dim * kSearched / 2, *work = left + dim * kSearched / 4;
    auto* numbers = reinterpret_cast<std::int16_t*>(places);
    auto* chosen = reinterpret_cast<std::uint8_t*>(left);
    if (in.count < kSearched)
        for (int i = 0; i < dim * kSearched; ++i) numbers[i] = 0;
    const Rotation& r = task.rotation;
    for (int i = 0; i < tiles; ++i) {
        float* x = tile + i * tile_floats(dim);
        Tiles<V>::load(slice_of(in, i), x, dim);
        prefetch_vectors(in, dim, kSearched + i * kLanes, kLanes);
        if (affine.mean || affine.scale) map_channels<V>(affine, x, dim);
        moderate<V>(r.rounds ? turn_of(r, 0) : Turn{}, x, dim, sums, norms[i]);
        find_norms<V>(x, dim, sums, static_cast<float>(task.stretch), norms[i]);
        if (r.rounds == 0) dense_pass<V>(r, false, x, work);
        else rotate_turned<V>(r, x, work);
        place_tile<V>(task, norms[i], x, numbers + i * kLanes);
    }
    search<V>(task, numbers, chosen, work);
    for (int i = 0; i < tiles; ++i) {
        const CodeTile part = slice_of(out, i);
        pack_paths<V>(task.shape, chosen + i * kLanes, rows);
        store_codes<V>(task.shape.layout, path_planes(task.shape), part, rows);
        close_rows<V>(task.shape, rows);
        sum_products<V>(task.shape, task.codewords.of, rows, tile + i * tile_floats(dim), sums);
        double correction[kLanes];
        correct_forward(task.scale, dim, sums, correction);
        store_scales(correction, task.unit, norms[i], part);
    }
}

template <class V>
void decode_paths_tile(const PathDecodeTask& task, const Affine& affine, const CodeTile& in,
                       const VectorTile& out, float* scratch) {
    const int dim = task.shape.dim;
    float *tile = scratch, *rows = tile + tile_floats(dim);
    alignas(64) float scales[kLanes];
    load_paths<V>(task.shape, in, rows);
    load_scales(in, scales);
    expand_paths<V>(task.shape, task.codewords.of, rows, scales, tile);
    rotate_in_place<V>(task.rotation, true, tile, rows);
    store_unmapped<V>(affine, task.shrink, tile, dim, out);
}

template <class V>
void score_paths_tile(const PathScoresTask& task, const CodeTile& in, const float* queries,
                      std::int64_t n_queries, float* out, std::int64_t stride, float* scratch) {
    const int dim = task.shape.dim;
    float *tile = scratch, *rows = tile + tile_floats(dim);
    alignas(64) float scales[kLanes], ones[kLanes];
    for (float& one : ones) one = 1;
    load_paths<V>(task.shape, in, rows);
    load_scales(in, scales);
    expand_paths<V>(task.shape, task.codewords.of, rows, ones, tile);
    score_all<V>(tile, dim, queries, n_queries, scales, in.count, out, stride);
}

constexpr TrellisKernels kTrellisKernels{encode_paths_tile<Simd>, decode_paths_tile<Simd>,
                                         score_paths_tile<Simd>};

}  // namespace
}  // namespace sixfold::vectors
