// Sixteen lanes with AVX-512 (F, BW, VL, DQ, VNNI, VBMI, VBMI2): a row of a tile is a register, and a
// table of 32 numbers is two.
#pragma once

// GCC takes the undefined operands of its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "isa/simd.h"

namespace sixfold {
namespace {

struct Simd : SimdBase<64> {
    static constexpr int kRadixBits = 4, kQueries = 4;
    static constexpr bool kGrid = true, kTableCosts = true;
    static constexpr int kRowBlock = 8, kAccumulators = 16;
    static constexpr int kKeyFlip = 0x80;  // level + 128: vpdpbusd wants that
    static constexpr int kByteWeight = 255;
    static constexpr bool kIgnoresUpperBits = true;

    static SIXFOLD_INLINE i32 max(i32 a, i32 b) {
        return (i32)_mm512_max_epi32((__m512i)a, (__m512i)b);
    }
    static SIXFOLD_INLINE f32 max(f32 a, f32 b) { return _mm512_max_ps(a, b); }
    static SIXFOLD_INLINE f32 min(f32 a, f32 b) { return _mm512_min_ps(a, b); }
    static SIXFOLD_INLINE f32 sqrt(f32 x) { return _mm512_sqrt_ps(x); }
    static SIXFOLD_INLINE f32 subtract(f32 a, f32 b) {
        __m512 one = _mm512_set1_ps(1);
        asm("" : "+v"(one));  // or the compiler makes it a subtraction again
        return _mm512_fnmadd_ps(b, one, a);
    }
    static SIXFOLD_INLINE f32 multiply_add(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(b, c, a); }
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
    // Cell of a codebook's grid that u is in, in the low bits; monotone in u. See
    // vectors::Codebook::fill_grid.
    static SIXFOLD_INLINE i32 grid_cell(f32 u, float reach, float cells_a_unit, float centre) {
        const __m512 clamped = _mm512_range_ps(u, set(reach), 0x2);
        return bits<i32>(_mm512_fmadd_ps(clamped, set(cells_a_unit), set(centre)));
    }

    static SIXFOLD_INLINE f32 load_half(const std::uint16_t* p) {
        return _mm512_cvtph_ps(load_unaligned<__m256i>(p));
    }
    static SIXFOLD_INLINE i32 to_ints(f32 x) { return (i32)_mm512_cvtps_epi32(x); }
    static SIXFOLD_INLINE f32 nearest(f32 x) {
        return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
    }
    static SIXFOLD_INLINE f32 fraction(f32 x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); }
    static SIXFOLD_INLINE f32 times_power(f32 a, f32 x) { return _mm512_scalef_ps(a, x); }
    static SIXFOLD_INLINE float largest(f32 x) { return _mm512_reduce_max_ps(x); }
    static SIXFOLD_INLINE float sum(f32 x) { return _mm512_reduce_add_ps(x); }

