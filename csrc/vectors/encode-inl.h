// Encoding of a tile (the rules: kernels/encode/README.md).
#pragma once

namespace sixfold::vectors {
namespace {

// kCount sums that are folded together.
template <class V, int kCount>
struct Sums {
    typename V::f32 of[kCount];

    SIXFOLD_INLINE void operator+=(const Sums& other) {
        for (int i = 0; i < kCount; ++i) of[i] += other.of[i];
    }
};

// Row `row` of what kLevels halvings leave of n rows, leaf(i) being what row i was.
template <int kLevels, class Leaf>
SIXFOLD_INLINE auto fold(int row, int n, const Leaf& leaf) {
    if constexpr (kLevels == 0) {
        return leaf(row);
    } else {
        auto sum = fold<kLevels - 1>(row, n, leaf);
        sum += fold<kLevels - 1>(row + (n >> kLevels), n, leaf);
        return sum;
    }
}

template <class V, int kCount, int kLevels, class Leaf>
SIXFOLD_INLINE void fold_rows(int dim, int n, float* sums, const Leaf& leaf) {
    for (int row = 0; row < n >> kLevels; ++row)
        for (int lane = 0; lane < kLanes; lane += V::kWidth) {
            const auto sum = fold<kLevels>(row, n, [&](int i) __attribute__((always_inline)) {
                return i < dim ? leaf(i, lane) : Sums<V, kCount>{};
            });
            for (int i = 0; i < kCount; ++i)
                V::store(sums + (row * kCount + i) * kLanes + lane, sum.of[i]);
        }
}

// Sums over coordinates in the order of the rules: rows are padded with zeros to a power of two,
// and halves are added until one is left. leaf(coordinate, lane) gives the terms; the kCount sums
// are the first rows of `sums`.
template <class V, int kCount, class Leaf>
SIXFOLD_INLINE void fold_sum(int dim, float* sums, const Leaf& leaf) {
    int n = dim == 1 ? 1 : 2 << (31 - __builtin_clz(static_cast<unsigned>(dim - 1)));
    if (n < 1 << V::kFoldLevels) {
        fold_rows<V, kCount, 0>(dim, n, sums, leaf);
    } else {
        fold_rows<V, kCount, V::kFoldLevels>(dim, n, sums, leaf);
        n >>= V::kFoldLevels;
    }
    for (int half = n / 2 * kCount * kLanes; n > 1; n /= 2, half /= 2)
        for (int i = 0; i < half; i += V::kWidth)
            V::store(sums + i, V::load(sums + i) + V::load(sums + half + i));
}

// What is known of each lane's vector before it is rotated.
struct Norms {
    alignas(64) float power[kLanes];    // the vector was multiplied by this power of two
    alignas(64) float norm[kLanes];     // after that
    alignas(64) float stretch[kLanes];  // from the unnormalised rotation to unit variance; or 0
};

template <class V>
void map_channels(const Affine& affine, float* tile, int dim) {
    for (int d = 0; d < dim; ++d)
        for (int lane = 0; lane < kLanes; lane += V::kWidth) {
            auto x = V::load(tile + d * kLanes + lane);
            if (affine.mean) x = x - V::set(affine.mean[d]);
            if (affine.scale) x = x * V::set(affine.scale[d]);
            V::store(tile + d * kLanes + lane, x);
        }
}

// Multiplies by the power of two, turns for the first round, and leaves the sums of squares before
// that in the first row of `sums`.
template <class V>
void moderate(const Turn& turn, float* tile, int dim, float* sums, Norms& norms) {
    using i32 = typename V::i32;
    for (int lane = 0; lane < kLanes; lane += V::kWidth) {
        // Magnitudes of floats are in the order of their bits, NaN above all.
        i32 peak = {};
        for (int d = 0; d < dim; ++d)
            peak = V::max(peak, bits<i32>(V::load(tile + d * kLanes + lane)) & 0x7fffffff);
        const i32 exponent = V::max(254 - (peak >> 23), i32{} + 1);
        V::store(norms.power + lane, bits<typename V::f32>(exponent << 23));
    }
    if (turn.cosines && (dim & (dim - 1)) == 0) {
        // Turns join the coordinates that the first halving of the sum does.
        fold_sum<V, 1>(dim / 2, sums, [&](int d, int lane) __attribute__((always_inline)) {
            float *low = tile + d * kLanes + lane, *high = low + dim / 2 * kLanes;
            const auto power = V::load(norms.power + lane);
            auto a = V::load(low) * power, b = V::load(high) * power;
            const Sums<V, 1> squares{{a * a + b * b}};
            turn_pair<V, Turning::forward>(turn.cosines + d, turn.sines + d, a, b);
            V::store(low, a);
            V::store(high, b);
            return squares;
        });
        return;
    }
    fold_sum<V, 1>(dim, sums, [&](int d, int lane) __attribute__((always_inline)) {
        float* row = tile + d * kLanes + lane;
        const auto x = V::load(row) * V::load(norms.power + lane);
        V::store(row, x);
        return Sums<V, 1>{{x * x}};
    });
    if (turn.cosines) turn_pass<V, Turning::forward>(tile, dim, turn);
}

// Directions of vectors that have none become zero.
template <class V>
void find_norms(float* tile, int dim, const float* squares, float stretch, Norms& norms) {
    for (int lane = 0; lane < kLanes; lane += V::kWidth)
        V::store(norms.norm + lane, V::sqrt(V::load(squares + lane)));
    for (int lane = 0; lane < kLanes; ++lane) norms.stretch[lane] = stretch / norms.norm[lane];
    for (int lane = 0; lane < kLanes; ++lane) {
        if (__builtin_isfinite(norms.norm[lane]) && norms.norm[lane] > 0) continue;
        norms.stretch[lane] = 0;
        for (int d = 0; d < dim; ++d) tile[d * kLanes + lane] = 0;
    }
}

// The number of boundaries strictly below u.
template <class V, int kBits, bool kGrid>
SIXFOLD_INLINE typename V::i32 index_of(typename V::f32 u, const Codebook& book) {
    typename V::i32 index = {};
    if constexpr (kBits <= V::kCountedBits) {
        for (int level = 0; level < kBits; ++level)
            for (int path = 0; path < 1 << level; ++path)
                index = V::count_greater(index, u, V::set(book.splits[splits_at(level) + path]));
        return index;
    } else if constexpr (kGrid) {
        constexpr int kCells = grid_cells(kBits);
        const auto cell = V::grid_cell(u, book.reach, book.cells_a_unit, book.centre);
        return V::count_greater(V::template lookup<kCells>(book.below, cell), u,
                                V::template lookup<kCells>(book.thresholds, cell));
    } else {
#pragma GCC unroll 8
        for (int level = 0; level < kBits; ++level) {
            const float* splits = book.splits + splits_at(level);
            auto split = V::set(splits[0]);
            if (level == 1) split = V::template lookup<2>(splits, index);
            if (level == 2) split = V::template lookup<4>(splits, index);
            if (level == 3) split = V::template lookup<8>(splits, index);
            if (level == 4) split = V::template lookup<16>(splits, index);
            if (level == 5) split = V::template lookup<32>(splits, index);
            if (level == 6) split = V::template lookup<64>(splits, index);
            if (level == 7) split = V::template lookup<128>(splits, index);
            index = V::count_greater(index + index, u, split);
        }
        return index;
    }
}

// Symbols take the place of coordinates. Sums: u·q, q·q.
template <class V, int kBits, bool kGrid>
void quantize(const EncodeTask& task, const Norms& norms, float* tile, float* sums) {
    const Codebook& book = task.book;
    fold_sum<V, 2>(task.shape.dim, sums, [&](int d, int lane) __attribute__((always_inline)) {
        float* row = tile + d * kLanes + lane;
        const auto u = V::load(row) * V::load(norms.stretch + lane);
        const auto index = index_of<V, kBits, kGrid>(u, book);
        const auto q = V::template lookup<1 << kBits>(book.points[0], index);
        V::store(row, bits<typename V::f32>(index));
        return Sums<V, 2>{{u * q, q * q}};
    });
}

// The first of the nearest points, by the folded coordinates; sign bits are put on top.
template <class V, int kBits>
SIXFOLD_INLINE typename V::i32 pair_index(typename V::f32 x, typename V::f32 y,
                                          const Codebook& book) {
    constexpr int kMirrors = kBits == 5 ? 1 : 2;
    const typename V::i32 x_sign = (x < 0) & 1 << (kBits - 1), y_sign = (y < 0) & 1 << (kBits - 2);
    x = V::abs(x);
    if (kMirrors == 2) y = V::abs(y);
    auto best = V::set(__builtin_inff());
    typename V::i32 nearest = {};
    for (int number = 0; number < 1 << (kBits - kMirrors); ++number) {
        const auto dx = x - V::set(book.points[0][number]), dy = y - V::set(book.points[1][number]);
        const auto distance = dx * dx + dy * dy;
        nearest = distance < best ? nearest * 0 + number : nearest;
        best = V::min(distance, best);
    }
    return nearest | x_sign | (kMirrors == 2 ? y_sign : y_sign * 0);
}

// Products take the place of coordinates: u·q in `tile`, q·q in `squares`.
template <class V, int kBits>
void quantize_pairs(const EncodeTask& task, const Norms& norms, float* tile, float* squares,
                    float* symbols, float* sums) {
    const int dim = task.shape.dim, half = task.shape.symbols;
    for (int i = 0; i < half; ++i)
        for (int lane = 0; lane < kLanes; lane += V::kWidth) {
            const auto stretch = V::load(norms.stretch + lane);
            const int first = i * kLanes + lane, second = first + half * kLanes;
            const bool padded = i + half >= dim;
            const auto x = V::load(tile + first) * stretch;
            const auto y = padded ? V::set(0) : V::load(tile + second) * stretch;
            const auto index = pair_index<V, kBits>(x, y, task.book);
            const auto p = V::template lookup<1 << kBits>(task.book.points[0], index);
            const auto q = V::template lookup<1 << kBits>(task.book.points[1], index);
            V::store(symbols + first, bits<typename V::f32>(index));
            V::store(tile + first, x * p);
            V::store(squares + first, p * p);
            if (padded) continue;
            V::store(tile + second, y * q);
            V::store(squares + second, q * q);
        }
    fold_sum<V, 2>(dim, sums, [&](int d, int lane) __attribute__((always_inline)) {
        const int at = d * kLanes + lane;
        return Sums<V, 2>{{V::load(tile + at), V::load(squares + at)}};
    });
}

template <class V, int kBits>
SIXFOLD_INLINE void quantize_bits(const EncodeTask& task, const Norms& norms, float* tile,
                                  float* sums) {
    auto* chosen = quantize<V, kBits, false>;
    if constexpr (V::kGrid && kBits > V::kCountedBits && kBits <= 6)
        if (task.book.uniform) chosen = quantize<V, kBits, true>;
    chosen(task, norms, tile, sums);
}

// `symbols` gets those of pairs; others are left in `tile`. Returns where they are.
template <class V>
float* quantize_tile(const EncodeTask& task, const Norms& norms, float* tile, float* squares,
                     float* symbols, float* sums) {
    if (task.shape.paired) {
        auto* quantize = task.shape.symbol_bits == 5 ? quantize_pairs<V, 5> : quantize_pairs<V, 7>;
        quantize(task, norms, tile, squares, symbols, sums);
        return symbols;
    }
    switch (task.shape.symbol_bits) {
        case 1: quantize_bits<V, 1>(task, norms, tile, sums); break;
        case 2: quantize_bits<V, 2>(task, norms, tile, sums); break;
        case 3: quantize_bits<V, 3>(task, norms, tile, sums); break;
        case 4: quantize_bits<V, 4>(task, norms, tile, sums); break;
        case 5: quantize_bits<V, 5>(task, norms, tile, sums); break;
        case 6: quantize_bits<V, 6>(task, norms, tile, sums); break;
        case 7: quantize_bits<V, 7>(task, norms, tile, sums); break;
        default: quantize_bits<V, 8>(task, norms, tile, sums);
    }
    return tile;
}

// What multiplies ‖x‖/sqrt(dim), by sums of u·q and q·q.
inline void correct(ScaleKind kind, int dim, const float* sums, double* correction) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const double product = sums[lane], square = sums[kLanes + lane];
        correction[lane] = kind == ScaleKind::norm      ? 1
                           : kind == ScaleKind::optimal ? product / square
                                                        : dim / (product > 0 ? product : 1);
    }
}

