#include "isa/simd_avx512.h"
#include "isa/tiles_avx512.h"

#include "isa/kernels-inl.h"

namespace sixfold {

const Kernels& avx512_kernels() {
    static constexpr Kernels table = kernels_named("avx512");
    return table;
}

}  // namespace sixfold