    static SIXFOLD_INLINE u8 load_pieces(const std::uint8_t* p, const std::int32_t* offset) {
        const auto piece = [&](int i) { return load_unaligned<__m128i>(p + offset[i]); };
        __m512i x = _mm512_castsi128_si512(piece(0));
        x = _mm512_inserti32x4(x, piece(1), 1);
        x = _mm512_inserti32x4(x, piece(2), 2);
        return (u8)_mm512_inserti32x4(x, piece(3), 3);
    }
    static SIXFOLD_INLINE u8 load_twice(const std::uint8_t* p, int) {
        return (u8)_mm512_broadcast_i64x4(load_unaligned<__m256i>(p));
    }
    // On Zen 4 a rotation takes a port of the products, a shift does not.
    static SIXFOLD_INLINE u8 rotate_right(u8 x, i32 count) {
        return (u8)_mm512_rorv_epi32((__m512i)x, (__m512i)count);
    }
    static SIXFOLD_INLINE u8 merge(u8 a, u8 b, int byte) {
        const __m512i mask = _mm512_set1_epi8(static_cast<char>(byte));
        return (u8)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, mask, 0xD8);
    }
    static SIXFOLD_INLINE u8 funnel(u8 low, u8 high, int count) {
        return (u8)_mm512_shrdv_epi32((__m512i)low, (__m512i)high, _mm512_set1_epi32(count));
    }
    template <int kHalfBits>
    static SIXFOLD_INLINE u8 key_windows(u8 lanes) {
        static constexpr Control from([](int i) { return i % 8 / 4 * 32 + i % 4 * kHalfBits / 2; });
        return (u8)_mm512_multishift_epi64_epi8(from.bytes(), (__m512i)lanes);
    }
    // Sixteen coordinates begin within 2·kHalfBits bytes and end within one more.
    static constexpr int value_reach(int half_bits) {
        return half_bits == 2 ? 16 : half_bits < 8 ? 32 : 64;
    }
    // Two coordinates lie within two bytes: a qword gathers these of four tokens.
    template <int kHalfBits, int kNumber>
    static SIXFOLD_INLINE u8 value_windows(const std::uint8_t* p) {
        static constexpr Control where(
            [](int i) { return (i / 8 * kHalfBits / 8 + i % 2) * 4 + i % 8 / 2; });
        static constexpr Control from([](int i) {
            return i % 4 * 16 + i / 8 * kHalfBits % 8 + i % 8 / 4 * (kHalfBits / 2);
        });
        const __m512i pairs = _mm512_permutexvar_epi8(where.bytes(), load_reach<kHalfBits>(p));
        return (u8)_mm512_multishift_epi64_epi8(from.bytes(), pairs);
    }
    template <int kHalfBits>
    static SIXFOLD_INLINE __m512i load_reach(const std::uint8_t* p) {
        constexpr int kReach = value_reach(kHalfBits);
        if constexpr (kReach == 16) return _mm512_castsi128_si512(load_unaligned<__m128i>(p));
        else if constexpr (kReach == 32) return _mm512_castsi256_si512(load_unaligned<__m256i>(p));
        else return load_unaligned<__m512i>(p);
    }
    static SIXFOLD_INLINE u8 even_words(u8 low, u8 high) {
        return (u8)_mm512_mask_blend_epi8(kOddBytes, (__m512i)low,
                                          _mm512_slli_epi16((__m512i)high, 8));
    }
    static SIXFOLD_INLINE u8 odd_words(u8 low, u8 high) {
        return (u8)_mm512_mask_blend_epi8(kOddBytes, _mm512_srli_epi16((__m512i)low, 8),
                                          (__m512i)high);
    }

