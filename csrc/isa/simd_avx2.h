// Eight lanes with AVX2, FMA and F16C: lookups by permutation up to 16 entries, by gathers beyond.
#pragma once

#include <immintrin.h>

#include "isa/simd.h"

namespace sixfold {
namespace {

struct Simd : SimdBase<32> {
    static constexpr int kCountedBits = 2;
    // Larger tables than one register do not fit beside the sums.
    static constexpr int kDirectBits = 4;
    // With two registers a strip, more than kRowBlock = 4 rows would not fit. vpmaddubsw adds with
    // saturation: kByteWeight = 127.

    using SimdBase::max;
    static SIXFOLD_INLINE f32 max(f32 a, f32 b) { return _mm256_max_ps(a, b); }
    static SIXFOLD_INLINE f32 min(f32 a, f32 b) { return _mm256_min_ps(a, b); }
    static SIXFOLD_INLINE f32 sqrt(f32 x) { return _mm256_sqrt_ps(x); }
    static SIXFOLD_INLINE f32 subtract(f32 a, f32 b) {
        __m256 one = _mm256_set1_ps(1);
        asm("" : "+x"(one));  // or the compiler makes it a subtraction again
        return _mm256_fnmadd_ps(b, one, a);
    }
    static SIXFOLD_INLINE f32 multiply_add(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(b, c, a); }

    template <int kEntries>
    static SIXFOLD_INLINE f32 lookup(const float* table, i32 index) {
        const __m256i where = (__m256i)index;
        if constexpr (kEntries > 16) return _mm256_i32gather_ps(table, where, 4);
        const __m256 low = _mm256_permutevar8x32_ps(load(table), where);
        if constexpr (kEntries <= 8) return low;
        const __m256 high = _mm256_permutevar8x32_ps(load(table + 8), where);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(where, 28)));
    }

