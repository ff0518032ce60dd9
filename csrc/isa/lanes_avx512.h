// Sixteen lanes: a row of a tile is a register, and a table of 32 numbers is two.
#pragma once

// GCC takes the undefined operands of its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "isa/lanes.h"

namespace sixfold::vectors {
namespace {

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = std::int32_t __attribute__((vector_size(64)));
using u32x16 = std::uint32_t __attribute__((vector_size(64)));
using f64x8 = double __attribute__((vector_size(64)));

// r[i] lane j becomes r[j] lane i.
SIXFOLD_INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

struct Lanes : LanesBase<f32x16, i32x16, u32x16, f64x8> {
    static constexpr int kRadixBits = 4;
    static constexpr int kQueries = 4;
    static constexpr bool kGrid = true;

    static SIXFOLD_INLINE i32 max(i32 a, i32 b) {
        return (i32)_mm512_max_epi32((__m512i)a, (__m512i)b);
    }

    static SIXFOLD_INLINE f32 min(f32 a, f32 b) { return _mm512_min_ps(a, b); }

    static SIXFOLD_INLINE f32 sqrt(f32 x) { return _mm512_sqrt_ps(x); }

    static SIXFOLD_INLINE f32 subtract(f32 a, f32 b) {
        __m512 one = _mm512_set1_ps(1);
        asm("" : "+v"(one));  // or the compiler makes it a subtraction again
        return _mm512_fnmadd_ps(b, one, a);
    }

    static SIXFOLD_INLINE f32 multiply_add(f32 a, f32 b, f32 c) {
        return _mm512_fmadd_ps(b, c, a);
    }

    static SIXFOLD_INLINE i32 count_greater(i32 index, f32 a, f32 b) {
        return (i32)_mm512_mask_add_epi32((__m512i)index, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ),
                                          (__m512i)index, _mm512_set1_epi32(1));
    }

    // Looks at the low bits of `index` only.
    template <int kEntries>
    static SIXFOLD_INLINE f32 lookup(const float* table, i32 index) {
        const __m512i where = (__m512i)index;
        if constexpr (kEntries <= 16) {
            return _mm512_permutexvar_ps(where, load(table));
        } else if constexpr (kEntries == 32) {
            return _mm512_permutex2var_ps(load(table), where, load(table + 16));
        } else {
            constexpr int kHalf = kEntries / 2;
            const __mmask16 upper = _mm512_test_epi32_mask(where, _mm512_set1_epi32(kHalf));
            return _mm512_mask_blend_ps(upper, lookup<kHalf>(table, index),
                                        lookup<kHalf>(table + kHalf, index));
        }
    }

    template <int kEntries>
    static SIXFOLD_INLINE i32 lookup(const std::uint8_t* table, i32 index) {
        static_assert(kEntries <= 128);
        const __mmask64 low_bytes = 0x1111111111111111;
        const __m512i low = _mm512_load_si512(table);
        if constexpr (kEntries <= 64)
            return (i32)_mm512_maskz_permutexvar_epi8(low_bytes, (__m512i)index, low);
        const __m512i high = _mm512_load_si512(table + 64);
        return (i32)_mm512_maskz_permutex2var_epi8(low_bytes, low, (__m512i)index, high);
    }

    // Cell of the grid that u is in, in the low bits; monotone in u. See Codebook::find_grid.
    static SIXFOLD_INLINE i32 grid_cell(f32 u, const Codebook& book) {
        const __m512 clamped = _mm512_range_ps(u, set(book.reach), 0x2);
        return bits<i32>(
            _mm512_fmadd_ps(clamped, set(book.cells_a_unit), set(book.centre)));
    }

    static SIXFOLD_INLINE void load_tile(const VectorTile& in, float* tile, int dim) {
        in.dtype == Dtype::f32 ? load_words(in, tile, dim) : load_halves(in, tile, dim);
    }

