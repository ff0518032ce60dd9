// Vectors in memory to tiles and back. An instruction set that does it better specialises Tiles
// (tiles_<isa>.h).
#pragma once

#include "isa/registers.h"
#include "vectors/vectors.h"

namespace sixfold::vectors {
namespace {

template <class Tile>
SIXFOLD_INLINE auto* lane_of(const Tile& tile, int i) {
    return tile.base + tile.stride * (i < tile.count ? i : tile.count - 1);
}

SIXFOLD_INLINE f32x4 widen(const char* p, Dtype dtype) {
    if (dtype == Dtype::f32) return load_unaligned<f32x4>(p);
    const u32x4 x = __builtin_convertvector(load_unaligned<u16x4>(p), u32x4);
    return dtype == Dtype::bf16 ? bits<f32x4>(x << 16) : half_to_float<f32x4>(x);
}

SIXFOLD_INLINE void narrow(char* p, f32x4 x, Dtype dtype) {
    if (dtype == Dtype::f32) return store_unaligned(p, x);
    const u32x4 y =
        dtype == Dtype::bf16 ? float_to_bfloat<f32x4, u32x4>(x)
                             : float_to_half<f32x4, u32x4>(within_half<f32x4, u32x4>(x));
    store_unaligned(p, __builtin_convertvector(y, u16x4));
}

SIXFOLD_INLINE void transpose(f32x4 (&r)[4]) {
    const f32x4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
    const f32x4 b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const f32x4 c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    const f32x4 d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

template <class V>
struct Tiles {
    // Reads 16 vectors into a tile. Whole blocks of four coordinates of four lanes, then the rest.
    static SIXFOLD_INLINE void load(const VectorTile& in, float* tile, int dim) {
        const int size = in.dtype == Dtype::f32 ? 4 : 2;
        for (int lane = 0; lane < kLanes; lane += 4) {
            int d = 0;
            for (; d + 4 <= dim; d += 4) {
                f32x4 r[4];
                for (int i = 0; i < 4; ++i)
                    r[i] = widen(lane_of(in, lane + i) + d * size, in.dtype);
                transpose(r);
                for (int i = 0; i < 4; ++i)
                    store_aligned(tile + (d + i) * kLanes + lane, r[i]);
            }
            for (int i = 0; i < 4 && d < dim; ++i) {
                alignas(8) char rest[16] = {};
                __builtin_memcpy(rest, lane_of(in, lane + i) + d * size, (dim - d) * size);
                const f32x4 r = widen(rest, in.dtype);
                for (int j = 0; j < dim - d; ++j) tile[(d + j) * kLanes + lane + i] = r[j];
            }
        }
    }

    // Writes a tile, times `factor`, as 16 vectors. !kScaled: bit for bit, whatever it is.
    template <bool kScaled>
    static SIXFOLD_INLINE void store(const VectorTile& out, const float* tile, int dim,
                                     float factor) {
        const int size = out.dtype == Dtype::f32 ? 4 : 2;
        for (int lane = 0; lane < kLanes; lane += 4) {
            int d = 0;
            for (; d + 4 <= dim; d += 4) {
                f32x4 r[4];
                for (int i = 0; i < 4; ++i) {
                    r[i] = load_aligned<f32x4>(tile + (d + i) * kLanes + lane);
                    if constexpr (kScaled) r[i] *= factor;
                }
                transpose(r);
                for (int i = 0; i < 4; ++i)
                    narrow(lane_of(out, lane + i) + d * size, r[i], out.dtype);
            }
            for (int i = 0; i < 4 && d < dim; ++i) {
                f32x4 r = {};
                for (int j = 0; j < dim - d; ++j)
                    r[j] = tile[(d + j) * kLanes + lane + i];
                if constexpr (kScaled) r *= factor;
                char rest[16];
                narrow(rest, r, out.dtype);
                __builtin_memcpy(lane_of(out, lane + i) + d * size, rest, (dim - d) * size);
            }
        }
    }
};

}  // namespace
}  // namespace sixfold::vectors
