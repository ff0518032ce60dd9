// A page of codes becomes a tile of levels (attention.h).
#pragma once

#include "attention/attention.h"
#include "attention/windows-inl.h"
#include "isa/wide.h"

namespace sixfold {
namespace {

// How the words of a unit lie in a plane: side by side, in two that repeat (pairs of 128 coordinates
// have 8 bytes of the narrowest plane), or anywhere.
enum class Words { together, repeated, apart };

template <Words kWords>
struct UnitSource {
    const std::uint8_t* plane;
    const Unit* unit;
    I32x16 count;

    UnitSource(const std::uint8_t* plane_, const Unit* unit_)
        : plane(plane_ + (kWords == Words::apart ? 0 : unit_->offset[0])), unit(unit_),
          count(kWords == Words::together ? set1(unit_->rotation[0]) : load(unit_->rotation)) {}
    U8x64 bytes(std::int64_t at) const {
        if constexpr (kWords == Words::together) return load(plane + at);
        if constexpr (kWords == Words::repeated) return load_twice(plane + at);
        return load_pieces(plane + at, unit->offset);
    }
    // Each byte's bits of the index at their place in it, beside others: of the first plane, of another.
    U8x64 shifted(std::int64_t at) const { return shift_right(bytes(at), count); }
    U8x64 rotated(std::int64_t at) const { return rotate_right(bytes(at), count); }
};

// The planes of a unit; kWords is that of the last one, the others are together unless it is apart.
template <int kBits, Words kWords>
struct UnitPlanes {
    static constexpr Planes kLayout = planes_of(1, kBits);
    static constexpr int kPlanes = kLayout.count;
    static constexpr Words words(int plane) {
        return plane == kPlanes - 1 || kWords == Words::apart ? kWords : Words::together;
    }
    UnitSource<words(0)> first;
    UnitSource<words(1)> second;
    UnitSource<words(2)> third;

    UnitPlanes(const Codec& codec, const std::uint8_t* page, const Unit* unit)
        : first(page, unit),
          second(page + codec.plane_offset[kPlanes > 1], unit + (kPlanes > 1)),
          third(page + codec.plane_offset[kPlanes - 1], unit + kPlanes - 1) {}
    // The indices of a block, below whatever a ByteTable ignores.
    U8x64 indices(const std::int64_t* stride, int block) const {
        if constexpr (kBits == 8) return first.bytes(block * stride[0]);
        U8x64 s = first.shifted(block * stride[0]);
        if constexpr (!Simd::kIgnoresUpperBits) s = keep(s, mask(0));
        if constexpr (kPlanes > 1) s = merge(s, second.rotated(block * stride[1]), mask(1));
        if constexpr (kPlanes > 2) s = merge(s, third.rotated(block * stride[2]), mask(2));
        return s;
    }

private:
    static constexpr int mask(int plane) {
        return ((1 << kLayout.width[plane]) - 1) << kLayout.before[plane];
    }
};

// Where a page's indices come from; windows-inl.h has those of a trellis.
template <int kBits, Words kWords>
class PlanesPage {
public:
    using Unit = UnitPlanes<kBits, kWords>;

    PlanesPage(const Codec& codec, const std::uint8_t* page)
        : codec_(codec), page_(page),
          stride_{codec.plane_stride[0], codec.plane_stride[1], codec.plane_stride[2]} {}
    Unit unit(int u) const { return Unit(codec_, page_, codec_.table + u * Unit::kPlanes); }
    U8x64 indices(const Unit& unit, int block) const { return unit.indices(stride_, block); }

private:
    const Codec& codec_;
    const std::uint8_t* page_;
    std::int64_t stride_[3];
};

// Of any number of bits, wherever the words lie: slower, but one for all.
class AnyPlanesPage {
public:
    using Unit = const sixfold::Unit*;

    AnyPlanesPage(const Codec& codec, const std::uint8_t* page) : codec_(codec), page_(page) {}
    Unit unit(int u) const { return codec_.table + u * codec_.planes.count; }
    U8x64 indices(Unit unit, int block) const {
        U8x64 s = keep(shift_right(words(unit, 0, block), load(unit[0].rotation)), mask(0));
        for (int p = 1; p < codec_.planes.count; ++p)
            s = merge(s, rotate_right(words(unit, p, block), load(unit[p].rotation)), mask(p));
        return s;
    }

private:
    U8x64 words(Unit unit, int p, int block) const {
        const std::uint8_t* at = page_ + codec_.plane_offset[p] + block * codec_.plane_stride[p];
        const std::int32_t* offset = unit[p].offset;
        return unit[p].contiguous ? load(at + offset[0]) : load_pieces(at, offset);
    }
    int mask(int p) const {
        return ((1 << codec_.planes.width[p]) - 1) << codec_.planes.before[p];
    }

    const Codec& codec_;
    const std::uint8_t* page_;
};

// Levels of 64 indices, in kParts pieces of 64 bytes.
template <class Table, int kIndexBits>
struct LevelsOfBytes {
    static constexpr Arithmetic kArithmetic = Arithmetic::bytes;
    static constexpr int kBits = kIndexBits, kTables = 1, kParts = 1;
    Table table;

    LevelsOfBytes(const Codec& codec, int axis)
        : table(codec.low[axis], codec.values ? 0 : Simd::kKeyFlip) {}
    void look_up(U8x64 indices, U8x64* levels) const { levels[0] = look_up_bytes(table, indices); }
};
template <int kBits>
using ByteLevels = LevelsOfBytes<ByteTable<kBits>, kBits>;
// Of the states of a trellis.
using PathLevels = LevelsOfBytes<PathTable, 7>;

template <int kIndexBits>
struct WordLevels {
    static constexpr Arithmetic kArithmetic = Arithmetic::words;
    static constexpr int kBits = kIndexBits, kTables = 2, kParts = 2;
    ByteTable<kBits> low, high;

