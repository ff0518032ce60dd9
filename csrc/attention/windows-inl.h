// States of a trellis (docs/format.md, 2b): windows of seven bits, read from a page as the indices of
// a codebook are (unpack-inl.h).
//
// Four coordinates take 2·kHalfBits bits, so the windows of a unit of keys begin at the same places of
// a lane, once that is shifted. Sixteen take 2·kHalfBits bytes: a unit of values begins with a byte.
#pragma once

#include "attention/attention.h"
#include "isa/wide.h"

namespace sixfold {
namespace {

// Keys: windows reach from a word of sixteen tokens into the next, and from the last into the first.
template <int kHalfBits>
class KeyPaths {
public:
    struct Unit {
        const std::uint8_t* words;
        std::int64_t stride;
        int shift;
    };

    KeyPaths(const Codec& codec, const std::uint8_t* page)
        : page_(page), stride_(codec.plane_stride[0]), words_(codec.planes.bytes[0] / 4) {
        const int unused = 32 * words_ - codec.dim * kHalfBits / 2;
        for (int strip = 0; strip < 4; ++strip) {
            const std::uint8_t *words = page + strip * stride_, *end = words + stride_;
            const U8x64 first = load(words), last = load(end - kUnitBytes), none{};
            if (words_ > 1) store(seam_[strip], load(end - 2 * kUnitBytes));
            store(seam_[strip] + kUnitBytes, unite(last, funnel(none, first, unused)));
            store(seam_[strip] + 2 * kUnitBytes, funnel(first, none, unused));
        }
    }
    Unit unit(int u) const {
        const int bit = 2 * kHalfBits * u, word = bit / 32, copied = word - (words_ - 2);
        if (copied < 0) return {page_ + word * kUnitBytes, stride_, bit % 32};
        return {seam_[0] + copied * kUnitBytes, 3 * kUnitBytes, bit % 32};
    }
    U8x64 indices(const Unit& unit, int strip) const {
        const std::uint8_t* words = unit.words + strip * unit.stride;
        return key_windows<kHalfBits>(
            funnel(load(words), load(words + kUnitBytes), unit.shift));
    }

private:
    const std::uint8_t* page_;
    std::int64_t stride_;
    int words_;
    // The last word but one; the last, with the path's beginning behind it; and the rest of that.
    alignas(64) std::uint8_t seam_[4][3 * kUnitBytes];
};

// Values: units that load beyond their group of four tokens, or go on with the path's beginning, are
// read from copies of the groups' ends.
template <int kHalfBits>
class ValuePaths {
public:
    struct Unit {
        const std::uint8_t* bytes;
        std::int64_t stride;
    };

    ValuePaths(const Codec& codec, const std::uint8_t* page)
        : page_(page), stride_(codec.plane_stride[0]) {
        const int end = static_cast<int>(stride_);
        const int inside = end < kReach ? 0 : (end - kReach) / kUnit + 1;
        copied_ = inside < codec.units ? inside : codec.units - 1;
        begin_ = copied_ * kUnit / kPiece * kPiece;
        const int seam = codec.dim * kHalfBits / 4 - begin_;
        for (int group = 0; group < 16; ++group) {
            const std::uint8_t* from = page + group * stride_;
            for (int i = begin_; i < end; i += kPiece)
                __builtin_memcpy(ends_[group] + i - begin_, from + i, kPiece);
            __builtin_memcpy(ends_[group] + seam, from, 4);
        }
    }
    Unit unit(int u) const {
        const int at = u * kUnit;
        if (u < copied_) return {page_ + at, stride_};
        return {ends_[0] + at - begin_, kEnd};
    }
    U8x64 indices(const Unit& unit, int group) const {
        return value_windows<kHalfBits>(unit.bytes + group * unit.stride);
    }

private:
    // Bytes of four tokens: a unit's, what is loaded from its beginning on, and a step of copies, which
    // a group is a multiple of.
    static constexpr int kUnit = 4 * kHalfBits, kReach = Simd::value_reach(kHalfBits), kPiece = 16;
    // A copied unit begins less than kReach, or a unit and the padding of a row, before the end.
    static constexpr int kTail = kReach > kUnit + 12 ? kReach : kUnit + 12;
    static constexpr int kEnd = (kTail + kPiece + kReach + 15) / 16 * 16;

    const std::uint8_t* page_;
    std::int64_t stride_;
    int copied_, begin_;
    alignas(64) std::uint8_t ends_[16][kEnd];
};

// `then`, for the width of a trellis.
template <class Then>
auto of_width(int half_bits, Then then) {
    switch (half_bits) {
        case 2: return then.template operator()<2>();
        case 4: return then.template operator()<4>();
        case 5: return then.template operator()<5>();
        case 6: return then.template operator()<6>();
        default: return then.template operator()<8>();
    }
}

}  // namespace
}  // namespace sixfold
