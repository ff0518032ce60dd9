// Primitives on native registers of float32, for any compiler with vector extensions.
//
// Included by lanes_<isa>.h only, which replaces what its instructions do better. All of it has
// internal linkage and calls no library: the linker must not pick one ISA's copy for another.
#pragma once

#include "common/scale.h"
#include "vectors/vectors.h"

namespace sixfold::vectors {
namespace {

#define SIXFOLD_INLINE inline __attribute__((always_inline))

using f32x4 = float __attribute__((vector_size(16)));
using u32x4 = std::uint32_t __attribute__((vector_size(16)));
using u16x4 = std::uint16_t __attribute__((vector_size(8)));
using u8x16 = std::uint8_t __attribute__((vector_size(16)));

template <class T>
SIXFOLD_INLINE T load_unaligned(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

template <class T>
SIXFOLD_INLINE void store_unaligned(void* p, T value) {
    __builtin_memcpy(p, &value, sizeof value);
}

template <class T>
SIXFOLD_INLINE T load_aligned(const void* p) {
    return load_unaligned<T>(__builtin_assume_aligned(p, sizeof(T)));
}

template <class T>
SIXFOLD_INLINE void store_aligned(void* p, T value) {
    store_unaligned(__builtin_assume_aligned(p, sizeof(T)), value);
}

template <class To, class From>
SIXFOLD_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

template <class Tile>
SIXFOLD_INLINE auto* lane_of(const Tile& tile, int i) {
    return tile.base + tile.stride * (i < tile.count ? i : tile.count - 1);
}

// IEEE halves by integer operations; U is a vector of uint32, F its float32 twin.

template <class F, class U>
SIXFOLD_INLINE F half_to_float(U half) {
    const U magnitude = (half & 0x7fff) << 13;
    const U value = bits<U>(bits<F>(magnitude) * 0x1p112f);
    const U special = (U)(magnitude >= 0x0f800000) & 0x7f800000;
    return bits<F>(value | special | (half & 0x8000) << 16);
}

template <class F, class U>
SIXFOLD_INLINE U float_to_half(F x) {
    const U all = bits<U>(x), magnitude = all & 0x7fffffff;
    const U normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    // Adding 1/2 aligns the last bit with that of the smallest half, and rounds to even there.
    const U small = bits<U>(bits<F>(magnitude) + 0.5f) - 0x3f000000;
    const U large = magnitude > 0x7f800000 ? magnitude * 0 + 0x7e00 : magnitude * 0 + 0x7c00;
    const U finite = magnitude < 0x38800000 ? small : normal;
    return (magnitude < 0x47800000 ? finite : large) | (all >> 16 & 0x8000);
}

template <class F, class U>
SIXFOLD_INLINE U float_to_bfloat(F x) {
    const U all = bits<U>(x);
    const U rounded = (all + 0x7fff + (all >> 16 & 1)) >> 16;
    return (all & 0x7fffffff) > 0x7f800000 ? all * 0 + 0x7fc0 : rounded;
}

SIXFOLD_INLINE f32x4 widen(const char* p, Dtype dtype) {
    if (dtype == Dtype::f32) return load_unaligned<f32x4>(p);
    const u32x4 x = __builtin_convertvector(load_unaligned<u16x4>(p), u32x4);
    return dtype == Dtype::bf16 ? bits<f32x4>(x << 16) : half_to_float<f32x4>(x);
}

// What is finite stays so: decoding may carry a number past the largest half it came from.
template <class F, class U>
SIXFOLD_INLINE F within_half(F x) {
    const U all = bits<U>(x), magnitude = all & 0x7fffffff;
    const U beyond = (U)(magnitude > 0x477fe000) & (U)(magnitude < 0x7f800000);
    return bits<F>((beyond & (0x477fe000 | (all & 0x80000000))) | (~beyond & all));
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

// What every ISA has. Registers are memory only by way of load and store, which may alias.
template <class F32, class I32, class U32, class F64>
struct LanesBase {
    using f32 = F32;
    using i32 = I32;
    using u32 = U32;
    using f64 = F64;
    static constexpr int kWidth = sizeof(f32) / 4;
    static constexpr int kRadixBits = 3;  // of butterflies done in registers
    static constexpr int kQueries = 2;    // of scores done at once
    static constexpr int kCountedBits = 1;  // of codebooks where all boundaries are compared
    static constexpr bool kGrid = false;    // has lookups fast enough for Codebook::thresholds

    static SIXFOLD_INLINE f32 load(const float* p) { return load_aligned<f32>(p); }
    static SIXFOLD_INLINE void store(float* p, f32 x) { store_aligned(p, x); }
    static SIXFOLD_INLINE f32 set(float x) { return x - f32{}; }
    static SIXFOLD_INLINE f32 abs(f32 x) { return bits<f32>(bits<i32>(x) & 0x7fffffff); }
    static SIXFOLD_INLINE i32 max(i32 a, i32 b) { return a > b ? a : b; }
    static SIXFOLD_INLINE f32 min(f32 a, f32 b) { return a < b ? a : b; }
    static SIXFOLD_INLINE f32 sqrt(f32 x) {
        for (int lane = 0; lane < kWidth; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
        return x;
    }
    // a - b, on whatever unit idles while another adds.
    static SIXFOLD_INLINE f32 subtract(f32 a, f32 b) { return a - b; }
    // a + b·c for b = +-1, or where rounding is free: fused or not.
    static SIXFOLD_INLINE f32 multiply_add(f32 a, f32 b, f32 c) { return a + b * c; }
    // index + (a > b)
    static SIXFOLD_INLINE i32 count_greater(i32 index, f32 a, f32 b) { return index - (a > b); }

    // table[index] for index < kEntries, a power of two; tables have at least 16 entries.
    template <int kEntries>
    static SIXFOLD_INLINE f32 lookup(const float* table, i32 index) {
        f32 found;
        for (int lane = 0; lane < kWidth; ++lane) found[lane] = table[index[lane]];
        return found;
    }

    // Reads 16 vectors into a tile. Whole blocks of four coordinates of four lanes, then the rest.
    static SIXFOLD_INLINE void load_tile(const VectorTile& in, float* tile, int dim) {
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
    static SIXFOLD_INLINE void store_tile(const VectorTile& out, const float* tile, int dim,
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
