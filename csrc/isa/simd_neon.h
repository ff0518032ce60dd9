// Primitives of the attention kernels with NEON, dot products and half floats (Armv8.2-A).
// See simd_avx512.h for the names.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace sixfold {
namespace {

struct U8x64 { uint8x16_t v[4]; };
struct I32x16 { int32x4_t v[4]; };
struct F32x16 { float32x4_t v[4]; };
struct Lanes { uint32x4_t v[4]; };

constexpr int kRowBlock = 4;      // four registers a strip: sixteen of thirty-two
constexpr int kAccumulators = 4;  // strips of sums
constexpr int kKeyFlip = 0;
constexpr int kByteWeight = 127;  // sdot wants signed weights
constexpr bool kDirect = true;

template <class T, class F>
inline T quarters(F quarter) {
    return {{quarter(0), quarter(1), quarter(2), quarter(3)}};
}

inline U8x64 load(const std::uint8_t* p) {
    return quarters<U8x64>([&](int i) { return vld1q_u8(p + 16 * i); });
}
inline void store(std::uint8_t* p, U8x64 a) {
    for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, a.v[i]);
}
inline U8x64 load_twice(const std::uint8_t* p) {
    return quarters<U8x64>([&](int i) { return vld1q_u8(p + i % 2 * 16); });
}
inline U8x64 load4(const std::uint8_t* p, const std::int32_t* offset) {
    return quarters<U8x64>([&](int i) { return vld1q_u8(p + offset[i]); });
}
// Negative counts shift to the right.
inline U8x64 shift_right(U8x64 a, I32x16 count) {
    return quarters<U8x64>([&](int i) {
        const uint32x4_t bits = vreinterpretq_u32_u8(a.v[i]);
        return vreinterpretq_u8_u32(vshlq_u32(bits, vnegq_s32(count.v[i])));
    });
}
inline U8x64 rotate_right(U8x64 a, I32x16 count) {
    return quarters<U8x64>([&](int i) {
        const uint32x4_t bits = vreinterpretq_u32_u8(a.v[i]);
        // A count of 32 shifts everything out.
        const int32x4_t left = vsubq_s32(vdupq_n_s32(32), count.v[i]);
        return vreinterpretq_u8_u32(
            vorrq_u32(vshlq_u32(bits, vnegq_s32(count.v[i])), vshlq_u32(bits, left)));
    });
}
inline U8x64 keep(U8x64 a, int byte) {
    return quarters<U8x64>([&](int i) {
        return vandq_u8(a.v[i], vdupq_n_u8(static_cast<std::uint8_t>(byte)));
    });
}
inline U8x64 merge(U8x64 a, U8x64 b, int byte) {
    const U8x64 kept = keep(b, byte);
    return quarters<U8x64>([&](int i) { return vorrq_u8(a.v[i], kept.v[i]); });
}
inline U8x64 even_words(U8x64 low, U8x64 high) {
    return quarters<U8x64>([&](int i) { return vtrn1q_u8(low.v[i], high.v[i]); });
}
inline U8x64 odd_words(U8x64 low, U8x64 high) {
    return quarters<U8x64>([&](int i) { return vtrn2q_u8(low.v[i], high.v[i]); });
}

// tbl holds 64 entries and gives 0 beyond them; tbx leaves what other parts have found.
template <int kBits>
struct Lookup {
    static constexpr int kParts = kBits <= 6 ? 1 : 1 << (kBits - 6);
    uint8x16x4_t part[kParts];

    Lookup(const std::uint8_t* table, int) {
        for (int i = 0; i < kParts; ++i)
            for (int j = 0; j < 4; ++j) part[i].val[j] = vld1q_u8(table + 64 * i + 16 * j);
    }
    U8x64 operator()(U8x64 index) const {
        return quarters<U8x64>([&](int i) {
            if constexpr (kBits <= 4) return vqtbl1q_u8(part[0].val[0], index.v[i]);
            uint8x16_t found = vqtbl4q_u8(part[0], index.v[i]);
            for (int p = 1; p < kParts; ++p)
                found = vqtbx4q_u8(found, part[p], vsubq_u8(index.v[i], vdupq_n_u8(64 * p)));
            return found;
        });
    }
};
constexpr bool kLookupIgnoresUpperBits = false;