    static SIXFOLD_INLINE f32 load_half(const std::uint16_t* p) {
        return _mm256_cvtph_ps(load_unaligned<__m128i>(p));
    }
    static SIXFOLD_INLINE i32 to_ints(f32 x) { return (i32)_mm256_cvtps_epi32(x); }
    static SIXFOLD_INLINE f32 nearest(f32 x) {
        return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static SIXFOLD_INLINE f32 fraction(f32 x) { return x - _mm256_floor_ps(x); }
    static SIXFOLD_INLINE f32 times_power(f32 a, f32 x) {
        return bits<f32>(bits<i32>(a) + (to_ints(_mm256_floor_ps(x)) << 23));
    }
    static SIXFOLD_INLINE float largest(f32 all) {
        __m128 x = _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
        x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
    }
    static SIXFOLD_INLINE float sum(f32 all) {
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
        x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }

    static SIXFOLD_INLINE u8 load_pieces(const std::uint8_t* p, const std::int32_t* offset) {
        const auto low = load_unaligned<__m128i>(p + offset[0]);
        const auto high = load_unaligned<__m128i>(p + offset[1]);
        return (u8)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    static SIXFOLD_INLINE u8 rotate_right(u8 x, i32 count) {
        // A count of 32 shifts everything out: that is the rotation by 0.
        const __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(32), (__m256i)count);
        return (u8)_mm256_or_si256(_mm256_srlv_epi32((__m256i)x, (__m256i)count),
                                   _mm256_sllv_epi32((__m256i)x, left));
    }
    // By counts of lanes: one count for a register costs two operations.
    static SIXFOLD_INLINE u8 funnel(u8 low, u8 high, int count) {
        const __m256i right = _mm256_set1_epi32(count), left = _mm256_set1_epi32(32 - count);
        return (u8)_mm256_or_si256(_mm256_srlv_epi32((__m256i)low, right),
                                   _mm256_sllv_epi32((__m256i)high, left));
    }
    template <int kHalfBits>
    static SIXFOLD_INLINE u8 key_windows(u8 lanes) {
        const auto x = (__m256i)lanes;
        const __m256i pairs = _mm256_blend_epi16(x, _mm256_slli_epi32(x, 16 - kHalfBits), 0xAA);
        const __m256i seconds = _mm256_slli_epi32(pairs, 8 - kHalfBits / 2);
        const __m256i odd = _mm256_set1_epi16(static_cast<short>(0xff00));
        return keep((u8)_mm256_blendv_epi8(pairs, seconds, odd), 127);
    }
    // By intrinsics: GCC makes the masks of vector extensions anew in every step of a loop.
    static SIXFOLD_INLINE u8 keep(u8 x, int byte) {
        return (u8)_mm256_and_si256((__m256i)x, _mm256_set1_epi8(static_cast<char>(byte)));
    }
    static SIXFOLD_INLINE u8 merge(u8 a, u8 b, int byte) {
        return (u8)_mm256_or_si256((__m256i)a, (__m256i)keep(b, byte));
    }

    static SIXFOLD_INLINE __m256i packed_words(const i32* x) {
        const __m256i crossed = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]);
        return _mm256_permute4x64_epi64(crossed, 0xD8);
    }
    using SimdBase::store_bytes;
    static SIXFOLD_INLINE void store_bytes(std::uint8_t* p, const i32* x) {
        const __m256i words = packed_words(x);
        store_unaligned(p, _mm_packs_epi16(_mm256_castsi256_si128(words),
                                           _mm256_extracti128_si256(words, 1)));
    }
    static SIXFOLD_INLINE void store_words(std::int16_t* p, const i32* x) {
        store_unaligned(p, packed_words(x));
    }

    static SIXFOLD_INLINE i32 add_pairs(i32 sum, __m256i words) {
        return sum + (i32)_mm256_madd_epi16(words, _mm256_set1_epi16(1));
    }
    // |level| * (query with the sign of level): the first operand must not be negative.
    static SIXFOLD_INLINE i32 dot_keys(i32 sum, u8 levels, i32 query) {
        const __m256i size = _mm256_abs_epi8((__m256i)levels);
        const __m256i signs = _mm256_sign_epi8((__m256i)query, (__m256i)levels);
        return add_pairs(sum, _mm256_maddubs_epi16(size, signs));
    }
    static SIXFOLD_INLINE i32 dot_values(i32 sum, u8 levels, i32 weights) {
        return add_pairs(sum, _mm256_maddubs_epi16((__m256i)weights, (__m256i)levels));
    }
    static SIXFOLD_INLINE i32 dot_words(i32 sum, u8 levels, i32 operand) {
        return sum + (i32)_mm256_madd_epi16((__m256i)levels, (__m256i)operand);
    }

    static SIXFOLD_INLINE u32 widen_bytes(const std::uint8_t* p) {
        return (u32)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static SIXFOLD_INLINE void store_bytes(std::uint8_t* p, u16 x) {
        const auto words = (__m256i)x;
        store_unaligned(p, _mm_packus_epi16(_mm256_castsi256_si128(words),
                                            _mm256_extracti128_si256(words, 1)));
    }
    static SIXFOLD_INLINE void load_words(const std::int16_t* p, i16& low, i16& high) {
        const auto a = load_aligned<__m256i>(p), b = load_aligned<__m256i>(p + 16);
        low = (i16)_mm256_permute2x128_si256(a, b, 0x20);
        high = (i16)_mm256_permute2x128_si256(a, b, 0x31);
    }
    static SIXFOLD_INLINE u8 narrow_words(i16 low, i16 high) {
        return (u8)_mm256_packus_epi16((__m256i)low, (__m256i)high);
    }
    static SIXFOLD_INLINE i16 square(i16 a, i16 b) {
        const __m256i x = _mm256_subs_epi16((__m256i)a, (__m256i)b);
        return (i16)_mm256_mulhrs_epi16(x, x);
    }
    static SIXFOLD_INLINE u8 add_saturating(u8 a, u8 b) {
        return (u8)_mm256_adds_epu8((__m256i)a, (__m256i)b);
    }
    static SIXFOLD_INLINE u16 add_saturating(u16 a, u16 b) {
        return (u16)_mm256_adds_epu16((__m256i)a, (__m256i)b);
    }
    static SIXFOLD_INLINE u8 min(u8 a, u8 b) {
        return (u8)_mm256_min_epu8((__m256i)a, (__m256i)b);
    }
    static SIXFOLD_INLINE u16 min(u16 a, u16 b) {
        return (u16)_mm256_min_epu16((__m256i)a, (__m256i)b);
    }
    // There is no comparison of numbers without a sign.
    template <class T>
    static SIXFOLD_INLINE void take_less(T x, T number, T& least, T& which) {
        const T lower = min(x, least);
        which = lower == least ? which : number;
        least = lower;
    }
};

