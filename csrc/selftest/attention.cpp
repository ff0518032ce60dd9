// Attention of every instruction set against plain double arithmetic by docs/format.md: for where
// Python does not run, cross-compiled under qemu, or with sanitizers (selftest/CMakeLists.txt).
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "isa/dispatch.h"

namespace {

using sixfold::kPageTokens;
std::mt19937 random_bits(1);

struct Side {
    int dim, symbol_bits, axes;
    bool values;
    std::vector<float> centroids;
    std::vector<std::uint8_t> pages;
    std::vector<std::uint16_t> scales;
    std::int64_t page_bytes;

    Side(int dim_, int symbol_bits_, int axes_, bool values_, std::int64_t pages_)
        : dim(dim_), symbol_bits(symbol_bits_), axes(axes_), values(values_) {
        // About evenly spread, in some order: no codebook has most of its points near zero.
        std::uniform_real_distribution<float> jitter(0, 1);
        const int count = axes << symbol_bits;
        for (int i = 0; i < count; ++i)
            centroids.push_back(5 * ((7 * i % count) + jitter(random_bits)) / count - 2.5f);
        page_bytes = 0;
        for (int width : widths()) page_bytes += kPageTokens * plane_bytes(width);
        pages.resize(static_cast<std::size_t>(pages_ * page_bytes));
        for (auto& byte : pages) byte = static_cast<std::uint8_t>(random_bits());
        scales.resize(static_cast<std::size_t>(pages_ * kPageTokens));
        // Half floats 0.5 to 2.
        for (auto& scale : scales) scale = static_cast<std::uint16_t>(0x3800 + random_bits() % 0x800);
    }
    int symbols() const { return (dim + axes - 1) / axes; }
    int plane_bytes(int width) const { return (symbols() * width + 31) / 32 * 4; }
    std::vector<int> widths() const {
        const std::vector<int> planes[] = {{}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};
        return planes[symbol_bits];
    }
    double coordinate(std::int64_t page, int t, int d) const {
        const int symbol = axes == 2 ? d % symbols() : d, axis = axes == 2 ? d / symbols() : 0;
        const std::uint8_t* plane = pages.data() + page * page_bytes;
        int index = 0;
        for (int width : widths()) {
            const int bytes = plane_bytes(width), k = symbol % bytes;
            const int at = values ? t / 4 * 4 * bytes + k * 4 + t % 4
                                  : t / 16 * 16 * bytes + k / 4 * 64 + t % 16 * 4 + k % 4;
            index = index << width | (plane[at] >> symbol / bytes * width & ((1 << width) - 1));
            plane += kPageTokens * bytes;
        }
        const int scale = scales[static_cast<std::size_t>(page * kPageTokens + t)];
        return centroids[static_cast<std::size_t>(index * axes + axis)] *
               std::ldexp(1024 + (scale & 0x3FF), (scale >> 10) - 25);
    }
    sixfold::PageSide view(bool exact) const {
        return {{dim, symbol_bits, axes, 0, values, exact, centroids.data()}, nullptr};
    }
};

// Error of the output of `rows` queries of each head over pages of `lengths` tokens, beside the mean
// norm of the values that they attend.
double error(const sixfold::Kernels& kernels, int symbol_bits, int axes, int dim, int heads, int rows,
             std::vector<std::int64_t> lengths, bool exact) {
    const auto pages = static_cast<std::int64_t>(lengths.size());
    const Side keys(dim, symbol_bits, axes, false, pages * heads);
    const Side values(dim, symbol_bits, axes, true, pages * heads);
    std::vector<std::int64_t> starts(lengths.size()), slots(lengths.size()), table(lengths.size());
    std::vector<std::int64_t> first(static_cast<std::size_t>(rows));
    // The same memory as two pools.
    const std::int64_t half = pages / 2;
    const auto pool = [&](std::int64_t from, std::int64_t count) -> sixfold::PagePool {
        const auto part = [&](const auto& memory, std::int64_t page) {
            return sixfold::PoolTensor{memory.data() + from * heads * page, heads * page, page};
        };
        return {part(keys.pages, keys.page_bytes), part(keys.scales, kPageTokens),
                part(values.pages, values.page_bytes), part(values.scales, kPageTokens), count};
    };
    const sixfold::PagePool pools[] = {pool(0, half), pool(half, pages - half)};
    std::vector<std::int32_t> page_pool(lengths.size());
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        starts[i] = i ? starts[i - 1] + lengths[i - 1] : 0;
        slots[i] = pages - 1 - static_cast<std::int64_t>(i);
        page_pool[i] = slots[i] >= half;
        table[i] = slots[i] - (page_pool[i] ? half : 0);
    }
    const std::int64_t tokens = starts.back() + lengths.back();
    for (int r = 0; r < rows; ++r) first[static_cast<std::size_t>(r)] = r % 3 * 5 % tokens;
    std::normal_distribution<float> normal(0, 1 / std::sqrt(static_cast<float>(dim)));
    std::vector<float> query(static_cast<std::size_t>(heads * rows * dim)), out(query);
    std::vector<float> lse(static_cast<std::size_t>(heads * rows));
    for (float& x : query) x = normal(random_bits);
    sixfold::AttentionTask task{};
    task.batch = 1;
    task.kv_heads = heads;
    task.rows = task.queries = rows;
    task.pages = pages;
    task.pools = pools;
    task.page_pool = page_pool.data();
    task.query = query.data();
    task.keys = keys.view(exact);
    task.values = values.view(exact);
    task.slots = table.data();
    task.starts = starts.data();
    task.lengths = lengths.data();
    task.first_token = first.data();
    task.out = out.data();
    task.lse = lse.data();
    sixfold::check_bounds(task);
    sixfold::attend(kernels.attention, task, 2);
    double wrong = 0, whole = 0;
    for (int row = 0; row < heads * rows; ++row) {
        const auto flat = static_cast<std::size_t>(row * dim);
        std::vector<double> expected(static_cast<std::size_t>(dim));
        double total = 0, size = 0;
        for (std::size_t i = 0; i < lengths.size(); ++i)
            for (int t = 0; t < lengths[i]; ++t) {
                if (starts[i] + t < first[static_cast<std::size_t>(row % rows)]) continue;
                const std::int64_t at = slots[i] * heads + row / rows;
                double logit = 0;
                for (int d = 0; d < dim; ++d)
                    logit += query[flat + static_cast<std::size_t>(d)] * keys.coordinate(at, t, d);
                total += std::exp(logit);
                double square = 0;
                for (int d = 0; d < dim; ++d) {
                    const double x = values.coordinate(at, t, d);
                    expected[static_cast<std::size_t>(d)] += std::exp(logit) * x;
                    square += x * x;
                }
                size += std::exp(logit) * std::sqrt(square);
            }
        for (int d = 0; d < dim; ++d) {
            const auto i = static_cast<std::size_t>(d);
            wrong += std::pow(out[flat + i] - expected[i] / total, 2);
        }
        whole += std::pow(size / total, 2);
    }
    return std::sqrt(wrong / whole);
}

