// Primitives on one register, for any instruction set. Included by simd_<isa>.h only, whose `Simd`
// replaces what its instructions do better; wide.h makes sixteen lanes of registers.
#pragma once

#include "isa/registers.h"

namespace sixfold {
namespace {

// Lane i of a product of bytes or words is made of bytes 4i to 4i + 3. Registers are memory only by
// way of loads and stores, which may alias.
template <int kBytes>
struct SimdBase : Registers<kBytes> {
    using typename Registers<kBytes>::f32;
    using typename Registers<kBytes>::i32;
    using typename Registers<kBytes>::u32;
    using typename Registers<kBytes>::i16;
    using typename Registers<kBytes>::u16;
    using typename Registers<kBytes>::u8;
    using typename Registers<kBytes>::half_u16;
    using typename Registers<kBytes>::half_u8;
    using typename Registers<kBytes>::quarter_u8;

    static constexpr int kWidth = kBytes / 4;
    // Vectors: levels of butterflies done in registers, and of sums; scores done at once; bits of
    // codebooks where all boundaries are compared; whether lookups are fast enough for
    // Codebook::thresholds.
    static constexpr int kRadixBits = 3, kFoldLevels = 3, kQueries = 2, kCountedBits = 1;
    static constexpr bool kGrid = false;
    // Trellis: whether look_up_mirrored is faster than arithmetic.
    static constexpr bool kTableCosts = false;
    // Attention: rows multiplied at once, strips of sixteen sums that registers have room for, what
    // levels of keys are stored xor, the largest 8-bit weight, bits of an index up to which few rows
    // are multiplied straight from codes, and whether a ByteTable looks at the lower bits of an index
    // only.
    static constexpr int kRowBlock = 4, kAccumulators = 4, kKeyFlip = 0, kByteWeight = 127;
    static constexpr int kDirectBits = 8;
    static constexpr bool kIgnoresUpperBits = false;

