// Four lanes by vector extensions alone: what every compiler target has, SSE2 on x86-64.
#pragma once

#include "isa/lanes.h"

namespace sixfold::vectors {
namespace {

using i32x4 = std::int32_t __attribute__((vector_size(16)));
using f64x2 = double __attribute__((vector_size(16)));

struct Lanes : LanesBase<f32x4, i32x4, u32x4, f64x2> {
    static constexpr int kCountedBits = 4;
};

}  // namespace
}  // namespace sixfold::vectors