int failures(const sixfold::Kernels& kernels) {
    int failed = 0;
    const int kinds[][2] = {{1, 1}, {2, 1}, {5, 2}, {3, 1}, {7, 2}, {4, 1}, {5, 1}, {6, 1}, {7, 1},
                            {8, 1}};
    for (auto [bits, axes] : kinds)
        for (bool exact : {true, false})
            for (int dim : {1, 20, 33, 128}) {
                const bool narrow = axes == 2 || bits <= 4;
                // Float, 8-bit and 16-bit arithmetic; random centroids fit 8 bits worse than ours.
                const double allowed = exact ? 1e-6 : narrow ? 5e-2 : 1e-3;
                double worst = 0;
                for (int rows : {1, 3, 13})
                    for (const auto& lengths : {std::vector<std::int64_t>{64, 17, 64}, {1}})
                        worst = std::fmax(
                            worst, error(kernels, bits, axes, dim, 1, rows, lengths, exact));
                // Long enough for several parts, and for pages that raise no maximum.
                if (dim == 20 && !exact)
                    worst = std::fmax(worst, error(kernels, bits, axes, dim, 3, 1,
                                                   std::vector<std::int64_t>(20, 64), exact));
                const bool good = worst <= allowed;
                failed += !good;
                if (!good)
                    std::printf("%s: bits %d/%d, dim %d, %s: error %.1e\n", kernels.isa, bits, axes, dim,
                                exact ? "exact" : "integer", worst);
            }
    return failed;
}

}  // namespace

int main() {
    int failed = 0;
    for (const sixfold::Kernels* kernels : sixfold::available_kernels()) {
        random_bits.seed(1);
        failed += failures(*kernels);
        std::printf("%s: done\n", kernels->isa);
    }
    return failed != 0;
}
