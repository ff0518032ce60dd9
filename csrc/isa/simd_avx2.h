// Primitives of the attention kernels with AVX2, FMA and F16C. See simd_avx512.h for the names.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sixfold {
namespace {

struct U8x64 { __m256i v[2]; };
struct I32x16 { __m256i v[2]; };
struct F32x16 { __m256 v[2]; };
struct Lanes { __m256 v[2]; };

constexpr int kRowBlock = 4;      // with two registers a strip, more rows would not fit
constexpr int kAccumulators = 4;  // strips of sums: eight registers
constexpr int kKeyFlip = 0;
// vpmaddubsw adds two products in 16 bits with saturation: 2 * 127 * 127 fits.
constexpr int kByteWeight = 127;
constexpr bool kDirect = true;

template <class T, class F>
inline T both(F half) {
    return {{half(0), half(1)}};
}

inline __m256i from_halves(__m128i low, __m128i high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
inline U8x64 load(const std::uint8_t* p) {
    return both<U8x64>([&](int i) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
    });
}
inline void store(std::uint8_t* p, U8x64 a) {
    for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + i, a.v[i]);
}
inline U8x64 load_twice(const std::uint8_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {{half, half}};
}
inline U8x64 load4(const std::uint8_t* p, const std::int32_t* offset) {
    return both<U8x64>([&](int i) {
        const auto* low = reinterpret_cast<const __m128i*>(p + offset[2 * i]);
        const auto* high = reinterpret_cast<const __m128i*>(p + offset[2 * i + 1]);
        return from_halves(_mm_loadu_si128(low), _mm_loadu_si128(high));
    });
}
inline U8x64 shift_right(U8x64 a, I32x16 count) {
    return both<U8x64>([&](int i) { return _mm256_srlv_epi32(a.v[i], count.v[i]); });
}
inline U8x64 rotate_right(U8x64 a, I32x16 count) {
    return both<U8x64>([&](int i) {
        // A count of 32 shifts everything out: that is the rotation by 0.
        const __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(32), count.v[i]);
        return _mm256_or_si256(_mm256_srlv_epi32(a.v[i], count.v[i]),
                               _mm256_sllv_epi32(a.v[i], left));
    });
}
inline U8x64 keep(U8x64 a, int byte) {
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(byte));
    return both<U8x64>([&](int i) { return _mm256_and_si256(a.v[i], mask); });
}
inline U8x64 merge(U8x64 a, U8x64 b, int byte) {
    const U8x64 kept = keep(b, byte);
    return both<U8x64>([&](int i) { return _mm256_or_si256(a.v[i], kept.v[i]); });
}
inline U8x64 even_words(U8x64 low, U8x64 high) {
    const __m256i mask = _mm256_set1_epi16(0x00FF);
    return both<U8x64>([&](int i) {
        return _mm256_or_si256(_mm256_and_si256(low.v[i], mask), _mm256_slli_epi16(high.v[i], 8));
    });
}
inline U8x64 odd_words(U8x64 low, U8x64 high) {
    const __m256i mask = _mm256_set1_epi16(0x00FF);
    return both<U8x64>([&](int i) {
        return _mm256_or_si256(_mm256_srli_epi16(low.v[i], 8),
                               _mm256_andnot_si256(mask, high.v[i]));
    });
}

// vpshufb holds 16 entries and gives 0 for indices above 127: with saturation everything that is
// not in a part of 16 entries ends up there, and the parts can be added.
template <int kBits>
struct Lookup {
    static constexpr int kParts = kBits <= 4 ? 1 : 1 << (kBits - 4);
    alignas(32) __m256i part[kParts];

    Lookup(const std::uint8_t* table, int) {
        for (int i = 0; i < kParts; ++i)
            part[i] = _mm256_broadcastsi128_si256(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(table) + i));
    }
    U8x64 operator()(U8x64 index) const {
        if constexpr (kParts == 1)
            return both<U8x64>([&](int i) { return _mm256_shuffle_epi8(part[0], index.v[i]); });
        const __m256i beyond = _mm256_set1_epi8(0x70);
        U8x64 found = keep(index, 0);
        for (int p = 0; p < kParts; ++p) {
            const __m256i first = _mm256_set1_epi8(static_cast<char>(16 * p));
            for (int i = 0; i < 2; ++i) {
                const __m256i within = _mm256_sub_epi8(index.v[i], first);
                const __m256i entry =
                    _mm256_shuffle_epi8(part[p], _mm256_adds_epu8(within, beyond));
                found.v[i] = _mm256_or_si256(found.v[i], entry);
            }
        }
        return found;
    }
};
constexpr bool kLookupIgnoresUpperBits = false;

inline I32x16 set1(std::int32_t x) {
    return both<I32x16>([&](int) { return _mm256_set1_epi32(x); });
}
inline I32x16 load(const std::int32_t* p) {
    return both<I32x16>([&](int i) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
    });
}
inline void store(std::int32_t* p, I32x16 a) {
    for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + i, a.v[i]);
}
inline I32x16 add(I32x16 a, I32x16 b) {
    return both<I32x16>([&](int i) { return _mm256_add_epi32(a.v[i], b.v[i]); });
}
template <int kCount>
inline I32x16 shift_right(I32x16 a) {
    return both<I32x16>([&](int i) { return _mm256_srli_epi32(a.v[i], kCount); });
}
inline I32x16 keep(I32x16 a, std::int32_t mask) {
    return both<I32x16>([&](int i) {
        return _mm256_and_si256(a.v[i], _mm256_set1_epi32(mask));
    });
}
inline I32x16 swap_middle(I32x16 a) {
    return both<I32x16>([&](int i) { return _mm256_shuffle_epi32(a.v[i], 0xD8); });
}
inline __m256i packed_words(I32x16 a) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(a.v[0], a.v[1]), 0xD8);
}
inline void store_bytes(std::uint8_t* p, I32x16 a) {
    const __m256i words = packed_words(a);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words),
                                          _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline void store_words(std::int16_t* p, I32x16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed_words(a));
}

