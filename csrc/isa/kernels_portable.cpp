#include "isa/simd_portable.h"
#include "isa/tiles.h"

#include "isa/kernels-inl.h"

namespace sixfold {

const Kernels& portable_kernels() {
    static constexpr Kernels table = kernels_named("portable");
    return table;
}

}  // namespace sixfold