// vpshufb holds 16 entries, looks at the lower four bits of an index, and gives 0 where its upper one
// is set.
template <int kBits>
struct ByteTable {
    static constexpr int kParts = kBits <= 4 ? 1 : 1 << (kBits - 4);
    // Indices below 128 and all parts before their own are not negative.
    static constexpr bool kChained = kBits < 8;
    alignas(32) __m256i part[kParts];

    ByteTable(const std::uint8_t* table, int) {
        for (int i = kParts - 1; i >= 0; --i) {
            part[i] = _mm256_broadcastsi128_si256(load_unaligned<__m128i>(table + 16 * i));
            if (kChained && i < kParts - 1) part[i + 1] = _mm256_xor_si256(part[i + 1], part[i]);
        }
    }
    // Both registers, part by part: each part is loaded once.
    SIXFOLD_INLINE void look_up(Simd::u8 (&index)[2]) const {
        __m256i found[2] = {}, left[2] = {(__m256i)index[0], (__m256i)index[1]};
        for (int p = 0; p < kParts; ++p)
            for (int i = 0; i < 2; ++i) found[i] = kChained ? add_part(p, left[i], found[i])
                                                            : entries(p, left[i], found[i]);
        for (int i = 0; i < 2; ++i) index[i] = (Simd::u8)found[i];
    }

  private:
    // A part has what its entries differ by from those of the part before: an index takes all parts up
    // to its own.
    SIXFOLD_INLINE __m256i add_part(int p, __m256i& left, __m256i found) const {
        if (p > 0) left = _mm256_sub_epi8(left, _mm256_set1_epi8(16));
        return _mm256_xor_si256(found, _mm256_shuffle_epi8(part[p], left));
    }
    // With saturation everything that is not in a part of 16 entries has its upper bit set.
    SIXFOLD_INLINE __m256i entries(int p, __m256i index, __m256i found) const {
        index = _mm256_sub_epi8(index, _mm256_set1_epi8(static_cast<char>(16 * p)));
        index = _mm256_adds_epu8(index, _mm256_set1_epi8(0x70));
        return _mm256_or_si256(found, _mm256_shuffle_epi8(part[p], index));
    }
};

// Levels of a trellis: those of the states s and 127 - s are opposite.
struct PathTable {
    ByteTable<6> half;

    PathTable(const std::uint8_t* table, int) : half(table, 0) {}
    SIXFOLD_INLINE void look_up(Simd::u8 (&state)[2]) const {
        __m256i sign[2];
        for (int i = 0; i < 2; ++i) {
            const auto s = (__m256i)state[i], opposite = _mm256_sub_epi8(_mm256_set1_epi8(127), s);
            sign[i] = _mm256_sub_epi8(opposite, s);  // odd: never 0
            state[i] = (Simd::u8)_mm256_min_epu8(s, opposite);
        }
        half.look_up(state);
        for (int i = 0; i < 2; ++i)
            state[i] = (Simd::u8)_mm256_sign_epi8((__m256i)state[i], sign[i]);
    }
};

}  // namespace
}  // namespace sixfold