    template <bool kScaled>
    static SIXFOLD_INLINE void store_tile(const VectorTile& out, const float* tile, int dim,
                                          float factor) {
        out.dtype == Dtype::f32 ? store_words<kScaled>(out, tile, dim, set(factor))
                                : store_halves<kScaled>(out, tile, dim, set(factor));
    }

  private:
    static SIXFOLD_INLINE __mmask16 first(int n) {
        return static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1);
    }

    static SIXFOLD_INLINE void load_words(const VectorTile& in, float* tile, int dim) {
        for (int d = 0; d < dim; d += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i)
                r[i] = _mm512_maskz_loadu_epi32(first(dim - d), lane_of(in, i) + d * 4);
            transpose(r);
            for (int i = 0; i < 16 && d + i < dim; ++i) store(tile + (d + i) * 16, bits<f32>(r[i]));
        }
    }

    // Two coordinates a word: a transposition of words moves both.
    static SIXFOLD_INLINE void load_halves(const VectorTile& in, float* tile, int dim) {
        const bool half = in.dtype == Dtype::f16;
        for (int d = 0; d < dim; d += 32) {
            const __mmask32 valid = dim - d >= 32 ? ~0u : (1u << (dim - d)) - 1;
            __m512i r[16];
            for (int i = 0; i < 16; ++i)
                r[i] = _mm512_maskz_loadu_epi16(valid, lane_of(in, i) + d * 2);
            transpose(r);
            for (int i = 0; i < 16 && d + 2 * i < dim; ++i) {
                float* rows = tile + (d + 2 * i) * 16;
                const __m512i upper = _mm512_and_si512(r[i], _mm512_set1_epi32(-0x10000));
                store(rows, half ? from_half(r[i]) : bits<f32>(_mm512_slli_epi32(r[i], 16)));
                store(rows + 16, half ? from_half(_mm512_srli_epi32(r[i], 16)) : bits<f32>(upper));
            }
        }
    }

    static SIXFOLD_INLINE f32 from_half(__m512i x) {
        return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
    }

    template <bool kScaled>
    static SIXFOLD_INLINE f32 scaled(const float* row, f32 factor) {
        return kScaled ? load(row) * factor : load(row);
    }

    template <bool kScaled>
    static SIXFOLD_INLINE void store_words(const VectorTile& out, const float* tile, int dim,
                                           f32 factor) {
        for (int d = 0; d < dim; d += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i)
                r[i] = bits<__m512i>(scaled<kScaled>(tile + (d + i) * 16, factor));
            transpose(r);
            for (int i = 0; i < 16; ++i)
                _mm512_mask_storeu_epi32(lane_of(out, i) + d * 4, first(dim - d), r[i]);
        }
    }

    template <bool kScaled>
    static SIXFOLD_INLINE void store_halves(const VectorTile& out, const float* tile, int dim,
                                            f32 factor) {
        const bool half = out.dtype == Dtype::f16;
        for (int d = 0; d < dim; d += 32) {
            const __mmask32 valid = dim - d >= 32 ? ~0u : (1u << (dim - d)) - 1;
            __m512i r[16];
            for (int i = 0; i < 16; ++i) {
                const float* rows = tile + (d + 2 * i) * 16;
                const __m512i low = narrow_lanes(scaled<kScaled>(rows, factor), half);
                const __m512i high = narrow_lanes(scaled<kScaled>(rows + 16, factor), half);
                r[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
            }
            transpose(r);
            for (int i = 0; i < 16; ++i)
                _mm512_mask_storeu_epi16(lane_of(out, i) + d * 2, valid, r[i]);
        }
    }

    static SIXFOLD_INLINE __m512i narrow_lanes(f32 x, bool half) {
        if (half) {
            const __m512 within = bits<__m512>(within_half<f32x16, u32x16>(x));
            return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(within, _MM_FROUND_TO_NEAREST_INT));
        }
        return bits<__m512i>(float_to_bfloat<f32x16, u32x16>(x));
    }
};

}  // namespace
}  // namespace sixfold::vectors