// packing.encode_scale of every lane's scale.
inline void store_scales(const double* correction, double unit, const Norms& norms,
                         const CodeTile& out) {
    constexpr double kHalfMax = 65504, kLargeUnit = 65536;
    std::uint16_t halves[kLanes];
    for (int i = 0; i < kLanes; i += 4) {
        f32x4 stored;
        double scale[4];
        for (int j = 0; j < 4; ++j) {
            const int lane = i + j;
            scale[j] = static_cast<double>(norms.norm[lane]) / norms.power[lane] * unit *
                       correction[lane];
            const bool finite = scale[j] - scale[j] == 0;
            const double x = scale[j] > kHalfMax ? -scale[j] / kLargeUnit : scale[j];
            // A zero vector's optimal scale is minus zero, by the sign of its product.
            stored[j] = static_cast<float>(finite ? x + 0.0 : __builtin_nan(""));
            if (!finite) scale[j] = 0;
        }
        store_unaligned(halves + i,
                        __builtin_convertvector(float_to_half<f32x4, u32x4>(stored), u16x4));
        for (int j = 0; j < 4; ++j)
            if (is_extreme(scale[j]))
                halves[i + j] = extreme_scale(static_cast<float>(scale[j]));
    }
    __builtin_memcpy(out.scales, halves, out.count * sizeof *halves);
}

