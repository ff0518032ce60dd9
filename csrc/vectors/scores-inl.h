// Inner products of queries with a tile of codes (kernels/scores/README.md).
#pragma once

namespace sixfold::vectors {
namespace {

// Four partial sums a query, whatever the number of queries: results do not depend on it.
template <class V, int kQueries>
void score_queries(const float* tile, int dim, const float* queries, const float* scales,
                   int count, float* out, std::int64_t stride) {
    constexpr int kChains = 4;
    alignas(64) float products[kQueries][kLanes];
    for (int lane = 0; lane < kLanes; lane += V::kWidth) {
        typename V::f32 sum[kQueries][kChains] = {};
        int d = 0;
        for (; d + kChains <= dim; d += kChains)
            for (int c = 0; c < kChains; ++c) {
                const auto x = V::load(tile + (d + c) * kLanes + lane);
                for (int q = 0; q < kQueries; ++q)
                    sum[q][c] = V::multiply_add(sum[q][c], V::set(queries[q * dim + d + c]), x);
            }
        for (; d < dim; ++d)
            for (int q = 0; q < kQueries; ++q)
                sum[q][0] = V::multiply_add(sum[q][0], V::set(queries[q * dim + d]),
                                            V::load(tile + d * kLanes + lane));
        // Scales last: a NaN scale must not reach the other columns.
        for (int q = 0; q < kQueries; ++q)
            V::store(products[q] + lane, ((sum[q][0] + sum[q][1]) + (sum[q][2] + sum[q][3])) *
                                             V::load(scales + lane));
    }
    for (int q = 0; q < kQueries; ++q)
        __builtin_memcpy(out + q * stride, products[q], count * sizeof(float));
}

template <class V>
void score_all(const float* tile, int dim, const float* queries, std::int64_t n_queries,
               const float* scales, int count, float* out, std::int64_t stride) {
    std::int64_t q = 0;
    for (; q + V::kQueries <= n_queries; q += V::kQueries)
        score_queries<V, V::kQueries>(tile, dim, queries + q * dim, scales, count, out + q * stride,
                                      stride);
    for (; q < n_queries; ++q)
        score_queries<V, 1>(tile, dim, queries + q * dim, scales, count, out + q * stride, stride);
}

template <class V>
void score_tile(const ScoresTask& task, const CodeTile& in, const float* queries,
                std::int64_t n_queries, float* out, std::int64_t stride, float* scratch) {
    const int dim = task.shape.dim;
    float *tile = scratch, *words = tile + tile_floats(dim);
    alignas(64) float scales[kLanes], ones[kLanes];
    for (float& one : ones) one = 1;
    load_codes<V>(task.shape.layout, task.shape.planes, in, words);
    load_scales(in, scales);
    expand<V>(task.shape, task.book, words, ones, tile);
    score_all<V>(tile, dim, queries, n_queries, scales, in.count, out, stride);
}

}  // namespace
}  // namespace sixfold::vectors
