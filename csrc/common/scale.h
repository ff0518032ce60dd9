// Scales of vectors in 16 bits (docs/format.md, section 4): a float16 whose sign bit is a flag.
#pragma once

#include <cstdint>

namespace sixfold {
namespace {

constexpr std::uint16_t kFlag = 0x8000;
// Bits of 0.5 as float16: numbers in units of 2^16 are larger than that.
constexpr std::uint16_t kUpperEnd = 0x3800;

// What a scale with its flag set stands for.
inline float flagged_scale(std::uint16_t stored) {
    const std::uint32_t bits = stored & ~kFlag;
    if (bits < kUpperEnd) return __builtin_bit_cast(float, bits << 17);
    if (bits > 0x7c00) return __builtin_nanf("");
    // From the bias of a float16 to that of a float32, times 2^16.
    return __builtin_bit_cast(float, (bits << 13) + ((127 - 15 + 16) << 23));
}

// Whether a finite scale is stored by the upper bits of its float32.
inline bool is_extreme(double scale) {
    return scale > 65504.0 * 65536.0 || (scale >= 0x1p-96 && scale < 0x1p-18);
}

inline std::uint16_t extreme_scale(float scale) {
    const std::uint32_t upper = (__builtin_bit_cast(std::uint32_t, scale) + 0x10000) >> 17;
    return static_cast<std::uint16_t>(kFlag | (upper < kUpperEnd ? upper : kUpperEnd - 1));
}

}  // namespace
}  // namespace sixfold
