// Four lanes with NEON, dot products and half floats (Armv8.2-A).
#pragma once

#include <arm_neon.h>

#include "isa/simd.h"

namespace sixfold {
namespace {

struct Simd : SimdBase<16> {
    static constexpr int kRadixBits = 4, kQueries = 4, kCountedBits = 3;
    // Four registers a strip: kRowBlock = 4 rows take sixteen of thirty-two. sdot wants signed
    // weights: kByteWeight = 127.

    using SimdBase::max;
    // Compared, not vmaxq: that gives NaN where either operand is.
    static SIXFOLD_INLINE f32 max(f32 a, f32 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    static SIXFOLD_INLINE f32 min(f32 a, f32 b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
    static SIXFOLD_INLINE f32 sqrt(f32 x) { return vsqrtq_f32(x); }
    static SIXFOLD_INLINE f32 multiply_add(f32 a, f32 b, f32 c) { return vfmaq_f32(a, b, c); }

    template <int kEntries>
    static SIXFOLD_INLINE f32 lookup(const float* table, i32 index) {
        if constexpr (kEntries > 16) {
            return SimdBase::lookup<kEntries>(table, index);
        } else {
            // Index 3 is bytes 12 to 15.
            const uint8x16_t where = bits<uint8x16_t>(index * 0x04040404 + 0x03020100);
            const auto* bytes = reinterpret_cast<const std::uint8_t*>(table);
            if constexpr (kEntries > 4)
                return bits<f32>(vqtbl4q_u8(vld1q_u8_x4(bytes), where));
            else
                return bits<f32>(vqtbl1q_u8(vld1q_u8(bytes), where));
        }
    }

    static SIXFOLD_INLINE f32 load_half(const std::uint16_t* p) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
    }
    static SIXFOLD_INLINE i32 to_ints(f32 x) { return vcvtnq_s32_f32(x); }
    static SIXFOLD_INLINE f32 nearest(f32 x) { return vrndnq_f32(x); }
    static SIXFOLD_INLINE f32 fraction(f32 x) { return x - vrndmq_f32(x); }
    static SIXFOLD_INLINE f32 times_power(f32 a, f32 x) {
        return bits<f32>(bits<i32>(a) + (bits<i32>(vcvtmq_s32_f32(x)) << 23));
    }
    static SIXFOLD_INLINE float largest(f32 x) { return vmaxvq_f32(x); }
    static SIXFOLD_INLINE float sum(f32 x) { return vaddvq_f32(x); }

    // Negative counts shift to the right; one of 32 shifts everything out.
    static SIXFOLD_INLINE u8 rotate_right(u8 x, i32 count) {
        const uint32x4_t lanes = bits<uint32x4_t>(x);
        return bits<u8>(vorrq_u32(vshlq_u32(lanes, -count), vshlq_u32(lanes, 32 - count)));
    }
    static SIXFOLD_INLINE u8 even_words(u8 low, u8 high) { return vtrn1q_u8(low, high); }
    static SIXFOLD_INLINE u8 odd_words(u8 low, u8 high) { return vtrn2q_u8(low, high); }

    static SIXFOLD_INLINE int16x8_t packed_words(i32 a, i32 b) {
        return vcombine_s16(vmovn_s32(a), vmovn_s32(b));
    }
    using SimdBase::store_bytes;
    static SIXFOLD_INLINE void store_bytes(std::uint8_t* p, const i32* x) {
        const int8x16_t bytes = vcombine_s8(vmovn_s16(packed_words(x[0], x[1])),
                                            vmovn_s16(packed_words(x[2], x[3])));
        vst1q_u8(p, vreinterpretq_u8_s8(bytes));
    }
    static SIXFOLD_INLINE void store_words(std::int16_t* p, const i32* x) {
        vst1q_s16(p, packed_words(x[0], x[1]));
        vst1q_s16(p + 8, packed_words(x[2], x[3]));
    }

    static SIXFOLD_INLINE u8 narrow_words(i16 low, i16 high) {
        return vcombine_u8(vqmovun_s16(low), vqmovun_s16(high));
    }
    static SIXFOLD_INLINE i16 square(i16 a, i16 b) {
        const int16x8_t x = vqsubq_s16(a, b);
        // -2^15 squared saturates, one below what it would be.
        const uint16x8_t lowest = vceqq_s16(x, vdupq_n_s16(-32768));
        return vsubq_s16(vqrdmulhq_s16(x, x), vreinterpretq_s16_u16(lowest));
    }
    static SIXFOLD_INLINE u8 add_saturating(u8 a, u8 b) { return vqaddq_u8(a, b); }
    static SIXFOLD_INLINE u16 add_saturating(u16 a, u16 b) { return vqaddq_u16(a, b); }
    static SIXFOLD_INLINE u8 min(u8 a, u8 b) { return vminq_u8(a, b); }
    static SIXFOLD_INLINE u16 min(u16 a, u16 b) { return vminq_u16(a, b); }

    static SIXFOLD_INLINE i32 dot_keys(i32 sum, u8 levels, i32 query) {
        return vdotq_s32(sum, bits<int8x16_t>(levels), bits<int8x16_t>(query));
    }
    static SIXFOLD_INLINE i32 dot_values(i32 sum, u8 levels, i32 weights) {
        return dot_keys(sum, levels, weights);
    }
    static SIXFOLD_INLINE i32 dot_words(i32 sum, u8 levels, i32 operand) {
        const int16x8_t x = bits<int16x8_t>(levels), y = bits<int16x8_t>(operand);
        const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
        return vaddq_s32(sum, vpaddq_s32(low, vmull_high_s16(x, y)));
    }
};

// tbl holds 64 entries and gives 0 beyond them; tbx leaves what other parts have found.
template <int kBits>
struct ByteTable {
    static constexpr int kParts = kBits <= 6 ? 1 : 1 << (kBits - 6);
    uint8x16x4_t part[kParts];

    ByteTable(const std::uint8_t* table, int) {
        for (int i = 0; i < kParts; ++i)
            for (int j = 0; j < 4; ++j) part[i].val[j] = vld1q_u8(table + 64 * i + 16 * j);
    }
    Simd::u8 operator()(Simd::u8 index) const {
        if constexpr (kBits <= 4) return vqtbl1q_u8(part[0].val[0], index);
        uint8x16_t found = vqtbl4q_u8(part[0], index);
        for (int p = 1; p < kParts; ++p)
            found = vqtbx4q_u8(found, part[p], vsubq_u8(index, vdupq_n_u8(64 * p)));
        return found;
    }
};

using PathTable = ByteTable<7>;

}  // namespace
}  // namespace sixfold