    WordLevels(const Codec& codec, int axis) : low(codec.low[axis], 0), high(codec.high[axis], 0) {}
    void look_up(U8x64 indices, U8x64* levels) const {
        const U8x64 l = look_up_bytes(low, indices), h = look_up_bytes(high, indices);
        levels[0] = even_words(l, h);
        levels[1] = odd_words(l, h);
    }
};

struct FloatLevels {
    static constexpr Arithmetic kArithmetic = Arithmetic::floats;
    static constexpr int kParts = 4;
    const float* table;

    FloatLevels(const Codec& codec, int axis) : table(codec.exact[axis]) {}
    void look_up(U8x64 indices, U8x64* levels) const {
        alignas(64) std::uint8_t index[kUnitBytes];
        alignas(64) float lanes[kLanes];
        store(index, indices);
        for (int part = 0; part < kParts; ++part) {
            for (int i = 0; i < kLanes; ++i) lanes[i] = table[index[4 * i + part]];
            levels[part] = as<U8x64>(load(lanes));
        }
    }
};

template <class Levels, class Page, int kAxes>
void unpack_page(const Codec& codec, const std::uint8_t* page, std::uint8_t* tile) {
    constexpr int kParts = Levels::kParts;
    const Levels axes[2] = {{codec, 0}, {codec, kAxes - 1}};
    // Copies: the compiler must assume that stores to the tile change the codec.
    const int units = codec.units, blocks = codec.blocks;
    const std::int64_t unit_stride = codec.unit_stride, part_stride = codec.part_stride;
    const std::int64_t block_stride = codec.block_stride;
    const Page source(codec, page);
    for (int u = 0; u < units; ++u) {
        const typename Page::Unit unit = source.unit(u);
        for (int block = 0; block < blocks; ++block) {
            const U8x64 indices = source.indices(unit, block);
            for (int axis = 0; axis < kAxes; ++axis) {
                U8x64 levels[kParts];
                axes[axis].look_up(indices, levels);
                std::uint8_t* to = tile + block * block_stride + (axis * units + u) * unit_stride;
                for (int part = 0; part < kParts; ++part)
                    store(to + part * part_stride, levels[part]);
            }
        }
    }
}

using Unpack = void (*)(const Codec&, const std::uint8_t*, std::uint8_t*);

template <template <int> class Levels, int kBits, int kAxes, Words kWords>
constexpr Unpack unpack_as = unpack_page<Levels<kBits>, PlanesPage<kBits, kWords>, kAxes>;

template <Words kWords>
Unpack unpacker_of(const Codec& codec) {
    constexpr Words w = kWords;
    static constexpr Unpack integers[2][9] = {
        {nullptr, unpack_as<ByteLevels, 1, 1, w>, unpack_as<ByteLevels, 2, 1, w>,
         unpack_as<ByteLevels, 3, 1, w>, unpack_as<ByteLevels, 4, 1, w>,
         unpack_as<WordLevels, 5, 1, w>, unpack_as<WordLevels, 6, 1, w>,
         unpack_as<WordLevels, 7, 1, w>, unpack_as<WordLevels, 8, 1, w>},
        {nullptr, nullptr, nullptr, nullptr, nullptr, unpack_as<ByteLevels, 5, 2, w>, nullptr,
         unpack_as<ByteLevels, 7, 2, w>, nullptr}};
    return integers[codec.axes - 1][codec.symbol_bits];
}

Unpack path_unpacker(const Codec& codec) {
    const bool floats = codec.arithmetic == Arithmetic::floats;
    return of_width(codec.half_bits, [&]<int kHalfBits>() -> Unpack {
        if (codec.values)
            return floats ? unpack_page<FloatLevels, ValuePaths<kHalfBits>, 1>
                          : unpack_page<PathLevels, ValuePaths<kHalfBits>, 1>;
        return floats ? unpack_page<FloatLevels, KeyPaths<kHalfBits>, 1>
                      : unpack_page<PathLevels, KeyPaths<kHalfBits>, 1>;
    });
}

// How the words of the last plane lie, or of all planes if another's are not together.
Words words_of(const Codec& codec) {
    const int planes = codec.planes.count;
    Words found = Words::together;
    for (int i = 0; i < codec.units * planes; ++i) {
        const Unit& unit = codec.table[i];
        const std::int32_t* o = unit.offset;
        if (unit.contiguous) continue;
        const bool repeated =
            i % planes == planes - 1 && o[1] == o[0] + 16 && o[2] == o[0] && o[3] == o[1];
        if (!repeated) return Words::apart;
        found = Words::repeated;
    }
    // Units of the same plane that are together do not repeat.
    if (found == Words::repeated)
        for (int i = planes - 1; i < codec.units * planes; i += planes)
            if (codec.table[i].contiguous) return Words::apart;
    return found;
}

Unpack unpacker(const Codec& codec) {
    if (codec.half_bits) return path_unpacker(codec);
    // What the others are checked against: no reason to compile it for every width.
    if (codec.arithmetic == Arithmetic::floats)
        return codec.axes == 2 ? unpack_page<FloatLevels, AnyPlanesPage, 2>
                               : unpack_page<FloatLevels, AnyPlanesPage, 1>;
    switch (words_of(codec)) {
        case Words::together: return unpacker_of<Words::together>(codec);
        case Words::repeated: return unpacker_of<Words::repeated>(codec);
        default: return unpacker_of<Words::apart>(codec);
    }
}

}  // namespace
}  // namespace sixfold
