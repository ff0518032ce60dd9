// The highest scores of every instruction set against plain double arithmetic by docs/format.md.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string_view>
#include <vector>

#include "isa/dispatch.h"

namespace {

using sixfold::kPageTokens;
std::mt19937 random_bits(1);

struct Vectors {
    int dim, bits;
    std::int64_t pages;
    std::vector<float> centroids, offsets;
    std::vector<std::uint8_t> codes;
    std::vector<std::uint16_t> scales;
    std::vector<std::uint64_t> allowed;

    Vectors(int dim_, int bits_, std::int64_t pages_) : dim(dim_), bits(bits_), pages(pages_) {
        const int levels = 1 << bits;
        for (int i = 0; i < levels; ++i)
            centroids.push_back(5 * (static_cast<float>(i) + 0.5f) / static_cast<float>(levels) - 2.5f);
        codes.resize(static_cast<std::size_t>(pages * page_bytes()));
        for (auto& byte : codes) byte = static_cast<std::uint8_t>(random_bits());
        scales.resize(static_cast<std::size_t>(pages * kPageTokens));
        // Half floats 0.5 to 2.
        for (auto& scale : scales) scale = static_cast<std::uint16_t>(0x3800 + random_bits() % 0x800);
        std::normal_distribution<float> normal;
        for (std::size_t i = 0; i < scales.size(); ++i) offsets.push_back(normal(random_bits));
        for (std::int64_t p = 0; p < pages; ++p)
            allowed.push_back(p % 4 == 3 ? 0 : std::uint64_t{random_bits()} << 32 | random_bits());
    }
    sixfold::Planes planes() const { return sixfold::planes_of(dim, bits); }
    std::int64_t page_bytes() const { return kPageTokens * planes().row_bytes; }
    double coordinate(std::int64_t page, int t, int d) const {
        const sixfold::Planes all = planes();
        const std::uint8_t* plane = codes.data() + page * page_bytes();
        int index = 0;
        for (int p = 0; p < all.count; ++p) {
            const int bytes = all.bytes[p], width = all.width[p], k = d % bytes;
            const int place = t / 16 * 16 * bytes + k / 4 * 64 + t % 16 * 4 + k % 4;
            index = index << width | (plane[place] >> d / bytes * width & ((1 << width) - 1));
            plane += kPageTokens * bytes;
        }
        return centroids[static_cast<std::size_t>(index)];
    }
    double scale(std::int64_t slot) const {
        const std::uint16_t stored = scales[static_cast<std::size_t>(slot)];
        return std::ldexp(1024 + (stored & 0x3ff), (stored >> 10) - 25);
    }
    bool counts(std::int64_t slot) const {
        return allowed[static_cast<std::size_t>(slot / kPageTokens)] >> slot % kPageTokens & 1;
    }
};

// Vectors of one part, or of several, which have as many pages each; offsets and what counts are the
// first one's.
using Parts = std::vector<Vectors>;

int dim_of(const Parts& parts) {
    int dim = 0;
    for (const Vectors& part : parts) dim += part.dim;
    return dim;
}

struct Found {
    std::vector<float> scores;
    std::vector<std::int64_t> slots;
};

Found find(const sixfold::Kernels& kernels, const Parts& parts, const std::vector<float>& query,
           std::int64_t best, int threads, const sixfold::ManyKernel* many) {
    const Vectors& vectors = parts.front();
    const auto queries = std::ssize(query) / dim_of(parts);
    const std::vector<float> weight(static_cast<std::size_t>(queries), 0.5f);
    const std::vector<float> constant(static_cast<std::size_t>(queries), 0.25f);
    Found found{std::vector<float>(static_cast<std::size_t>(queries * best)),
                std::vector<std::int64_t>(static_cast<std::size_t>(queries * best))};
    sixfold::NearestTask task{};
    task.queries = queries;
    task.pages = vectors.pages;
    task.best = best;
    task.query = query.data();
    task.weight = weight.data();
    task.constant = constant.data();
    for (const Vectors& part : parts)
        task.parts.push_back({{part.dim, part.bits, 1, 0, false, false, part.centroids.data()},
                              nullptr,
                              part.codes.data(),
                              part.scales.data()});
    task.offset_kind = sixfold::OffsetKind::single;
    task.offsets = vectors.offsets.data();
    task.allowed = vectors.allowed.data();
    task.scores = found.scores.data();
    task.slots = found.slots.data();
    task.many = many;
    sixfold::nearest(kernels.nearest, task, threads);
    return found;
}

// The largest difference of a score, relative to the length of what was multiplied; 1 if the order or
// the choice is wrong by more than that.
double error(const Parts& parts, const std::vector<float>& query, const Found& found,
             std::int64_t best, double allowed) {
    double worst = 0;
    const Vectors& vectors = parts.front();
    const auto dim = static_cast<std::size_t>(dim_of(parts));
    for (std::size_t q = 0; q < query.size() / dim; ++q) {
        std::vector<double> exact;
        double length = 0;
        for (std::size_t d = 0; d < dim; ++d) length += std::pow(query[q * dim + d], 2);
        length = std::sqrt(length * static_cast<double>(dim)) * 3;
        for (std::int64_t slot = 0; slot < vectors.pages * kPageTokens; ++slot) {
            double sum = 0;
            const float* asked = query.data() + q * dim;
            for (const Vectors& part : parts) {
                double product = 0;
                for (int d = 0; d < part.dim; ++d)
                    product += asked[d] * part.coordinate(slot / kPageTokens,
                                                          static_cast<int>(slot % kPageTokens), d);
                sum += product * part.scale(slot);
                asked += part.dim;
            }
            const double offset = vectors.offsets[static_cast<std::size_t>(slot)];
            exact.push_back(vectors.counts(slot) ? sum + offset / 2 + 0.25
                                                 : -std::numeric_limits<double>::infinity());
        }
        double last = std::numeric_limits<double>::infinity();
        std::vector<double> left = exact;
        for (std::int64_t i = 0; i < best; ++i) {
            const auto at = q * static_cast<std::size_t>(best) + static_cast<std::size_t>(i);
            if (found.slots[at] < 0) {
                if (std::ranges::any_of(left, [](double x) { return std::isfinite(x); })) return 1;
                break;
            }
            const auto slot = static_cast<std::size_t>(found.slots[at]);
            worst = std::fmax(worst, std::fabs(found.scores[at] - exact[slot]) / length);
            if (!(found.scores[at] <= last)) return 1;
            last = found.scores[at];
            left[slot] = -std::numeric_limits<double>::infinity();
        }
        if (*std::ranges::max_element(left) > last + 2 * allowed * length && last > -1e30) return 1;
    }
    return worst;
}

bool holds(const sixfold::Kernels& kernels, const Parts& vectors, double allowed) {
    const int bits = vectors.front().bits, dim = dim_of(vectors);
    const bool tiles = std::string_view(kernels.isa) == "avx512";
    std::normal_distribution<float> normal;
    for (int queries : {1, 5, 21}) {
        std::vector<float> query(static_cast<std::size_t>(queries * dim));
        for (float& x : query) x = normal(random_bits);
        for (std::int64_t best : {1, 10, 700}) {
            const Found found = find(kernels, vectors, query, best, 1, nullptr);
            const double wrong = error(vectors, query, found, best, allowed);
            bool same = true;
            for (int threads : {1, 2, 3})
                for (const sixfold::ManyKernel* many :
                     {static_cast<const sixfold::ManyKernel*>(nullptr), sixfold::many_kernel()}) {
                    if (many && !tiles) continue;
                    const Found again = find(kernels, vectors, query, best, threads, many);
                    same = same && again.slots == found.slots && again.scores == found.scores;
                }
            if (wrong <= allowed && same) continue;
            std::printf("%s: bits %d, dim %d, %d queries, best %d: error %.1e, %s\n", kernels.isa, bits,
                        dim, queries, static_cast<int>(best), wrong, same ? "" : "not the same again");
            return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    int failed = 0;
    for (const sixfold::Kernels* kernels : sixfold::available_kernels()) {
        random_bits.seed(1);
        for (int bits : {1, 2, 3, 4, 8})
            for (int dim : {1, 20, 72, 128})
                failed += !holds(*kernels, {Vectors(dim, bits, 9)}, bits <= 4 ? 5e-3 : 1e-4);
        failed += !holds(*kernels, {Vectors(32, 8, 9), Vectors(64, 4, 9), Vectors(20, 1, 9)}, 5e-3);
        failed += !holds(*kernels, {Vectors(24, 2, 9), Vectors(8, 3, 9)}, 5e-3);
        std::printf("%s: done\n", kernels->isa);
    }
    return failed != 0;
}