// Into the second-level cache, which has room for more misses under way. Addresses behind the last
// vector are named but not touched.
SIXFOLD_INLINE void prefetch_vectors(const VectorTile& in, int dim, int first, int count) {
    const int bytes = dim * (in.dtype == Dtype::f32 ? 4 : 2);
    for (int i = first; i < first + count; ++i)
        for (int byte = 0; byte < bytes; byte += 64)
            __builtin_prefetch(in.base + in.stride * i + byte, 0, 2);
}

// A quarter of the next tile's vectors, if one follows: all at once would hold up what this tile
// reads.
SIXFOLD_INLINE void prefetch_next(const VectorTile& in, int dim, int quarter) {
    prefetch_vectors(in, dim, kLanes + quarter * kLanes / 4, kLanes / 4);
}

template <class V>
void encode_tile(const EncodeTask& task, const Affine& affine, const VectorTile& in,
                 const CodeTile& out, float* scratch) {
    const int dim = task.shape.dim;
    float *tile = scratch, *words = tile + tile_floats(dim);
    float *sums = words + tile_floats(dim / 4 + 3), *squares = sums + tile_floats(dim + 32);
    float* symbols = squares + tile_floats(dim);
    Norms norms;
    Tiles<V>::load(in, tile, dim);
    prefetch_next(in, dim, 0);
    if (affine.mean || affine.scale) map_channels<V>(affine, tile, dim);
    const Rotation& r = task.rotation;
    moderate<V>(r.rounds ? turn_of(r, 0) : Turn{}, tile, dim, sums, norms);
    prefetch_next(in, dim, 1);
    find_norms<V>(tile, dim, sums, static_cast<float>(task.stretch), norms);
    if (r.rounds == 0)
        dense_pass<V>(r, false, tile, squares);
    else
        rotate_turned<V>(r, tile, squares);
    prefetch_next(in, dim, 2);
    symbols = quantize_tile<V>(task, norms, tile, squares, symbols, sums);
    prefetch_next(in, dim, 3);
    double correction[kLanes];
    correct(task.scale, dim, sums, correction);
    store_scales(correction, task.unit, norms, out);
    for (int i = task.shape.symbols * kLanes; i < task.shape.symbol_rows * kLanes; ++i)
        symbols[i] = 0;
    pack_symbols<V>(task.shape, symbols, words);
    store_codes<V>(task.shape.layout, task.shape.planes, out, words);
}

}  // namespace
}  // namespace sixfold::vectors
