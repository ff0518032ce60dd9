// Decoding of a tile (kernels/decode/README.md).
#pragma once

namespace sixfold::vectors {
namespace {

// Codewords of 16 vectors, each lane times its scale.
template <class V, int kBits, bool kPaired>
void expand_bits(const CodeShape& shape, const Codebook& book, const float* words,
                 const float* scales, float* tile) {
    const int half = shape.symbols, second = shape.dim - half;
    unpack_symbols<V, kBits>(shape, words, tile, [&](int symbol, typename V::i32 index, int lane)
                                                     __attribute__((always_inline)) {
        const auto scale = V::load(scales + lane);
        float* row = tile + symbol * kLanes + lane;
        if (kPaired && symbol < second)
            V::store(row + half * kLanes,
                     V::template lookup<1 << kBits>(book.points[1], index) * scale);
        V::store(row, V::template lookup<1 << kBits>(book.points[0], index) * scale);
    });
}

template <class V>
void expand(const CodeShape& shape, const Codebook& book, const float* words, const float* scales,
            float* tile) {
    if (shape.paired) {
        auto* expand = shape.symbol_bits == 5 ? expand_bits<V, 5, true> : expand_bits<V, 7, true>;
        return expand(shape, book, words, scales, tile);
    }
    switch (shape.symbol_bits) {
        case 1: return expand_bits<V, 1, false>(shape, book, words, scales, tile);
        case 2: return expand_bits<V, 2, false>(shape, book, words, scales, tile);
        case 3: return expand_bits<V, 3, false>(shape, book, words, scales, tile);
        case 4: return expand_bits<V, 4, false>(shape, book, words, scales, tile);
        case 5: return expand_bits<V, 5, false>(shape, book, words, scales, tile);
        case 6: return expand_bits<V, 6, false>(shape, book, words, scales, tile);
        case 7: return expand_bits<V, 7, false>(shape, book, words, scales, tile);
        default: return expand_bits<V, 8, false>(shape, book, words, scales, tile);
    }
}

// packing.decode_scale, for 16 lanes of which the last may stand for others.
inline void load_scales(const CodeTile& in, float* scales) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const std::uint16_t stored = in.scales[lane < in.count ? lane : in.count - 1];
        scales[lane] = stored & kFlag ? flagged_scale(stored)
                                      : half_to_float<f32x4>(u32x4{} + stored)[0];
    }
}

template <class V>
void unmap_channels(const Affine& affine, float shrink, float* tile, int dim) {
    for (int d = 0; d < dim; ++d)
        for (int lane = 0; lane < kLanes; lane += V::kWidth) {
            auto x = V::load(tile + d * kLanes + lane) * V::set(shrink);
            if (affine.scale) x = x / V::set(affine.scale[d]);
            if (affine.mean) x = x + V::set(affine.mean[d]);
            V::store(tile + d * kLanes + lane, x);
        }
}

// `tile` is overwritten.
template <class V>
void store_unmapped(const Affine& affine, float shrink, float* tile, int dim,
                    const VectorTile& out) {
    if (!affine.mean && !affine.scale)
        return Tiles<V>::template store<true>(out, tile, dim, shrink);
    unmap_channels<V>(affine, shrink, tile, dim);
    Tiles<V>::template store<false>(out, tile, dim, 1);
}

template <class V>
void decode_tile(const DecodeTask& task, const Affine& affine, const CodeTile& in,
                 const VectorTile& out, float* scratch) {
    const int dim = task.shape.dim;
    float *tile = scratch, *words = tile + tile_floats(dim);
    alignas(64) float scales[kLanes];
    load_codes<V>(task.shape.layout, task.shape.planes, in, words);
    load_scales(in, scales);
    expand<V>(task.shape, task.book, words, scales, tile);
    rotate_in_place<V>(task.rotation, true, tile, words);
    store_unmapped<V>(affine, task.shrink, tile, dim, out);
}

}  // namespace
}  // namespace sixfold::vectors
