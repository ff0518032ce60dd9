// Primitives of the attention kernels with AVX-512 (F, BW, VL, DQ, VNNI, VBMI).
//
// The same names mean the same in every simd_<isa>.h: U8x64 is 64 bytes, I32x16 and F32x16 are 16
// lanes of 32 bits, lane i of a product is made of bytes 4i to 4i + 3.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sixfold {
namespace {

struct U8x64 { __m512i v; };
struct I32x16 { __m512i v; };
struct F32x16 { __m512 v; };
using Lanes = __mmask16;

constexpr int kRowBlock = 8;       // rows multiplied at once
constexpr int kAccumulators = 16;  // registers for their sums
constexpr int kKeyFlip = 0x80;     // levels of keys are stored as level + 128: vpdpbusd wants that
constexpr int kByteWeight = 255;   // largest 8-bit weight
constexpr bool kDirect = true;     // few rows are multiplied without a tile

inline U8x64 load(const std::uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(std::uint8_t* p, U8x64 a) { _mm512_storeu_si512(p, a.v); }
// 32 bytes, twice.
inline U8x64 load_twice(const std::uint8_t* p) {
    return {_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline U8x64 load4(const std::uint8_t* p, const std::int32_t* offset) {
    auto part = [&](int i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + offset[i]));
    };
    __m512i v = _mm512_castsi128_si512(part(0));
    v = _mm512_inserti32x4(v, part(1), 1);
    v = _mm512_inserti32x4(v, part(2), 2);
    return {_mm512_inserti32x4(v, part(3), 3)};
}
// Every 32-bit lane by its own count, 0 to 31. On Zen 4 a rotation takes a port of the products, a
// shift does not.
inline U8x64 shift_right(U8x64 a, I32x16 count) { return {_mm512_srlv_epi32(a.v, count.v)}; }
inline U8x64 rotate_right(U8x64 a, I32x16 count) { return {_mm512_rorv_epi32(a.v, count.v)}; }
inline U8x64 keep(U8x64 a, int byte) {
    return {_mm512_and_si512(a.v, _mm512_set1_epi8(static_cast<char>(byte)))};
}
// Bits of b where `byte` has ones, else of a.
inline U8x64 merge(U8x64 a, U8x64 b, int byte) {
    const __m512i mask = _mm512_set1_epi8(static_cast<char>(byte));
    return {_mm512_ternarylogic_epi32(a.v, b.v, mask, 0xD8)};
}

// 16-bit levels of bytes 0 and 2 (even), or 1 and 3 (odd), of every lane.
inline U8x64 even_words(U8x64 low, U8x64 high) {
    return {_mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA, low.v, _mm512_slli_epi16(high.v, 8))};
}
inline U8x64 odd_words(U8x64 low, U8x64 high) {
    return {_mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA, _mm512_srli_epi16(low.v, 8), high.v)};
}

// A table indexed by the lower kBits of bytes, which repeats up to 64 entries; they come out xor
// `flip`.
template <int kBits>
struct Lookup {
    static constexpr int kParts = kBits <= 6 ? 1 : 1 << (kBits - 6);
    __m512i part[kParts];

    Lookup(const std::uint8_t* table, int flip) {
        const __m512i mask = _mm512_set1_epi8(static_cast<char>(flip));
        for (int i = 0; i < kParts; ++i)
            part[i] = _mm512_xor_si512(_mm512_loadu_si512(table + 64 * i), mask);
    }
    U8x64 operator()(U8x64 index) const {
        if constexpr (kParts == 1) return {_mm512_permutexvar_epi8(index.v, part[0])};
        else {
            const __m512i first = _mm512_permutex2var_epi8(part[0], index.v, part[1]);
            if constexpr (kParts == 2) return {first};
            else {
                const __m512i second = _mm512_permutex2var_epi8(part[2], index.v, part[3]);
                return {_mm512_mask_blend_epi8(_mm512_movepi8_mask(index.v), first, second)};
            }
        }
    }
};
constexpr bool kLookupIgnoresUpperBits = true;

inline I32x16 set1(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I32x16 load(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(std::int32_t* p, I32x16 a) { _mm512_storeu_si512(p, a.v); }
inline I32x16 add(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int kCount>
inline I32x16 shift_right(I32x16 a) { return {_mm512_srli_epi32(a.v, kCount)}; }
inline I32x16 keep(I32x16 a, std::int32_t mask) {
    return {_mm512_and_si512(a.v, _mm512_set1_epi32(mask))};
}
// Swaps lanes 1 and 2 of every four: the order of 16-bit operands, see even_words.
inline I32x16 swap_middle(I32x16 a) { return {_mm512_shuffle_epi32(a.v, _MM_PERM_DBCA)}; }
inline void store_bytes(std::uint8_t* p, I32x16 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline void store_words(std::int16_t* p, I32x16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}

// sum += levels of a lane times the bytes (16-bit words) of `operand`.
inline I32x16 dot_keys(I32x16 sum, U8x64 levels, I32x16 query) {
    return {_mm512_dpbusd_epi32(sum.v, levels.v, query.v)};
}
inline I32x16 dot_values(I32x16 sum, U8x64 levels, I32x16 weights) {
    return {_mm512_dpbusd_epi32(sum.v, weights.v, levels.v)};
}
inline I32x16 dot_words(I32x16 sum, U8x64 levels, I32x16 operand) {
    return {_mm512_dpwssd_epi32(sum.v, levels.v, operand.v)};
}

inline F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline F32x16 load_half(const std::uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F32x16 as_floats(U8x64 a) { return {_mm512_castsi512_ps(a.v)}; }
inline F32x16 as_floats(I32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline U8x64 as_bytes(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
inline I32x16 as_ints(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
inline F32x16 to_floats(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32x16 to_ints(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest even
inline F32x16 nearest(F32x16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 magnitude(F32x16 a) { return {_mm512_abs_ps(a.v)}; }
// `b` where either is NaN, in both.
inline F32x16 larger(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 smaller(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float largest(F32x16 a) { return _mm512_reduce_max_ps(a.v); }
inline float sum(F32x16 a) { return _mm512_reduce_add_ps(a.v); }
// x - floor(x), and a * 2^floor(x).
inline F32x16 fraction(F32x16 x) { return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF)}; }
inline F32x16 times_power(F32x16 a, F32x16 x) { return {_mm512_scalef_ps(a.v, x.v)}; }
inline Lanes equal(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline F32x16 select(Lanes where, F32x16 a, F32x16 b) {
    return {_mm512_mask_blend_ps(where, b.v, a.v)};
}

}  // namespace
}  // namespace sixfold