    static SIXFOLD_INLINE f32 load(const float* p) { return load_aligned<f32>(p); }
    static SIXFOLD_INLINE void store(float* p, f32 x) { store_aligned(p, x); }
    static SIXFOLD_INLINE f32 set(float x) { return x - f32{}; }
    static SIXFOLD_INLINE f32 abs(f32 x) { return bits<f32>(bits<i32>(x) & 0x7fffffff); }
    static SIXFOLD_INLINE i32 max(i32 a, i32 b) { return a > b ? a : b; }
    // `b` where either is NaN.
    static SIXFOLD_INLINE f32 max(f32 a, f32 b) { return a > b ? a : b; }
    static SIXFOLD_INLINE f32 min(f32 a, f32 b) { return a < b ? a : b; }
    static SIXFOLD_INLINE f32 sqrt(f32 x) {
        for (int lane = 0; lane < kWidth; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
        return x;
    }
    // a - b, on whatever unit idles while another adds.
    static SIXFOLD_INLINE f32 subtract(f32 a, f32 b) { return a - b; }
    // a + b·c for b = +-1, or where rounding is free: fused or not.
    static SIXFOLD_INLINE f32 multiply_add(f32 a, f32 b, f32 c) { return a + b * c; }
    // index + (a > b)
    static SIXFOLD_INLINE i32 count_greater(i32 index, f32 a, f32 b) { return index - (a > b); }

    // table[index] for index < kEntries, a power of two; tables have at least 16 entries.
    template <int kEntries>
    static SIXFOLD_INLINE f32 lookup(const float* table, i32 index) {
        f32 found;
        for (int lane = 0; lane < kWidth; ++lane) found[lane] = table[index[lane]];
        return found;
    }

    static SIXFOLD_INLINE f32 load_half(const std::uint16_t* p) {
        return half_to_float<f32>(__builtin_convertvector(load_unaligned<half_u16>(p), u32));
    }
    // To nearest even; good for |x| < 2^22, which is all that the kernels round.
    static SIXFOLD_INLINE i32 to_ints(f32 x) {
        const f32 shift = set(0x1.8p23f);
        return bits<i32>(x + shift) - bits<i32>(shift);
    }
    static SIXFOLD_INLINE f32 nearest(f32 x) { return __builtin_convertvector(to_ints(x), f32); }
    // x - floor(x), and a * 2^floor(x). A whole number may also count as the one below, with a
    // fraction of 1.
    static SIXFOLD_INLINE f32 fraction(f32 x) { return x - nearest(x - 0.5f); }
    static SIXFOLD_INLINE f32 times_power(f32 a, f32 x) {
        return bits<f32>(bits<i32>(a) + (to_ints(x - 0.5f) << 23));
    }
    static SIXFOLD_INLINE float largest(f32 x) {
        float top = x[0];
        for (int i = 1; i < kWidth; ++i) top = x[i] > top ? x[i] : top;
        return top;
    }
    static SIXFOLD_INLINE float sum(f32 x) {
        for (int width = kWidth / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) x[i] += x[i + width];
        return x[0];
    }

    // Pieces of 16 bytes, each at an offset of its own.
    static SIXFOLD_INLINE u8 load_pieces(const std::uint8_t* p, const std::int32_t* offset) {
        static_assert(kBytes == 16);
        return load_unaligned<u8>(p + offset[0]);
    }
    // 32 bytes, twice: register `number` of those that hold the 64.
    static SIXFOLD_INLINE u8 load_twice(const std::uint8_t* p, int number) {
        static_assert(kBytes <= 32);
        return load_unaligned<u8>(p + number * kBytes % 32);
    }
    // Every 32-bit lane by its own count, 0 to 31.
    static SIXFOLD_INLINE u8 shift_right(u8 x, i32 count) {
        return bits<u8>(bits<u32>(x) >> bits<u32>(count));
    }
    static SIXFOLD_INLINE u8 rotate_right(u8 x, i32 count) {
        const u32 lanes = bits<u32>(x), right = bits<u32>(count);
        return bits<u8>((lanes >> right) | (lanes << ((32 - right) & 31)));
    }
    static SIXFOLD_INLINE u8 keep(u8 x, int byte) { return x & static_cast<std::uint8_t>(byte); }
    // Bits of b where `byte` has ones, else of a, which has zeros there unless kIgnoresUpperBits.
    static SIXFOLD_INLINE u8 merge(u8 a, u8 b, int byte) { return a | keep(b, byte); }
    // Every 32-bit lane of `low` with that of `high` above it, shifted by 0 to 31.
    static SIXFOLD_INLINE u8 funnel(u8 low, u8 high, int count) {
        return bits<u8>((bits<u32>(low) >> count) | ((bits<u32>(high) << 1) << (31 - count)));
    }
    // Byte j of a lane becomes its seven bits from j·kHalfBits / 2 on, below whatever a ByteTable
    // ignores: two windows a half, then one a byte.
    template <int kHalfBits>
    static SIXFOLD_INLINE u8 key_windows(u8 x) {
        constexpr int kSecond = kHalfBits / 2;
        static_assert(3 * kHalfBits / 2 - kHalfBits == kSecond);
        const u32 lanes = bits<u32>(x);
        const u32 halves = (lanes & 0xffff) | ((lanes << (16 - kHalfBits)) & 0xffff0000);
        return bits<u8>((halves & 0x007f007f) | ((halves << (8 - kSecond)) & 0x7f007f00));
    }
    // Of values, lane k at `p` is byte k of four tokens. Lane i of register `kNumber` becomes their
    // windows from bit c·kHalfBits / 2 on, with c = kNumber·kWidth + i: all lie within two bytes.
    static constexpr int window_byte(int half_bits, int c) { return c * half_bits / 2 / 8; }
    // Bytes that this loads from `p` on.
    static constexpr int value_reach(int half_bits) {
        return 4 * window_byte(half_bits, 16 - kWidth) + kBytes;
    }
    template <int kHalfBits, int kNumber>
    static SIXFOLD_INLINE u8 value_windows(const std::uint8_t* p) {
        constexpr int kFirst = window_byte(kHalfBits, kNumber * kWidth);
        const u32 bytes = load_unaligned<u32>(p + 4 * kFirst);
        u32 shift, from_low, from_high;
        for (int i = 0; i < kWidth; ++i) {
            shift[i] = (kNumber * kWidth + i) * kHalfBits / 2 % 8;
            from_low[i] = (0xff >> shift[i] & 0x7f) * 0x01010101u;
            from_high[i] = 0x7f7f7f7f ^ from_low[i];
        }
        const u32 low = select_windows<kHalfBits, kNumber, 0>(bytes) >> shift;
        const u32 high = select_windows<kHalfBits, kNumber, 1>(bytes) << (8 - shift);
        return bits<u8>((low & from_low) | (high & from_high));
    }
    template <int kHalfBits, int kNumber, int kNext>
    static SIXFOLD_INLINE u32 select_windows(u32 x) {
        constexpr auto lane = [](int i) {
            const int first = kNumber * kWidth;
            return window_byte(kHalfBits, first + i) - window_byte(kHalfBits, first) + kNext;
        };
        if constexpr (kWidth == 4)
            return __builtin_shufflevector(x, x, lane(0), lane(1), lane(2), lane(3));
        else
            return __builtin_shufflevector(x, x, lane(0), lane(1), lane(2), lane(3), lane(4),
                                           lane(5), lane(6), lane(7));
    }
    // 16-bit levels of bytes 0 and 2 (even), or 1 and 3 (odd), of every lane. Little-endian, like
    // the storage format.
    static SIXFOLD_INLINE u8 even_words(u8 low, u8 high) {
        return bits<u8>((bits<u16>(low) & 0x00ff) | (bits<u16>(high) << 8));
    }
    static SIXFOLD_INLINE u8 odd_words(u8 low, u8 high) {
        return bits<u8>((bits<u16>(low) >> 8) | (bits<u16>(high) & 0xff00));
    }

    // Swaps lanes 1 and 2 of every four: the order of 16-bit operands, see even_words.
    static SIXFOLD_INLINE i32 swap_middle(i32 x) {
        if constexpr (kWidth == 4) return __builtin_shufflevector(x, x, 0, 2, 1, 3);
        else if constexpr (kWidth == 8)
            return __builtin_shufflevector(x, x, 0, 2, 1, 3, 4, 6, 5, 7);
        else
            return __builtin_shufflevector(x, x, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13,
                                           15);
    }
    // The sixteen lanes of some registers, each fits.
    static SIXFOLD_INLINE void store_bytes(std::uint8_t* p, const i32* x) {
        std::int32_t lanes[16];
        __builtin_memcpy(lanes, x, sizeof lanes);
        for (int i = 0; i < 16; ++i) p[i] = static_cast<std::uint8_t>(lanes[i]);
    }
    static SIXFOLD_INLINE void store_words(std::int16_t* p, const i32* x) {
        std::int32_t lanes[16];
        __builtin_memcpy(lanes, x, sizeof lanes);
        for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int16_t>(lanes[i]);
    }

    // sum += levels of a lane times the bytes (16-bit words) of the other. Two products of bytes
    // are added in 16 bits: 2 * 127 * 127 fits.
    static SIXFOLD_INLINE i32 dot_keys(i32 sum, u8 levels, i32 query) {
        const i16 x = bits<i16>(levels), y = bits<i16>(query);
        const i32 pairs = bits<i32>(((x << 8) >> 8) * ((y << 8) >> 8) + (x >> 8) * (y >> 8));
        return sum + ((pairs << 16) >> 16) + (pairs >> 16);
    }
    static SIXFOLD_INLINE i32 dot_values(i32 sum, u8 levels, i32 weights) {
        return dot_keys(sum, levels, weights);
    }
    static SIXFOLD_INLINE i32 dot_words(i32 sum, u8 levels, i32 operand) {
        const i32 x = bits<i32>(levels), y = operand;
        return sum + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
    }

    // Two numbers of 16 bits, over and over.
    static SIXFOLD_INLINE i16 set_pair(const std::int16_t* p) {
        return bits<i16>(i32{} + load_unaligned<std::int32_t>(p));
    }
    // As many numbers of 16 bits as a register has bytes, in the order that narrow_words wants.
    static SIXFOLD_INLINE void load_words(const std::int16_t* p, i16& low, i16& high) {
        static_assert(kBytes == 16);
        low = load_aligned<i16>(p);
        high = load_aligned<i16>(p + 8);
    }
    // Numbers from 0 on to bytes, with saturation.
    static SIXFOLD_INLINE u8 narrow_words(i16 low, i16 high) {
        static_assert(kBytes == 16);
        low = low < 255 ? low : i16{} + 255;
        high = high < 255 ? high : i16{} + 255;
        return __builtin_shufflevector(bits<u8>(low), bits<u8>(high), 0, 2, 4, 6, 8, 10, 12, 14, 16,
                                       18, 20, 22, 24, 26, 28, 30);
    }
    // The difference, which saturates, squared; without its last 15 bits, rounded.
    static SIXFOLD_INLINE i16 square(i16 a, i16 b) {
        const i16 wrapped = bits<i16>(bits<u16>(a) - bits<u16>(b));
        const i16 beyond = ((a ^ b) & (a ^ wrapped)) >> 15;
        const i32 x = bits<i32>((beyond & ((a >> 15) ^ 0x7fff)) | (~beyond & wrapped));
        const i32 even = (x << 16) >> 16, odd = x >> 16;
        return bits<i16>(((even * even + 0x4000) >> 15) | ((odd * odd + 0x4000) >> 15 << 16));
    }
    template <class T>
    static SIXFOLD_INLINE T add_saturating(T a, T b) {
        const T sum = a + b;
        return sum | bits<T>(sum < a);
    }
    static SIXFOLD_INLINE u8 min(u8 a, u8 b) { return a < b ? a : b; }
    static SIXFOLD_INLINE u16 min(u16 a, u16 b) { return a < b ? a : b; }
    // Bits of `a` where the mask has ones, else of `b`.
    template <class T>
    static SIXFOLD_INLINE T select(T mask, T a, T b) {
        return (mask & a) | (~mask & b);
    }
    // A byte a lane, from and to memory; each fits.
    static SIXFOLD_INLINE u32 widen_bytes(const std::uint8_t* p) {
        return __builtin_convertvector(load_unaligned<quarter_u8>(p), u32);
    }
    static SIXFOLD_INLINE void store_bytes(std::uint8_t* p, u8 x) { store_aligned(p, x); }
    static SIXFOLD_INLINE void store_bytes(std::uint8_t* p, u16 x) {
        store_unaligned(p, __builtin_convertvector(x, half_u8));
    }
    // Where x is less: that instead of `least`, and `number` instead of `which`.
    template <class T>
    static SIXFOLD_INLINE void take_less(T x, T number, T& least, T& which) {
        const auto less = x < least;
        which = less ? number : which;
        least = less ? x : least;
    }
};

}  // namespace
}  // namespace sixfold
