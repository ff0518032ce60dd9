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

// How a side is coded; half_bits: of a trellis, else 0.
struct Kind {
    int symbol_bits, axes, half_bits;
};

struct Side : Kind {
    int dim;
    bool values;
    std::vector<float> centroids;
    std::vector<std::uint8_t> pages;
    std::vector<std::uint16_t> scales;
    std::int64_t page_bytes;

    Side(int dim_, const Kind& kind, bool values_, std::int64_t pages_)
        : Kind(kind), dim(dim_), values(values_) {
        // About evenly spread, in some order: no codebook has most of its points near zero.
        std::uniform_real_distribution<float> jitter(0, 1);
        const int count = axes << symbol_bits;
        for (int i = 0; i < count; ++i)
            centroids.push_back(5 * ((7 * i % count) + jitter(random_bits)) / count - 2.5f);
        // States of opposite bits have opposite codewords.
        for (int i = 0; half_bits && i < count / 2; ++i)
            centroids[static_cast<std::size_t>(count - 1 - i)] =
                -centroids[static_cast<std::size_t>(i)];
        page_bytes = 0;
        for (int width : widths()) page_bytes += kPageTokens * plane_bytes(width);
        pages.resize(static_cast<std::size_t>(pages_ * page_bytes));
        for (auto& byte : pages) byte = static_cast<std::uint8_t>(random_bits());
        // Zeros behind a path.
        for (std::int64_t row = 0; half_bits && row < pages_ * kPageTokens; ++row)
            for (int k = path_bits() / 8; k < plane_bytes(8); ++k)
                pages[static_cast<std::size_t>(row / kPageTokens * page_bytes +
                                               place(plane_bytes(8), row % kPageTokens, k))] = 0;
        scales.resize(static_cast<std::size_t>(pages_ * kPageTokens));
        // Half floats 0.5 to 2.
        for (auto& scale : scales) scale = static_cast<std::uint16_t>(0x3800 + random_bits() % 0x800);
    }
    int symbols() const { return (dim + axes - 1) / axes; }
    int path_bits() const { return dim * half_bits / 2; }
    int plane_bytes(int width) const {
        return ((half_bits ? path_bits() : symbols() * width) + 31) / 32 * 4;
    }
    std::vector<int> widths() const {
        if (half_bits) return {8};
        const std::vector<int> planes[] = {{}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};
        return planes[symbol_bits];
    }
    // Where byte k of token t lies in a plane.
    std::int64_t place(int bytes, std::int64_t t, int k) const {
        return values ? t / 4 * 4 * bytes + k * 4 + t % 4
                      : t / 16 * 16 * bytes + k / 4 * 64 + t % 16 * 4 + k % 4;
    }
    int state(const std::uint8_t* plane, int t, int d) const {
        int found = 0;
        for (int i = 0; i < symbol_bits; ++i) {
            const int bit = (d * half_bits / 2 + i) % path_bits();
            found |= (plane[place(plane_bytes(8), t, bit / 8)] >> bit % 8 & 1) << i;
        }
        return found;
    }
    double coordinate(std::int64_t page, int t, int d) const {
        const int symbol = axes == 2 ? d % symbols() : d, axis = axes == 2 ? d / symbols() : 0;
        const std::uint8_t* plane = pages.data() + page * page_bytes;
        int index = half_bits ? state(plane, t, d) : 0;
        for (int width : half_bits ? std::vector<int>{} : widths()) {
            const int bytes = plane_bytes(width);
            const std::int64_t at = place(bytes, t, symbol % bytes);
            index = index << width | (plane[at] >> symbol / bytes * width & ((1 << width) - 1));
            plane += kPageTokens * bytes;
        }
        const int scale = scales[static_cast<std::size_t>(page * kPageTokens + t)];
        return centroids[static_cast<std::size_t>(index * axes + axis)] *
               std::ldexp(1024 + (scale & 0x3FF), (scale >> 10) - 25);
    }
    sixfold::PageSide view(bool exact) const {
        return {{dim, symbol_bits, axes, half_bits, values, exact, centroids.data()}, nullptr};
    }
};

// Error of the output of `rows` queries of each head over pages of `lengths` tokens, beside the mean
// norm of the values that they attend.
double error(const sixfold::Kernels& kernels, const Kind& kind, int dim, int heads, int rows,
             std::vector<std::int64_t> lengths, bool exact) {
    const auto pages = static_cast<std::int64_t>(lengths.size());
    const Side keys(dim, kind, false, pages * heads);
    const Side values(dim, kind, true, pages * heads);
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

bool holds(const sixfold::Kernels& kernels, const Kind& kind, int dim, bool exact) {
    const bool narrow = kind.half_bits || kind.axes == 2 || kind.symbol_bits <= 4;
    // Float, 8-bit and 16-bit arithmetic; random centroids fit 8 bits worse than ours.
    const double allowed = exact ? 1e-6 : narrow ? 5e-2 : 1e-3;
    double worst = 0;
    for (int rows : {1, 3, 13})
        for (const auto& lengths : {std::vector<std::int64_t>{64, 17, 64}, {1}})
            worst = std::fmax(worst, error(kernels, kind, dim, 1, rows, lengths, exact));
    // Long enough for several parts, and for pages that raise no maximum.
    if ((dim == 20 || dim == 32) && !exact)
        worst = std::fmax(worst, error(kernels, kind, dim, 3, 1,
                                       std::vector<std::int64_t>(20, 64), exact));
    if (worst <= allowed) return true;
    std::printf("%s: bits %d/%d, half bits %d, dim %d, %s: error %.1e\n", kernels.isa,
                kind.symbol_bits, kind.axes, kind.half_bits, dim, exact ? "exact" : "integer", worst);
    return false;
}

int failures(const sixfold::Kernels& kernels) {
    int failed = 0;
    const Kind codebooks[] = {{1, 1, 0}, {2, 1, 0}, {5, 2, 0}, {3, 1, 0}, {7, 2, 0},
                              {4, 1, 0}, {5, 1, 0}, {6, 1, 0}, {7, 1, 0}, {8, 1, 0}};
    for (const Kind& kind : codebooks)
        for (bool exact : {true, false})
            for (int dim : {1, 20, 33, 128}) failed += !holds(kernels, kind, dim, exact);
    const Kind trellises[] = {{7, 1, 2}, {7, 1, 4}, {7, 1, 5}, {7, 1, 6}, {7, 1, 8}};
    for (const Kind& kind : trellises)
        for (bool exact : {true, false})
            for (int dim : {32, 48, 128}) failed += !holds(kernels, kind, dim, exact);
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
