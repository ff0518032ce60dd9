// Symbols to the bytes of rows and pages, and back (docs/format.md, sections 2 and 3).
//
// In between are words: four bytes of a row's plane a lane. Bits move within a word and never
// across lanes; only the order in which words are stored depends on the layout.
#pragma once

namespace sixfold::vectors {
namespace {

// Byte b of a word has symbol first + b + j·bytes in its bits j·width, for j < 8 / width.
template <int kWidth, class Visit>
SIXFOLD_INLINE void for_each_symbol(int first, int bytes, Visit visit) {
#pragma GCC unroll 8
    for (int j = 0; j < 8 / kWidth; ++j)
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) visit(first + b + j * bytes, 8 * b + j * kWidth);
}

// Bits [remaining, remaining + kWidth) of the symbols. kWhole: there are no others.
template <class V, int kWidth, bool kWhole>
void pack_plane(const float* symbols, int remaining, int bytes, float* words) {
    for (int first = 0; first < bytes; first += 4)
        for (int lane = 0; lane < kLanes; lane += V::kWidth) {
            typename V::i32 word = {};
            for_each_symbol<kWidth>(first, bytes, [&](int symbol, int shift) {
                auto x = bits<typename V::i32>(V::load(symbols + symbol * kLanes + lane));
                if constexpr (!kWhole) x = x >> remaining & ((1 << kWidth) - 1);
                word |= x << shift;
            });
            V::store(words + first / 4 * kLanes + lane, bits<typename V::f32>(word));
        }
}

template <class V>
void pack_symbols(const CodeShape& shape, const float* symbols, float* words) {
    int remaining = shape.symbol_bits;
    for (int plane = 0; plane < shape.planes.count; ++plane) {
        const int width = shape.planes.width[plane], bytes = shape.planes.bytes[plane];
        remaining -= width;
        const bool whole = shape.planes.count == 1;
        if (width == 1)
            (whole ? pack_plane<V, 1, true> : pack_plane<V, 1, false>)(symbols, remaining, bytes,
                                                                       words);
        else if (width == 2)
            (whole ? pack_plane<V, 2, true> : pack_plane<V, 2, false>)(symbols, remaining, bytes,
                                                                       words);
        else if (width == 4)
            (whole ? pack_plane<V, 4, true> : pack_plane<V, 4, false>)(symbols, remaining, bytes,
                                                                       words);
        else
            pack_plane<V, 8, true>(symbols, remaining, bytes, words);
        words += bytes / 4 * kLanes;
    }
}

// Calls sink(symbol, bits, lane) for all symbols of a plane but the padding, of which planes have
// different numbers; `bits` are those that row `symbol` of `symbols` has (kFirst: none), and this
// plane's below them.
template <class V, int kWidth, bool kFirst, class Sink>
SIXFOLD_INLINE void unpack_plane(const float* words, int bytes, int count, const float* symbols,
                                 Sink sink) {
    using u32 = typename V::u32;
    for (int first = 0; first < bytes; first += 4)
        for (int lane = 0; lane < kLanes; lane += V::kWidth) {
            const u32 word = bits<u32>(V::load(words + first / 4 * kLanes + lane));
            for_each_symbol<kWidth>(first, bytes, [&](int symbol, int shift) {
                if (symbol >= count) return;
                u32 x = word >> shift;
                if (shift + kWidth < 32) x &= (1 << kWidth) - 1;
                if constexpr (!kFirst)
                    x |= bits<u32>(V::load(symbols + symbol * kLanes + lane)) << kWidth;
                sink(symbol, bits<typename V::i32>(x), lane);
            });
        }
}

// Calls sink(symbol, index, lane) for all symbols, by the planes from kPlane on. kBits: bits of a
// symbol. `symbols` is overwritten; a sink may write to the row it was called for.
template <class V, int kBits, int kPlane = 0, class Sink>
SIXFOLD_INLINE void unpack_symbols(const CodeShape& shape, const float* words, float* symbols,
                                   Sink sink) {
    constexpr Planes kPlanes = planes_of(1, kBits);
    constexpr int kWidth = kPlanes.width[kPlane];
    const int bytes = shape.planes.bytes[kPlane];
    if constexpr (kPlane + 1 == kPlanes.count) {
        unpack_plane<V, kWidth, kPlane == 0>(words, bytes, shape.symbols, symbols, sink);
    } else {
        auto keep = [&](int symbol, typename V::i32 x, int lane) {
            V::store(symbols + symbol * kLanes + lane, bits<typename V::f32>(x));
        };
        unpack_plane<V, kWidth, kPlane == 0>(words, bytes, shape.symbols, symbols, keep);
        unpack_symbols<V, kBits, kPlane + 1>(shape, words + bytes / 4 * kLanes, symbols, sink);
    }
}

SIXFOLD_INLINE VectorTile as_vectors(const CodeTile& rows) {
    return {reinterpret_cast<char*>(rows.base), rows.stride, rows.count, Dtype::f32};
}

// Four tokens' bytes [4 tokens, 4 bytes], as words have them, to [4 bytes, 4 tokens], as value
// pages do; its own inverse.
SIXFOLD_INLINE u8x16 swap_tokens_and_bytes(u8x16 x) {
    return __builtin_shufflevector(x, x, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

template <class V>
void store_codes(Layout layout, const Planes& planes, const CodeTile& out, const float* words) {
    if (layout == Layout::rows)
        return Tiles<V>::template store<false>(as_vectors(out), words, planes.row_bytes / 4, 1);
    std::uint8_t* plane = out.base;
    for (int p = 0; p < planes.count; plane += kPageTokens * planes.bytes[p++]) {
        std::uint8_t* group = plane + out.group * kLanes * planes.bytes[p];
        for (int byte = 0; byte < planes.bytes[p]; byte += 4, words += kLanes) {
            if (layout == Layout::key) {
                __builtin_memcpy(group + byte * kLanes, words, kLanes * 4);
                continue;
            }
            for (int i = 0; i < kLanes; i += 4)
                store_unaligned(group + i * planes.bytes[p] + byte * 4,
                                swap_tokens_and_bytes(load_unaligned<u8x16>(words + i)));
        }
    }
}

template <class V>
void load_codes(Layout layout, const Planes& planes, const CodeTile& in, float* words) {
    if (layout == Layout::rows)
        return Tiles<V>::load(as_vectors(in), words, planes.row_bytes / 4);
    const std::uint8_t* plane = in.base;
    for (int p = 0; p < planes.count; plane += kPageTokens * planes.bytes[p++]) {
        const std::uint8_t* group = plane + in.group * kLanes * planes.bytes[p];
        for (int byte = 0; byte < planes.bytes[p]; byte += 4, words += kLanes) {
            if (layout == Layout::key) {
                __builtin_memcpy(words, group + byte * kLanes, kLanes * 4);
                continue;
            }
            for (int i = 0; i < kLanes; i += 4)
                store_unaligned(words + i, swap_tokens_and_bytes(load_unaligned<u8x16>(
                                               group + i * planes.bytes[p] + byte * 4)));
        }
    }
}

}  // namespace
}  // namespace sixfold::vectors
