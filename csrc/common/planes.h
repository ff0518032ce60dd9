// How symbols are cut into planes (docs/format.md, section 2).
#pragma once

namespace sixfold {

// Bits of a symbol in each plane, the most significant first; 0: there is no such plane.
constexpr int kPlaneWidths[9][3] = {{},     {1},    {2},    {2, 1},   {4},
                                    {4, 1}, {4, 2}, {4, 2, 1}, {8}};

// The planes of a vector's symbols.
struct Planes {
    int count;
    int width[3];   // bits of a symbol
    int before[3];  // bits of a symbol in the planes before
    int bytes[3];   // of a vector
    int row_bytes;  // of a vector, all planes
};

// Internal linkage: see vectors/vectors.h.
static constexpr Planes planes_of(int symbols, int symbol_bits) {
    Planes planes{};
    for (int width : kPlaneWidths[symbol_bits]) {
        if (width == 0) break;
        const int p = planes.count++;
        planes.width[p] = width;
        planes.before[p] = p ? planes.before[p - 1] + planes.width[p - 1] : 0;
        planes.bytes[p] = (symbols * width + 31) / 32 * 4;
        planes.row_bytes += planes.bytes[p];
    }
    return planes;
}

// Symbols of a vector; each stands for one coordinate, or for `axes` = 2.
static constexpr int symbols_of(int dim, int axes) { return (dim + axes - 1) / axes; }

}  // namespace sixfold
