#include "vectors/trellis.h"

#include <algorithm>

#include "vectors/drivers.h"

namespace sixfold::vectors {
namespace {

// Coordinates that cost as much to encode as one that is searched for.
constexpr std::int64_t kSearchCost = 4;

CodeTile tile_of(const Rows& rows, const PathShape& shape, std::int64_t first, int count) {
    const int bytes = path_words(shape) * 4;
    return {rows.codes + first * bytes, bytes, count, 0, rows.scales + first};
}

std::int64_t encode_scratch(const PathEncodeTask& task) {
    const PathShape& shape = task.shape;
    const std::int64_t searching = table_floats(shape) + 2 * kept_floats(shape) +
                                   decision_floats(shape, task.grid);
    const std::int64_t dim = shape.dim;
    return kSearched / kLanes * tile_floats(dim) + row_floats(shape) + tile_floats(dim + 32) +
           dim * kSearched / 2 + dim * kSearched / 4 +
           std::max({searching, rotation_scratch(task.rotation), 2 * tile_floats(dim)});
}

std::int64_t decode_scratch(const PathDecodeTask& task) {
    return tile_floats(task.shape.dim) +
           std::max(row_floats(task.shape), rotation_scratch(task.rotation));
}

}  // namespace

Codewords::Codewords(const float* table, const PathShape& shape) {
    std::copy(table, table + states_of(shape), of);
}

void encode_paths(const TrellisKernels& kernels, const PathEncodeTask& task, const VectorArray& in,
                  const Rows& out, int threads) {
    run((in.count + kSearched - 1) / kSearched, kSearchCost * kSearched * task.shape.dim,
        encode_scratch(task), threads, [&](std::int64_t item, float* scratch) {
            const std::int64_t first = item * kSearched;
            const int count = static_cast<int>(std::min<std::int64_t>(kSearched, in.count - first));
            kernels.encode(task, {}, tile_of(in, first, count),
                           tile_of(out, task.shape, first, count), scratch);
        });
}

void decode_paths(const TrellisKernels& kernels, const PathDecodeTask& task, const Rows& in,
                  const VectorArray& out, int threads) {
    run_tiles(out.count, task.shape.dim, decode_scratch(task), threads,
              [&](std::int64_t first, int count, float* scratch) {
                  kernels.decode(task, {}, tile_of(in, task.shape, first, count),
                                 tile_of(out, first, count), scratch);
              });
}

void encode_path_pages(const TrellisKernels& kernels, const PathEncodeTask& task,
                       const Affine& maps, const PagedVectors& in, const Pages& out, int threads) {
    const int dim = task.shape.dim;
    run_pages(dim, maps, out, in, kSearchCost * kSearched * dim, encode_scratch(task), threads,
              [&](const Affine& map, const CodeTile& codes, const VectorTile& vectors,
                  float* scratch) { kernels.encode(task, map, vectors, codes, scratch); });
}

void decode_path_pages(const TrellisKernels& kernels, const PathDecodeTask& task,
                       const Affine& maps, const Pages& in, const PagedVectors& out, int threads) {
    run_page_tiles(task.shape.dim, maps, in, out, decode_scratch(task), threads,
                   [&](const Affine& map, const CodeTile& codes, const VectorTile& vectors,
                       float* scratch) { kernels.decode(task, map, codes, vectors, scratch); });
}

void score_paths(const TrellisKernels& kernels, const PathScoresTask& task, const Rows& in,
                 std::int64_t batch, std::int64_t n, const float* queries, std::int64_t n_queries,
                 float* out, int threads) {
    const int dim = task.shape.dim;
    run_scores(batch, n, n_queries, dim, tile_floats(dim) + row_floats(task.shape), threads,
               [&](std::int64_t row, std::int64_t first, int count, float* scratch) {
                   kernels.scores(task, tile_of(in, task.shape, row * n + first, count),
                                  queries + row * n_queries * dim, n_queries,
                                  out + row * n_queries * n + first, n, scratch);
               });
}

}  // namespace sixfold::vectors
