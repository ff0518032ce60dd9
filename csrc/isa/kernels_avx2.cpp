#include "isa/simd_avx2.h"
#include "isa/tiles.h"

#include "isa/kernels-inl.h"

namespace sixfold {

const Kernels& avx2_kernels() {
    static constexpr Kernels table = kernels_named("avx2");
    return table;
}

}  // namespace sixfold
