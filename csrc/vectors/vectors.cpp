#include "vectors/vectors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "vectors/drivers.h"

namespace sixfold::vectors {
namespace {

std::int64_t words_scratch(int dim) { return tile_floats(dim / 4 + 3); }

CodeTile tile_of(const Rows& rows, int row_bytes, std::int64_t first, int count) {
    return {rows.codes + first * row_bytes, row_bytes, count, 0, rows.scales + first};
}

std::int64_t encode_scratch(const EncodeTask& task) {
    const int dim = task.shape.dim;
    return tile_floats(dim) + words_scratch(dim) + tile_floats(dim + 32) +
           std::max(2 * tile_floats(dim), rotation_scratch(task.rotation));
}

std::int64_t decode_scratch(const DecodeTask& task) {
    const int dim = task.shape.dim;
    return tile_floats(dim) + std::max(words_scratch(dim), rotation_scratch(task.rotation));
}

}  // namespace

CodeShape::CodeShape(int dim, int symbol_bits, bool paired, Layout layout)
    : dim(dim), symbol_bits(symbol_bits), paired(paired), layout(layout),
      symbols(symbols_of(dim, 1 + paired)), planes(planes_of(symbols, symbol_bits)),
      symbol_rows(symbols) {
    for (int p = 0; p < planes.count; ++p)
        symbol_rows = std::max(symbol_rows, planes.bytes[p] * 8 / planes.width[p]);
}

Codebook::Codebook(const float* table, const CodeShape& shape) {
    const int levels = 1 << shape.symbol_bits;
    std::fill(std::begin(thresholds), std::end(thresholds),
              std::numeric_limits<float>::infinity());
    std::fill(std::begin(below), std::end(below), std::uint8_t{0});
    if (shape.paired) {
        for (int i = 0; i < 2 * levels; ++i) points[i % 2][i / 2] = table[i];
        return;
    }
    std::copy(table, table + levels, points[0]);
    float boundaries[kMaxLevels];
    for (int i = 0; i + 1 < levels; ++i) boundaries[i] = (table[i + 1] + table[i]) / 2;
    fill_splits(boundaries, shape.symbol_bits);
    fill_grid(boundaries, levels - 1, grid_cells(shape.symbol_bits));
}

void Codebook::fill_splits(const float* boundaries, int bits) {
    for (int level = 0; level < bits; ++level)
        for (int path = 0; path < 1 << level; ++path) {
            const int middle = ((2 * path + 1) << (bits - 1 - level)) - 1;
            splits[splits_at(level) + path] = boundaries[middle];
        }
}

// The cell of u is monotone in u, rounding included: boundaries of cells before u's are below u,
// those of cells after are not, and only its own is left to compare.
void Codebook::fill_grid(const float* boundaries, int count, int cells) {
    reach = std::max(std::abs(boundaries[0]), std::abs(boundaries[count - 1]));
    if (!(reach > 0)) reach = 1;
    cells_a_unit = static_cast<float>(cells / 2 - 1) / reach;
    // In [2^23, 2^24) the last bit of a float32 counts ones.
    centre = static_cast<float>(0xc00000 + cells / 2);
    int counts[kMaxCells] = {};
    uniform = std::isfinite(cells_a_unit);
    for (int i = 0; i < count && uniform; ++i) {
        const float value = std::fma(boundaries[i], cells_a_unit, centre);
        std::uint32_t pattern;
        std::memcpy(&pattern, &value, sizeof pattern);
        const std::uint32_t cell = pattern % cells;
        thresholds[cell] = boundaries[i];
        uniform = ++counts[cell] == 1;
    }
    for (int cell = 1; cell < cells; ++cell)
        below[cell] = static_cast<std::uint8_t>(below[cell - 1] + counts[cell - 1]);
}

std::int64_t rotate_scratch(const Rotation& rotation) {
    return tile_floats(rotation.dim) + rotation_scratch(rotation);
}

void rotate(const VectorKernels& kernels, const Rotation& rotation, bool inverse, float shrink,
            const VectorArray& in, const VectorArray& out, int threads) {
    run_tiles(in.count, rotation.dim, rotate_scratch(rotation), threads,
              [&](std::int64_t first, int count, float* scratch) {
                  kernels.rotate(rotation, inverse, shrink, tile_of(in, first, count),
                                 tile_of(out, first, count), scratch);
              });
}

void encode(const VectorKernels& kernels, const EncodeTask& task, const VectorArray& in,
            const Rows& out, int threads) {
    run_tiles(in.count, task.shape.dim, encode_scratch(task), threads,
              [&](std::int64_t first, int count, float* scratch) {
                  kernels.encode(task, {}, tile_of(in, first, count),
                                 tile_of(out, task.shape.planes.row_bytes, first, count), scratch);
              });
}

void decode(const VectorKernels& kernels, const DecodeTask& task, const Rows& in,
            const VectorArray& out, int threads) {
    run_tiles(out.count, task.shape.dim, decode_scratch(task), threads,
              [&](std::int64_t first, int count, float* scratch) {
                  kernels.decode(task, {}, tile_of(in, task.shape.planes.row_bytes, first, count),
                                 tile_of(out, first, count), scratch);
              });
}

void encode_pages(const VectorKernels& kernels, const EncodeTask& task, const Affine& maps,
                  const PagedVectors& in, const Pages& out, int threads) {
    run_page_tiles(task.shape.dim, maps, out, in, encode_scratch(task), threads,
                   [&](const Affine& map, const CodeTile& codes, const VectorTile& vectors,
                       float* scratch) { kernels.encode(task, map, vectors, codes, scratch); });
}

void decode_pages(const VectorKernels& kernels, const DecodeTask& task, const Affine& maps,
                  const Pages& in, const PagedVectors& out, int threads) {
    run_page_tiles(task.shape.dim, maps, in, out, decode_scratch(task), threads,
                   [&](const Affine& map, const CodeTile& codes, const VectorTile& vectors,
                       float* scratch) { kernels.decode(task, map, codes, vectors, scratch); });
}

void scores(const VectorKernels& kernels, const ScoresTask& task, const Rows& in,
            std::int64_t batch, std::int64_t n, const float* queries, std::int64_t n_queries,
            float* out, int threads) {
    const int dim = task.shape.dim;
    run_scores(batch, n, n_queries, dim, tile_floats(dim) + words_scratch(dim), threads,
               [&](std::int64_t row, std::int64_t first, int count, float* scratch) {
                   kernels.scores(task,
                                  tile_of(in, task.shape.planes.row_bytes, row * n + first, count),
                                  queries + row * n_queries * dim, n_queries,
                                  out + row * n_queries * n + first, n, scratch);
               });
}

void check_slots(const Pages& pages, std::int64_t count) {
    for (std::int64_t i = 0; i < pages.batch * pages.pages; ++i)
        if (pages.slots[i] < 0 || pages.slots[i] >= count)
            throw std::invalid_argument(
                "slots: expected 0 to " + std::to_string(count - 1) + ", got " +
                std::to_string(pages.slots[i]) + " for page " + std::to_string(i % pages.pages) +
                " of sequence " + std::to_string(i / pages.pages) +
                "; pass the table of the memory that the pages are in");
}

}  // namespace sixfold::vectors
