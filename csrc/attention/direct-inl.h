// Products with integer levels straight from the codes, without a tile: for few rows, which would
// not pay for storing it.
#pragma once

#include "attention/attention.h"
#include "attention/products-inl.h"
#include "attention/unpack-inl.h"

namespace sixfold {
namespace {

// Adds levels of one unit times operands, those of its parts side by side, to a column of sums.
template <class Levels, bool kValues, int kRows, int kColumns>
inline void multiply_unit(const Levels& table, U8x64 indices, const std::int32_t* operands,
                          std::int64_t operand_stride, I32x16 (&sums)[kRows][kColumns],
                          int column) {
    U8x64 levels[Levels::kParts];
    table.look_up(indices, levels);
    SIXFOLD_UNROLL
    for (int part = 0; part < Levels::kParts; ++part)
        SIXFOLD_UNROLL
        for (int r = 0; r < kRows; ++r)
            sums[r][column] = multiply_add<Levels::kArithmetic, kValues>(
                sums[r][column], levels[part], operands + r * operand_stride + part);
}

template <class Levels, class Page, int kAxes, int kRows>
void multiply_key_codes(const Codec& codec, const Products& p) {
    constexpr int kStrips = strips_at_once(kRows), kParts = Levels::kParts;
    const Levels axes[2] = {{codec, 0}, {codec, kAxes - 1}};
    const Page source(codec, p.tile);
    const int units = codec.units;
    for (int strip = 0; strip < 4; strip += kStrips) {
        I32x16 sums[kRows][kStrips];
        for (int r = 0; r < kRows; ++r)
            for (int s = 0; s < kStrips; ++s) sums[r][s] = set1(p.start[r]);
        Fetch fetch(p, strip, kStrips, 4, units);
        for (int u = 0; u < units; ++u) {
            fetch.next();
            const typename Page::Unit unit = source.unit(u);
            SIXFOLD_UNROLL
            for (int s = 0; s < kStrips; ++s) {
                const U8x64 indices = source.indices(unit, strip + s);
                SIXFOLD_UNROLL
                for (int axis = 0; axis < kAxes; ++axis)
                    multiply_unit<Levels, false>(
                        axes[axis], indices, p.operands + (axis * units + u) * kParts,
                        p.operand_stride, sums, s);
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int s = 0; s < kStrips; ++s)
                finish_sum<Levels::kArithmetic, false>(p, r, strip + s, sums[r][s]);
    }
}

template <class Levels, class Page, int kAxes, int kRows, int kUnits>
inline void multiply_value_units(const Codec& codec, const Page& source, const Products& p,
                                 int unit) {
    const Levels axes[2] = {{codec, 0}, {codec, kAxes - 1}};
    I32x16 sums[kRows][kUnits * kAxes];
    for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kUnits * kAxes; ++i) sums[r][i] = set1(0);
    Fetch fetch(p, unit, kUnits, codec.units, 16);
    for (int group = 0; group < 16; ++group) {
        fetch.next();
        SIXFOLD_UNROLL
        for (int i = 0; i < kUnits; ++i) {
            const U8x64 indices = source.indices(source.unit(unit + i), group);
            SIXFOLD_UNROLL
            for (int axis = 0; axis < kAxes; ++axis)
                multiply_unit<Levels, true>(
                    axes[axis], indices, p.operands + group * Levels::kParts, p.operand_stride,
                    sums, i * kAxes + axis);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kUnits; ++i)
            for (int axis = 0; axis < kAxes; ++axis)
                finish_sum<Levels::kArithmetic, true>(p, r, axis * codec.units + unit + i,
                                                      sums[r][i * kAxes + axis]);
}

template <class Levels, class Page, int kAxes, int kRows>
void multiply_value_codes(const Codec& codec, const Products& p) {
    constexpr int kStrips = strips_at_once(kRows);
    // Two tables of 128 entries leave registers for half as many sums.
    constexpr bool kRoom = Levels::kBits < 7 || Levels::kTables * kAxes == 1;
    constexpr int kUnits = kRoom && kStrips > kAxes ? kStrips / kAxes : 1;
    const Page source(codec, p.tile);
    int unit = 0;
    for (; unit + kUnits <= codec.units; unit += kUnits)
        multiply_value_units<Levels, Page, kAxes, kRows, kUnits>(codec, source, p, unit);
    for (; unit < codec.units; ++unit)
        multiply_value_units<Levels, Page, kAxes, kRows, 1>(codec, source, p, unit);
}

template <template <int> class Levels, int kBits, int kAxes, int kRows>
Multiply direct_of_rows(const Codec& codec, Words words) {
    using Together = PlanesPage<kBits, Words::together>;
    if (!codec.values) return multiply_key_codes<Levels<kBits>, Together, kAxes, kRows>;
    if (words == Words::together)
        return multiply_value_codes<Levels<kBits>, Together, kAxes, kRows>;
    if constexpr (planes_of(1, kBits).count > 1)
        if (words == Words::repeated)
            return multiply_value_codes<Levels<kBits>, PlanesPage<kBits, Words::repeated>, kAxes,
                                        kRows>;
    return nullptr;
}

template <template <int> class Levels, int kBits, int kAxes>
Multiply direct_of_bits(const Codec& codec, Words words, int rows) {
    // Else not even compiled.
    if constexpr (kBits <= Simd::kDirectBits)
        return of_few_rows(rows, [&]<int kRows>() {
            return direct_of_rows<Levels, kBits, kAxes, kRows>(codec, words);
        });
    return nullptr;
}

template <class Levels>
Multiply direct_of_paths(const Codec& codec, int rows) {
    if constexpr (Levels::kBits <= Simd::kDirectBits)
        return of_few_rows(rows, [&]<int kRows>() {
            return of_width(codec.half_bits, [&]<int kHalfBits>() -> Multiply {
                if (codec.values)
                    return multiply_value_codes<Levels, ValuePaths<kHalfBits>, 1, kRows>;
                return multiply_key_codes<Levels, KeyPaths<kHalfBits>, 1, kRows>;
            });
        });
    return nullptr;
}

// How to multiply `rows` with the codes of a page, or null if it takes a tile.
Multiply direct_multiplier(const Codec& codec, int rows) {
    if (codec.arithmetic == Arithmetic::floats || rows > kFewRows) return nullptr;
    if (codec.half_bits) return direct_of_paths<PathLevels>(codec, rows);
    const Words words = words_of(codec);
    switch (codec.axes == 2 ? -codec.symbol_bits : codec.symbol_bits) {
        case 1: return direct_of_bits<ByteLevels, 1, 1>(codec, words, rows);
        case 2: return direct_of_bits<ByteLevels, 2, 1>(codec, words, rows);
        case -5: return direct_of_bits<ByteLevels, 5, 2>(codec, words, rows);
        case 3: return direct_of_bits<ByteLevels, 3, 1>(codec, words, rows);
        case -7: return direct_of_bits<ByteLevels, 7, 2>(codec, words, rows);
        case 4: return direct_of_bits<ByteLevels, 4, 1>(codec, words, rows);
        case 5: return direct_of_bits<WordLevels, 5, 1>(codec, words, rows);
        case 6: return direct_of_bits<WordLevels, 6, 1>(codec, words, rows);
        case 7: return direct_of_bits<WordLevels, 7, 1>(codec, words, rows);
        default: return direct_of_bits<WordLevels, 8, 1>(codec, words, rows);
    }
}

}  // namespace
}  // namespace sixfold
