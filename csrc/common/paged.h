// Pages in memory that anybody may own.
#pragma once

#include <cstdint>

namespace sixfold {

constexpr int kPageTokens = 64;
// Kernels work on 16 lanes of 32 bits, on every instruction set.
constexpr int kLanes = 16;
constexpr int kUnitBytes = 64;

// One tensor of a pool, [slots, heads, a page]: a head's page is contiguous, slots and heads are
// `slot_stride` and `head_stride` elements apart.
template <class T>
struct PoolTensor {
    T* base;
    std::int64_t slot_stride, head_stride;
};

// No member function, and internal linkage: see vectors.h.
template <class T>
static T* page_of(const PoolTensor<T>& tensor, std::int64_t slot, std::int64_t head) {
    return tensor.base + slot * tensor.slot_stride + head * tensor.head_stride;
}

}  // namespace sixfold
