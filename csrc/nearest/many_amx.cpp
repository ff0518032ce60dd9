// Tiles of AMX: sixteen rows of 64 bytes. A page's tile of levels is what the instruction wants of its
// second operand as it is: four coordinates of sixteen vectors a row.
#include <immintrin.h>

#include "nearest/many.h"

namespace sixfold {
namespace {

constexpr int kRows = 16, kRowBytes = 64, kStrips = 4;

// Sums of four strips are tiles 0 to 3; then queries and levels; then the same of what is left where
// steps are no multiple of 16.
struct alignas(64) Configuration {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
};

void begin(int steps) {
    Configuration tiles{};
    tiles.palette = 1;
    for (int i = 0; i < 8; ++i) {
        tiles.row_bytes[i] = kRowBytes;
        tiles.rows[i] = kRows;
    }
    if (const int rest = steps % kRows) {
        tiles.row_bytes[6] = static_cast<std::uint16_t>(4 * rest);
        tiles.rows[7] = static_cast<std::uint8_t>(rest);
    }
    // GCC 12 believes that only the first bytes are read.
    __asm__ volatile("" : : "r"(&tiles) : "memory");
    _tile_loadconfig(&tiles);
}

void end() { _tile_release(); }

// Numbers of tiles are part of the instruction.
#define SIXFOLD_STRIP(strip, queries, levels)                                       \
    _tile_loadd(levels, p.tile + strip * p.strip_stride + step * kRowBytes, kRowBytes); \
    _tile_dpbsud(strip, queries, levels)
#define SIXFOLD_STRIPS(queries, levels)                                \
    _tile_loadd(queries, p.operands + step, p.operand_stride * 4);     \
    SIXFOLD_STRIP(0, queries, levels);                                 \
    SIXFOLD_STRIP(1, queries, levels);                                 \
    SIXFOLD_STRIP(2, queries, levels);                                 \
    SIXFOLD_STRIP(3, queries, levels)

void multiply(const ManyProducts& p) {
    constexpr int kStride = kStrips * kRowBytes;
    _tile_loadd(0, p.products, kStride);
    _tile_loadd(1, p.products + kRows, kStride);
    _tile_loadd(2, p.products + 2 * kRows, kStride);
    _tile_loadd(3, p.products + 3 * kRows, kStride);
    int step = 0;
    for (; step + kRows <= p.steps; step += kRows) {
        SIXFOLD_STRIPS(4, 5);
    }
    if (step < p.steps) {
        SIXFOLD_STRIPS(6, 7);
    }
    _tile_stored(0, p.products, kStride);
    _tile_stored(1, p.products + kRows, kStride);
    _tile_stored(2, p.products + 2 * kRows, kStride);
    _tile_stored(3, p.products + 3 * kRows, kStride);
}

}  // namespace

const ManyKernel& amx_kernel() {
    static constexpr ManyKernel kernel{begin, multiply, end};
    return kernel;
}

}  // namespace sixfold
