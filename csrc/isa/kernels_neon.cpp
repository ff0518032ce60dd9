#include "isa/simd_neon.h"
#include "isa/tiles.h"

#include "isa/kernels-inl.h"

namespace sixfold {

const Kernels& neon_kernels() {
    static constexpr Kernels table = kernels_named("neon");
    return table;
}

}  // namespace sixfold
