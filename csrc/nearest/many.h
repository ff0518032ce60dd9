// Products of sixteen queries at a time with a page, by instructions that multiply matrices.
#pragma once

#include <cstdint>

namespace sixfold {

constexpr int kManyRows = 16;

// Integers of 8 bits: see Products (attention/products-inl.h).
struct ManyProducts {
    const std::uint8_t* tile;  // levels [4 strips, steps, 64]
    std::int64_t strip_stride;
    int steps;
    const std::int32_t* operands;  // [kManyRows, steps], rows `operand_stride` apart
    std::int64_t operand_stride;
    std::int32_t* products;  // [kManyRows, 64], which hold what sums begin with
};

// `multiply` is called between the other two, all by one thread, with tiles of as many steps.
struct ManyKernel {
    void (*begin)(int steps);
    void (*multiply)(const ManyProducts&);
    void (*end)();
};

// Null where the processor, the operating system or the compiler has none, or SIXFOLD_AMX=0: reads the
// environment, as `kernels` does.
const ManyKernel* many_kernel();

}  // namespace sixfold
