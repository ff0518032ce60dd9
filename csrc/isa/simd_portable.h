// Four lanes by vector extensions alone: what every compiler target has, SSE2 on x86-64.
#pragma once

#include "isa/simd.h"

namespace sixfold {
namespace {

struct Simd : SimdBase<16> {
    static constexpr int kCountedBits = 4;
    // With both as elsewhere these kernels were three times as large and as long to compile, for
    // processors that few have.
    static constexpr int kFoldLevels = 2;
    static constexpr int kDirectBits = 0;
};

template <int kBits>
struct ByteTable {
    const std::uint8_t* table;

    ByteTable(const std::uint8_t* entries, int) : table(entries) {}
    Simd::u8 operator()(Simd::u8 index) const {
        // By memory: SSE2 has no instruction for a byte of a register.
        std::uint8_t bytes[16];
        store_unaligned(bytes, index);
        for (std::uint8_t& byte : bytes) byte = table[byte];
        return load_unaligned<Simd::u8>(bytes);
    }
};

using PathTable = ByteTable<7>;

}  // namespace
}  // namespace sixfold
