// Four lanes with table lookups and fused multiply-adds.
#pragma once

#include <arm_neon.h>

#include "isa/lanes.h"

namespace sixfold::vectors {
namespace {

using i32x4 = std::int32_t __attribute__((vector_size(16)));
using f64x2 = double __attribute__((vector_size(16)));

struct Lanes : LanesBase<f32x4, i32x4, u32x4, f64x2> {
    static constexpr int kRadixBits = 4;
    static constexpr int kQueries = 4;
    static constexpr int kCountedBits = 3;

    static SIXFOLD_INLINE f32 sqrt(f32 x) { return bits<f32>(vsqrtq_f32(bits<float32x4_t>(x))); }

    static SIXFOLD_INLINE f32 multiply_add(f32 a, f32 b, f32 c) {
        return bits<f32>(vfmaq_f32(bits<float32x4_t>(a), bits<float32x4_t>(b),
                                   bits<float32x4_t>(c)));
    }

    template <int kEntries>
    static SIXFOLD_INLINE f32 lookup(const float* table, i32 index) {
        if constexpr (kEntries > 16) {
            return LanesBase::lookup<kEntries>(table, index);
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
};

}  // namespace
}  // namespace sixfold::vectors
