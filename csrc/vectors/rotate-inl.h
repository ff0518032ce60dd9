// Rotation of a tile in place, without the final multiplication (kernels/rotate/README.md).
//
// Lanes are vectors, so a butterfly of coordinates is one addition and one subtraction of
// registers, and up to 2^kRadixBits coordinates go through several levels between load and store.
#pragma once

namespace sixfold::vectors {
namespace {

// Plane rotations of one round.
struct Turn {
    const float* cosines = nullptr;  // null: none
    const float* sines = nullptr;
};

SIXFOLD_INLINE Turn turn_of(const Rotation& r, int round) {
    const float* cosines = r.turns + static_cast<std::int64_t>(round) * r.dim;
    return {cosines, cosines + r.dim / 2};
}

enum class Turning { none, forward, backward };

template <class V, Turning kTurning>
SIXFOLD_INLINE void turn_pair(const float* cosine, const float* sine, typename V::f32& low,
                              typename V::f32& high) {
    const auto c = V::set(*cosine), s = V::set(*sine);
    const auto cross_high = s * high, cross_low = s * low, first = c * low, second = c * high;
    low = kTurning == Turning::backward ? first + cross_high : first - cross_high;
    high = kTurning == Turning::backward ? second - cross_low : cross_low + second;
}

template <class V, Turning kTurning>
void turn_pass(float* tile, int dim, const Turn& turn) {
    for (int i = 0; i < dim / 2; ++i) {
        float *low = tile + i * kLanes, *high = low + dim / 2 * kLanes;
        for (int lane = 0; lane < kLanes; lane += V::kWidth) {
            auto a = V::load(low + lane), b = V::load(high + lane);
            turn_pair<V, kTurning>(turn.cosines + i, turn.sines + i, a, b);
            V::store(low + lane, a);
            V::store(high + lane, b);
        }
    }
}

// kBits levels of butterflies at strides `stride`, 2·stride, ... Those of the last levels of a
// transform may be followed by plane rotations of the coordinates i and i + dim/2.
template <class V, int kBits, Turning kTurning>
SIXFOLD_INLINE void butterflies(float* tile, int dim, int stride, const Turn& turn) {
    constexpr int kRadix = 1 << kBits;
    for (int base = 0; base < dim; base += stride << kBits)
        for (int i = base; i < base + stride; ++i)
            for (int lane = 0; lane < kLanes; lane += V::kWidth) {
                float* rows = tile + i * kLanes + lane;
                typename V::f32 r[kRadix];
                for (int k = 0; k < kRadix; ++k) r[k] = V::load(rows + k * stride * kLanes);
#pragma GCC unroll 4
                for (int level = 0; level < kBits; ++level)
#pragma GCC unroll 16
                    for (int k = 0; k < kRadix; ++k) {
                        if (k >> level & 1) continue;
                        const auto low = r[k], high = r[k + (1 << level)];
                        r[k] = low + high;
                        r[k + (1 << level)] = V::subtract(low, high);
                    }
                if constexpr (kTurning != Turning::none)
                    for (int k = 0; k < kRadix / 2; ++k)
                        turn_pair<V, kTurning>(turn.cosines + i + k * stride,
                                               turn.sines + i + k * stride, r[k],
                                               r[k + kRadix / 2]);
                for (int k = 0; k < kRadix; ++k) V::store(rows + k * stride * kLanes, r[k]);
            }
}

// Strides that are powers of two have them in the instructions, not in too few registers: a
// quarter faster.
template <class V, int kBits, Turning kTurning>
void butterfly_pass(float* tile, int dim, int stride, const Turn& turn) {
    if (kBits >= 3 && stride == 1) return butterflies<V, kBits, kTurning>(tile, dim, 1, turn);
    if (kBits >= 3 && stride == 8) return butterflies<V, kBits, kTurning>(tile, dim, 8, turn);
    if (kBits >= 3 && stride == 16) return butterflies<V, kBits, kTurning>(tile, dim, 16, turn);
    butterflies<V, kBits, kTurning>(tile, dim, stride, turn);
}

template <class V, Turning kTurning>
void butterfly_levels(int levels, float* tile, int dim, int stride, const Turn& turn) {
    if (levels == 1) return butterfly_pass<V, 1, kTurning>(tile, dim, stride, turn);
    if (levels == 2) return butterfly_pass<V, 2, kTurning>(tile, dim, stride, turn);
    if (levels == 3) return butterfly_pass<V, 3, kTurning>(tile, dim, stride, turn);
    if constexpr (V::kRadixBits == 4) butterfly_pass<V, 4, kTurning>(tile, dim, stride, turn);
}

// Walsh-Hadamard transform over blocks of `order` coordinates, then `turn` if there is one.
template <class V, Turning kTurning>
void transform(float* tile, int dim, int order, const Turn& turn) {
    int levels = __builtin_ctz(static_cast<unsigned>(dim / order)), stride = order;
    if (levels == 0 && turn.cosines) turn_pass<V, kTurning>(tile, dim, turn);
    while (levels > 0) {
        const int passes = (levels + V::kRadixBits - 1) / V::kRadixBits, now = levels / passes;
        if (levels == now && turn.cosines)
            butterfly_levels<V, kTurning>(now, tile, dim, stride, turn);
        else
            butterfly_levels<V, Turning::none>(now, tile, dim, stride, turn);
        stride <<= now;
        levels -= now;
    }
}

// +-1 matrix times every block of `order` coordinates, columns in ascending order. `copy` holds
// one block.
template <class V>
void factor_pass(const Rotation& r, bool transposed, float* tile, float* copy) {
    constexpr int kBlock = 4;
    const int down = transposed ? 1 : r.order, across = transposed ? r.order : 1;
    for (int base = 0; base < r.dim; base += r.order) {
        float* block = tile + base * kLanes;
        __builtin_memcpy(copy, block, r.order * kLanes * sizeof *copy);
        // The order of a Hadamard matrix is 1, 2 or a multiple of kBlock, and 2 is a butterfly.
        for (int row = 0; row < r.order; row += kBlock)
            for (int lane = 0; lane < kLanes; lane += V::kWidth) {
                const float* f = r.factor + row * down;
                typename V::f32 sum[kBlock];
                for (int j = 0; j < kBlock; ++j)
                    sum[j] = V::set(f[j * down]) * V::load(copy + lane);
                for (int column = 1; column < r.order; ++column) {
                    const auto x = V::load(copy + column * kLanes + lane);
                    for (int j = 0; j < kBlock; ++j)
                        sum[j] = V::multiply_add(sum[j], V::set(f[j * down + column * across]), x);
                }
                for (int j = 0; j < kBlock; ++j)
                    V::store(block + (row + j) * kLanes + lane, sum[j]);
            }
    }
}

// factor·x with sums in float64. `scratch` holds the tile and a block of rows as doubles.
template <class V>
void dense_pass(const Rotation& r, bool transposed, float* tile, float* scratch) {
    using f64 = typename V::f64;
    constexpr int kBlock = 4, kWidth = V::kWidth / 2;
    const int dim = r.dim;
    const std::int64_t down = transposed ? 1 : dim, across = transposed ? dim : 1;
    auto* wide = reinterpret_cast<double*>(scratch);
    double* factors = wide + static_cast<std::int64_t>(dim) * kLanes;
    for (int i = 0; i < dim * kLanes; ++i) wide[i] = tile[i];
    for (int row = 0; row < dim; row += kBlock) {
        // Rows beyond the last are the last once more, and land where nothing is read.
        for (int j = 0; j < kBlock; ++j) {
            const float* f = r.factor + (row + j < dim ? row + j : dim - 1) * down;
            for (int column = 0; column < dim; ++column)
                factors[column * kBlock + j] = f[column * across];
        }
        for (int lane = 0; lane < kLanes; lane += kWidth) {
            f64 sum[kBlock] = {};
            for (int column = 0; column < dim; ++column) {
                const f64 x = load_aligned<f64>(wide + column * kLanes + lane);
                for (int j = 0; j < kBlock; ++j) sum[j] += x * factors[column * kBlock + j];
            }
            for (int j = 0; j < kBlock; ++j)
                for (int i = 0; i < kWidth; ++i)
                    tile[(row + j) * kLanes + lane + i] = static_cast<float>(sum[j][i]);
        }
    }
}

// All rounds but the first turns. `scratch`: see rotation_scratch.
template <class V>
void rotate_turned(const Rotation& r, float* tile, float* scratch) {
    for (int round = 0; round < r.rounds; ++round) {
        if (r.order > 1) factor_pass<V>(r, false, tile, scratch);
        // The last butterflies turn for the next round.
        const Turn next = round + 1 < r.rounds ? turn_of(r, round + 1) : Turn{};
        transform<V, Turning::forward>(tile, r.dim, r.order, next);
    }
}

template <class V>
void rotate_backward(const Rotation& r, float* tile, float* scratch) {
    for (int round = r.rounds - 1; round >= 0; --round) {
        const Turn turn = turn_of(r, round);
        transform<V, Turning::backward>(tile, r.dim, r.order, r.order > 1 ? Turn{} : turn);
        if (r.order == 1) continue;
        factor_pass<V>(r, true, tile, scratch);
        turn_pass<V, Turning::backward>(tile, r.dim, turn);
    }
}

template <class V>
void rotate_in_place(const Rotation& r, bool inverse, float* tile, float* scratch) {
    if (r.rounds == 0) return dense_pass<V>(r, inverse, tile, scratch);
    if (inverse) return rotate_backward<V>(r, tile, scratch);
    turn_pass<V, Turning::forward>(tile, r.dim, turn_of(r, 0));
    rotate_turned<V>(r, tile, scratch);
}

template <class V>
void rotate_tile(const Rotation& rotation, bool inverse, float shrink, const VectorTile& in,
                 const VectorTile& out, float* scratch) {
    float* tile = scratch;
    Tiles<V>::load(in, tile, rotation.dim);
    rotate_in_place<V>(rotation, inverse, tile, scratch + tile_floats(rotation.dim));
    Tiles<V>::template store<true>(out, tile, rotation.dim, shrink);
}

}  // namespace
}  // namespace sixfold::vectors
