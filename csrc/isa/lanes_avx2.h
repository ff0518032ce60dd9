// Eight lanes: lookups by permutation up to 16 entries, by gathers beyond.
#pragma once

#include <immintrin.h>

#include "isa/lanes.h"

namespace sixfold::vectors {
namespace {

using f32x8 = float __attribute__((vector_size(32)));
using i32x8 = std::int32_t __attribute__((vector_size(32)));
using u32x8 = std::uint32_t __attribute__((vector_size(32)));
using f64x4 = double __attribute__((vector_size(32)));

struct Lanes : LanesBase<f32x8, i32x8, u32x8, f64x4> {
    static constexpr int kCountedBits = 2;

    static SIXFOLD_INLINE f32 min(f32 a, f32 b) { return _mm256_min_ps(a, b); }

    static SIXFOLD_INLINE f32 sqrt(f32 x) { return _mm256_sqrt_ps(x); }

    static SIXFOLD_INLINE f32 subtract(f32 a, f32 b) {
        __m256 one = _mm256_set1_ps(1);
        asm("" : "+x"(one));  // or the compiler makes it a subtraction again
        return _mm256_fnmadd_ps(b, one, a);
    }

    static SIXFOLD_INLINE f32 multiply_add(f32 a, f32 b, f32 c) {
        return _mm256_fmadd_ps(b, c, a);
    }

    template <int kEntries>
    static SIXFOLD_INLINE f32 lookup(const float* table, i32 index) {
        const __m256i where = (__m256i)index;
        if constexpr (kEntries > 16) return _mm256_i32gather_ps(table, where, 4);
        const __m256 low = _mm256_permutevar8x32_ps(load(table), where);
        if constexpr (kEntries <= 8) return low;
        const __m256 high = _mm256_permutevar8x32_ps(load(table + 8), where);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(where, 28)));
    }
};

}  // namespace
}  // namespace sixfold::vectors