inline __m256i add_pairs(__m256i sum, __m256i words) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}
// |level| * (query with the sign of level): the first operand must not be negative.
inline I32x16 dot_keys(I32x16 sum, U8x64 levels, I32x16 query) {
    return both<I32x16>([&](int i) {
        const __m256i size = _mm256_abs_epi8(levels.v[i]);
        const __m256i signs = _mm256_sign_epi8(query.v[i], levels.v[i]);
        return add_pairs(sum.v[i], _mm256_maddubs_epi16(size, signs));
    });
}
inline I32x16 dot_values(I32x16 sum, U8x64 levels, I32x16 weights) {
    return both<I32x16>([&](int i) {
        return add_pairs(sum.v[i], _mm256_maddubs_epi16(weights.v[i], levels.v[i]));
    });
}
inline I32x16 dot_words(I32x16 sum, U8x64 levels, I32x16 operand) {
    return both<I32x16>([&](int i) {
        return _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(levels.v[i], operand.v[i]));
    });
}

inline F32x16 set1(float x) {
    return both<F32x16>([&](int) { return _mm256_set1_ps(x); });
}
inline F32x16 load(const float* p) {
    return both<F32x16>([&](int i) { return _mm256_loadu_ps(p + 8 * i); });
}
inline void store(float* p, F32x16 a) {
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(p + 8 * i, a.v[i]);
}
inline F32x16 load_half(const std::uint16_t* p) {
    return both<F32x16>([&](int i) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
    });
}
inline F32x16 as_floats(U8x64 a) {
    return both<F32x16>([&](int i) { return _mm256_castsi256_ps(a.v[i]); });
}
inline F32x16 as_floats(I32x16 a) {
    return both<F32x16>([&](int i) { return _mm256_castsi256_ps(a.v[i]); });
}
inline U8x64 as_bytes(F32x16 a) {
    return both<U8x64>([&](int i) { return _mm256_castps_si256(a.v[i]); });
}
inline I32x16 as_ints(F32x16 a) {
    return both<I32x16>([&](int i) { return _mm256_castps_si256(a.v[i]); });
}
inline F32x16 to_floats(I32x16 a) {
    return both<F32x16>([&](int i) { return _mm256_cvtepi32_ps(a.v[i]); });
}
inline I32x16 to_ints(F32x16 a) {
    return both<I32x16>([&](int i) { return _mm256_cvtps_epi32(a.v[i]); });
}
inline F32x16 nearest(F32x16 a) {
    return both<F32x16>([&](int i) {
        return _mm256_round_ps(a.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    });
}
inline F32x16 add(F32x16 a, F32x16 b) {
    return both<F32x16>([&](int i) { return _mm256_add_ps(a.v[i], b.v[i]); });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
    return both<F32x16>([&](int i) { return _mm256_sub_ps(a.v[i], b.v[i]); });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
    return both<F32x16>([&](int i) { return _mm256_mul_ps(a.v[i], b.v[i]); });
}
inline F32x16 div(F32x16 a, F32x16 b) {
    return both<F32x16>([&](int i) { return _mm256_div_ps(a.v[i], b.v[i]); });
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return both<F32x16>([&](int i) { return _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]); });
}
inline F32x16 magnitude(F32x16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return both<F32x16>([&](int i) { return _mm256_andnot_ps(sign, a.v[i]); });
}
inline F32x16 larger(F32x16 a, F32x16 b) {
    return both<F32x16>([&](int i) { return _mm256_max_ps(a.v[i], b.v[i]); });
}
inline F32x16 smaller(F32x16 a, F32x16 b) {
    return both<F32x16>([&](int i) { return _mm256_min_ps(a.v[i], b.v[i]); });
}
inline float largest(F32x16 a) {
    const __m256 eight = _mm256_max_ps(a.v[0], a.v[1]);
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline float sum(F32x16 a) {
    const __m256 eight = _mm256_add_ps(a.v[0], a.v[1]);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline F32x16 fraction(F32x16 x) {
    return both<F32x16>([&](int i) { return _mm256_sub_ps(x.v[i], _mm256_floor_ps(x.v[i])); });
}
inline F32x16 times_power(F32x16 a, F32x16 x) {
    return both<F32x16>([&](int i) {
        const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(x.v[i])), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v[i]), power));
    });
}
inline Lanes equal(F32x16 a, F32x16 b) {
    return both<Lanes>([&](int i) { return _mm256_cmp_ps(a.v[i], b.v[i], _CMP_EQ_OQ); });
}
inline F32x16 select(Lanes where, F32x16 a, F32x16 b) {
    return both<F32x16>([&](int i) { return _mm256_blendv_ps(b.v[i], a.v[i], where.v[i]); });
}

}  // namespace
}  // namespace sixfold