inline I32x16 set1(std::int32_t x) {
    return quarters<I32x16>([&](int) { return vdupq_n_s32(x); });
}
inline I32x16 load(const std::int32_t* p) {
    return quarters<I32x16>([&](int i) { return vld1q_s32(p + 4 * i); });
}
inline void store(std::int32_t* p, I32x16 a) {
    for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, a.v[i]);
}
inline I32x16 add(I32x16 a, I32x16 b) {
    return quarters<I32x16>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
template <int kCount>
inline I32x16 shift_right(I32x16 a) {
    return quarters<I32x16>([&](int i) { return vshrq_n_s32(a.v[i], kCount); });
}
inline I32x16 keep(I32x16 a, std::int32_t mask) {
    return quarters<I32x16>([&](int i) { return vandq_s32(a.v[i], vdupq_n_s32(mask)); });
}
inline I32x16 swap_middle(I32x16 a) {
    return quarters<I32x16>([&](int i) {
        const int32x4_t crossed = vextq_s32(a.v[i], a.v[i], 2);
        return vcombine_s32(vzip1_s32(vget_low_s32(a.v[i]), vget_low_s32(crossed)),
                            vzip2_s32(vget_low_s32(a.v[i]), vget_low_s32(crossed)));
    });
}
inline int16x8_t packed_words(int32x4_t a, int32x4_t b) {
    return vcombine_s16(vmovn_s32(a), vmovn_s32(b));
}
inline void store_bytes(std::uint8_t* p, I32x16 a) {
    const int8x16_t bytes = vcombine_s8(vmovn_s16(packed_words(a.v[0], a.v[1])),
                                        vmovn_s16(packed_words(a.v[2], a.v[3])));
    vst1q_u8(p, vreinterpretq_u8_s8(bytes));
}
inline void store_words(std::int16_t* p, I32x16 a) {
    vst1q_s16(p, packed_words(a.v[0], a.v[1]));
    vst1q_s16(p + 8, packed_words(a.v[2], a.v[3]));
}

inline I32x16 dot_keys(I32x16 sum, U8x64 levels, I32x16 query) {
    return quarters<I32x16>([&](int i) {
        return vdotq_s32(sum.v[i], vreinterpretq_s8_u8(levels.v[i]),
                         vreinterpretq_s8_s32(query.v[i]));
    });
}
inline I32x16 dot_values(I32x16 sum, U8x64 levels, I32x16 weights) {
    return dot_keys(sum, levels, weights);
}
inline I32x16 dot_words(I32x16 sum, U8x64 levels, I32x16 operand) {
    return quarters<I32x16>([&](int i) {
        const int16x8_t x = vreinterpretq_s16_u8(levels.v[i]);
        const int16x8_t y = vreinterpretq_s16_s32(operand.v[i]);
        const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
        return vaddq_s32(sum.v[i], vpaddq_s32(low, vmull_high_s16(x, y)));
    });
}

inline F32x16 set1(float x) {
    return quarters<F32x16>([&](int) { return vdupq_n_f32(x); });
}
inline F32x16 load(const float* p) {
    return quarters<F32x16>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, F32x16 a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline F32x16 load_half(const std::uint16_t* p) {
    return quarters<F32x16>([&](int i) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    });
}
inline F32x16 as_floats(U8x64 a) {
    return quarters<F32x16>([&](int i) { return vreinterpretq_f32_u8(a.v[i]); });
}
inline F32x16 as_floats(I32x16 a) {
    return quarters<F32x16>([&](int i) { return vreinterpretq_f32_s32(a.v[i]); });
}
inline U8x64 as_bytes(F32x16 a) {
    return quarters<U8x64>([&](int i) { return vreinterpretq_u8_f32(a.v[i]); });
}
inline I32x16 as_ints(F32x16 a) {
    return quarters<I32x16>([&](int i) { return vreinterpretq_s32_f32(a.v[i]); });
}
inline F32x16 to_floats(I32x16 a) {
    return quarters<F32x16>([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
inline I32x16 to_ints(F32x16 a) {
    return quarters<I32x16>([&](int i) { return vcvtnq_s32_f32(a.v[i]); });
}
inline F32x16 nearest(F32x16 a) {
    return quarters<F32x16>([&](int i) { return vrndnq_f32(a.v[i]); });
}
inline F32x16 add(F32x16 a, F32x16 b) {
    return quarters<F32x16>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
    return quarters<F32x16>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
    return quarters<F32x16>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F32x16 div(F32x16 a, F32x16 b) {
    return quarters<F32x16>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return quarters<F32x16>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline F32x16 magnitude(F32x16 a) {
    return quarters<F32x16>([&](int i) { return vabsq_f32(a.v[i]); });
}
// Compared, not vmaxq: that gives NaN where either operand is.
inline F32x16 larger(F32x16 a, F32x16 b) {
    return quarters<F32x16>([&](int i) {
        return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
    });
}
inline F32x16 smaller(F32x16 a, F32x16 b) {
    return quarters<F32x16>([&](int i) {
        return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
    });
}
inline float largest(F32x16 a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}
inline float sum(F32x16 a) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3])));
}
inline F32x16 fraction(F32x16 x) {
    return quarters<F32x16>([&](int i) { return vsubq_f32(x.v[i], vrndmq_f32(x.v[i])); });
}
inline F32x16 times_power(F32x16 a, F32x16 x) {
    return quarters<F32x16>([&](int i) {
        const int32x4_t power = vshlq_n_s32(vcvtmq_s32_f32(x.v[i]), 23);
        return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.v[i]), power));
    });
}
inline Lanes equal(F32x16 a, F32x16 b) {
    return quarters<Lanes>([&](int i) { return vceqq_f32(a.v[i], b.v[i]); });
}
inline F32x16 select(Lanes where, F32x16 a, F32x16 b) {
    return quarters<F32x16>([&](int i) { return vbslq_f32(where.v[i], a.v[i], b.v[i]); });
}

}  // namespace
}  // namespace sixfold