    static SIXFOLD_INLINE i32 swap_middle(i32 x) {
        return (i32)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_DBCA);
    }
    static SIXFOLD_INLINE void store_bytes(std::uint8_t* p, const i32* x) {
        store_unaligned(p, _mm512_cvtepi32_epi8((__m512i)*x));
    }
    static SIXFOLD_INLINE void store_words(std::int16_t* p, const i32* x) {
        store_unaligned(p, _mm512_cvtepi32_epi16((__m512i)*x));
    }

    static SIXFOLD_INLINE i32 dot_keys(i32 sum, u8 levels, i32 query) {
        return (i32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)levels, (__m512i)query);
    }
    static SIXFOLD_INLINE i32 dot_values(i32 sum, u8 levels, i32 weights) {
        return (i32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)levels);
    }
    static SIXFOLD_INLINE i32 dot_words(i32 sum, u8 levels, i32 operand) {
        return (i32)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)levels, (__m512i)operand);
    }

    // Numbers i from -64 to 63 of seven bits, as max(i, -1 - i) and where that is not i.
    struct Mirrored {
        __m512i distance;
        __mmask64 negative;
    };
    static SIXFOLD_INLINE Mirrored mirror(u8 numbers) {
        const auto x = (__m512i)numbers;
        const __mmask64 negative = _mm512_test_epi8_mask(x, _mm512_set1_epi8(64));
        return {_mm512_mask_sub_epi8(x, negative, _mm512_set1_epi8(127), x), negative};
    }
    // positive[i] where i is not negative, else negative[-1 - i]; and the same with tables exchanged,
    // for one operation more on the permutations' port than either by itself.
    static SIXFOLD_INLINE void look_up_mirrored(const std::uint8_t* positive,
                                                const std::uint8_t* negative, Mirrored i, u8& found,
                                                u8& opposite) {
        const __m512i a = _mm512_permutexvar_epi8(i.distance, _mm512_load_si512(positive));
        const __m512i b = _mm512_permutexvar_epi8(i.distance, _mm512_load_si512(negative));
        found = (u8)_mm512_mask_blend_epi8(i.negative, a, b);
        opposite = (u8)_mm512_mask_blend_epi8(i.negative, b, a);
    }
    static SIXFOLD_INLINE u32 widen_bytes(const std::uint8_t* p) {
        return (u32)_mm512_cvtepu8_epi32(load_unaligned<__m128i>(p));
    }
    using SimdBase::store_bytes;
    static SIXFOLD_INLINE void store_bytes(std::uint8_t* p, u16 x) {
        store_unaligned(p, _mm512_cvtepi16_epi8((__m512i)x));
    }
    static SIXFOLD_INLINE void load_words(const std::int16_t* p, i16& low, i16& high) {
        const __m512i a = _mm512_load_si512(p), b = _mm512_load_si512(p + 32);
        low = (i16)_mm512_shuffle_i64x2(a, b, 0x88);
        high = (i16)_mm512_shuffle_i64x2(a, b, 0xdd);
    }
    static SIXFOLD_INLINE u8 narrow_words(i16 low, i16 high) {
        return (u8)_mm512_packus_epi16((__m512i)low, (__m512i)high);
    }
    static SIXFOLD_INLINE i16 square(i16 a, i16 b) {
        const __m512i x = _mm512_subs_epi16((__m512i)a, (__m512i)b);
        return (i16)_mm512_mulhrs_epi16(x, x);
    }
    static SIXFOLD_INLINE u8 add_saturating(u8 a, u8 b) {
        return (u8)_mm512_adds_epu8((__m512i)a, (__m512i)b);
    }
    static SIXFOLD_INLINE u16 add_saturating(u16 a, u16 b) {
        return (u16)_mm512_adds_epu16((__m512i)a, (__m512i)b);
    }
    static SIXFOLD_INLINE u8 min(u8 a, u8 b) {
        return (u8)_mm512_min_epu8((__m512i)a, (__m512i)b);
    }
    static SIXFOLD_INLINE u16 min(u16 a, u16 b) {
        return (u16)_mm512_min_epu16((__m512i)a, (__m512i)b);
    }
    template <class T>
    static SIXFOLD_INLINE T select(T mask, T a, T b) {
        return (T)_mm512_ternarylogic_epi32((__m512i)mask, (__m512i)a, (__m512i)b, 0xCA);
    }
    static SIXFOLD_INLINE void take_less(u8 x, u8 number, u8& least, u8& which) {
        const __mmask64 less = _mm512_cmplt_epu8_mask((__m512i)x, (__m512i)least);
        which = (u8)_mm512_mask_mov_epi8((__m512i)which, less, (__m512i)number);
        least = min(x, least);
    }
    static SIXFOLD_INLINE void take_less(u16 x, u16 number, u16& least, u16& which) {
        const __mmask32 less = _mm512_cmplt_epu16_mask((__m512i)x, (__m512i)least);
        which = (u16)_mm512_mask_mov_epi16((__m512i)which, less, (__m512i)number);
        least = min(x, least);
    }

  private:
    // What a permutation does with each of 64 bytes.
    struct Control {
        alignas(64) std::uint8_t of[64] = {};

        template <class Of>
        constexpr Control(Of of_byte) {
            for (int i = 0; i < 64; ++i) of[i] = static_cast<std::uint8_t>(of_byte(i));
        }
        __m512i bytes() const { return _mm512_load_si512(of); }
    };
    static constexpr __mmask64 kOddBytes = 0xAAAAAAAAAAAAAAAA;
};

template <int kBits>
struct ByteTable {
    static constexpr int kParts = kBits <= 6 ? 1 : 1 << (kBits - 6);
    __m512i part[kParts];

    ByteTable(const std::uint8_t* table, int flip) {
        const __m512i mask = _mm512_set1_epi8(static_cast<char>(flip));
        for (int i = 0; i < kParts; ++i)
            part[i] = _mm512_xor_si512(_mm512_loadu_si512(table + 64 * i), mask);
    }
    Simd::u8 operator()(Simd::u8 bytes) const {
        const auto index = (__m512i)bytes;
        if constexpr (kParts == 1) return (Simd::u8)_mm512_permutexvar_epi8(index, part[0]);
        else {
            const __m512i first = _mm512_permutex2var_epi8(part[0], index, part[1]);
            if constexpr (kParts == 2) return (Simd::u8)first;
            else {
                const __m512i second = _mm512_permutex2var_epi8(part[2], index, part[3]);
                return (Simd::u8)_mm512_mask_blend_epi8(_mm512_movepi8_mask(index), first, second);
            }
        }
    }
};

using PathTable = ByteTable<7>;

}  // namespace
}  // namespace sixfold
