// Vectors in memory to tiles and back with AVX-512: sixteen words of sixteen lanes at a time.
#pragma once

#include "isa/simd_avx512.h"
#include "isa/tiles.h"

namespace sixfold::vectors {
namespace {

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

template <>
struct Tiles<Simd> {
    using f32 = Simd::f32;
    using u32 = Simd::u32;

    static SIXFOLD_INLINE void load(const VectorTile& in, float* tile, int dim) {
        in.dtype == Dtype::f32 ? load_words(in, tile, dim) : load_halves(in, tile, dim);
    }

    template <bool kScaled>
    static SIXFOLD_INLINE void store(const VectorTile& out, const float* tile, int dim,
                                     float factor) {
        out.dtype == Dtype::f32 ? store_words<kScaled>(out, tile, dim, Simd::set(factor))
                                : store_halves<kScaled>(out, tile, dim, Simd::set(factor));
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
            for (int i = 0; i < 16 && d + i < dim; ++i)
                Simd::store(tile + (d + i) * 16, bits<f32>(r[i]));
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
                const __m512i lower = _mm512_slli_epi32(r[i], 16);
                const __m512i shifted = _mm512_srli_epi32(r[i], 16);
                Simd::store(rows, half ? from_half(r[i]) : bits<f32>(lower));
                Simd::store(rows + 16, half ? from_half(shifted) : bits<f32>(upper));
            }
        }
    }

    static SIXFOLD_INLINE f32 from_half(__m512i x) {
        return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
    }

    template <bool kScaled>
    static SIXFOLD_INLINE f32 scaled(const float* row, f32 factor) {
        return kScaled ? Simd::load(row) * factor : Simd::load(row);
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
            const __m512 within = bits<__m512>(within_half<f32, u32>(x));
            return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(within, _MM_FROUND_TO_NEAREST_INT));
        }
        return bits<__m512i>(float_to_bfloat<f32, u32>(x));
    }
};

}  // namespace
}  // namespace sixfold::vectors
