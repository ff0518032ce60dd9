// Every instruction set's trellis kernels against the portable ones, bit for bit, on random shapes,
// widths and codebooks. Buffers end where their data does, for a sanitizer to see what lies beyond.
#include "vectors/trellis.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "isa/dispatch.h"

using namespace sixfold;
using namespace sixfold::vectors;

namespace {

using Floats = std::vector<float>;

std::mt19937 generator(1);

int below(int n) { return static_cast<int>(generator() % n); }

Floats normals(std::int64_t n) {
    std::normal_distribution<float> normal;
    Floats x(n);
    for (float& value : x) value = normal(generator);
    return x;
}

constexpr int kHeads = 2, kSlots = 3;
const std::int64_t kSlotOfPage[] = {2, 0};

struct Found {
    std::vector<std::uint32_t> rows;
    std::vector<std::uint16_t> scales;
    Floats decoded, products;
    std::vector<std::uint8_t> pages;
    std::vector<std::uint16_t> page_scales;
    Floats decoded_pages;
};

// Random arguments, and what one table of kernels makes of them.
struct Case {
    PathShape shape;
    int n = 1 + below(140), queries = below(6), threads = 1 + below(3);
    ScaleKind scale = static_cast<ScaleKind>(below(3));
    int half, intervals;
    Layout layout = below(2) ? Layout::key : Layout::value;
    bool mapped = below(2);
    Floats turns, factor{1}, codewords, vectors, asked, paged, mean, channel_scale;
    std::vector<std::int16_t> words;

    Case();
    Rotation rotation() const { return {shape.dim, 1, 3, turns.data(), factor.data()}; }
    PathEncodeTask encode_task(const PathShape& of) const;
    PathDecodeTask decode_task(const PathShape& of) const;
    void run_pages(const TrellisKernels& kernels, Found& found) const;
    Found run(const TrellisKernels& kernels) const;
};

Case::Case() {
    static const int windows[] = {7, 8, 10}, widths[] = {2, 4, 5, 6, 7, 8};
    shape = {4 << below(6), windows[below(3)], widths[below(6)]};
    while (start_of(shape, shape.dim) < shape.window) shape.dim *= 2;
    const int dim = shape.dim, states = states_of(shape);
    turns = normals(3 * dim);
    codewords = normals(states);
    vectors = normals(static_cast<std::int64_t>(n) * dim);
    for (int i = 0; i < dim; ++i) vectors[i] *= n % 3 == 0 ? INFINITY : 0;
    asked = normals(static_cast<std::int64_t>(queries) * dim);
    paged = normals(static_cast<std::int64_t>(2) * kHeads * kPageTokens * dim);
    mean = normals(kHeads * dim);
    channel_scale = normals(kHeads * dim);
    half = 1 + below(is_narrow(shape) ? 127 : 31);
    intervals = is_narrow(shape) ? kIntervals : 1024;
    const int largest = is_narrow(shape) ? 0x3fff : 0x7fff;
    for (int i = 0; i < states / 2; ++i)
        words.insert(words.end(), 2, static_cast<std::int16_t>(below(2 * largest + 1) - largest));
    // States of opposite bits have opposite codewords.
    for (int i = states / 2; i < states; ++i) {
        words.insert(words.end(), 2, static_cast<std::int16_t>(-words[2 * (states - 1 - i)]));
        codewords[i] = -codewords[states - 1 - i];
    }
}

PathEncodeTask Case::encode_task(const PathShape& of) const {
    const int dim = of.dim, margin = (16 * of.window + of.half_bits - 1) / of.half_bits;
    const SearchGrid grid{words.data(), half, static_cast<float>(intervals) / 7, intervals, margin};
    return {rotation(), of, Codewords(codewords.data(), of), grid, scale, 1.0 / dim,
            std::pow(dim, -0.5)};
}

PathDecodeTask Case::decode_task(const PathShape& of) const {
    return {rotation(), of, Codewords(codewords.data(), of),
            static_cast<float>(std::pow(of.dim, -1.5))};
}

// [1, tokens, heads, dim] in memory, as models have them.
void Case::run_pages(const TrellisKernels& kernels, Found& found) const {
    PathShape of = shape;
    of.layout = layout;
    const std::int64_t page = kPageTokens * 4 * path_words(of), vector = of.dim * 4;
    Floats x = paged;
    found.pages.resize(kSlots * kHeads * page);
    found.page_scales.resize(kSlots * kHeads * kPageTokens);
    found.decoded_pages.resize(x.size());
    const auto view = [&](Floats& floats) {
        return PagedVectors{reinterpret_cast<char*>(floats.data()), 0, vector, kHeads * vector,
                            Dtype::f32};
    };
    const Affine maps{mapped ? mean.data() : nullptr, mapped ? channel_scale.data() : nullptr};
    const Pages table{{found.pages.data(), kHeads * page, page},
                      {found.page_scales.data(), kHeads * kPageTokens, kPageTokens},
                      kSlotOfPage, 1, 2, kHeads};
    encode_path_pages(kernels, encode_task(of), maps, view(x), table, threads);
    decode_path_pages(kernels, decode_task(of), maps, table, view(found.decoded_pages), threads);
}

Found Case::run(const TrellisKernels& kernels) const {
    const int dim = shape.dim;
    Floats x = vectors;
    Found found{std::vector<std::uint32_t>(static_cast<std::size_t>(n) * path_words(shape)),
                std::vector<std::uint16_t>(n), Floats(x.size()),
                Floats(static_cast<std::size_t>(n) * queries), {}, {}, {}};
    const Rows rows{reinterpret_cast<std::uint8_t*>(found.rows.data()), found.scales.data()};
    const VectorArray in{reinterpret_cast<char*>(x.data()), n, dim * 4, Dtype::f32};
    const VectorArray out{reinterpret_cast<char*>(found.decoded.data()), n, dim * 4, Dtype::f32};
    encode_paths(kernels, encode_task(shape), in, rows, threads);
    decode_paths(kernels, decode_task(shape), rows, out, threads);
    score_paths(kernels, {shape, Codewords(codewords.data(), shape)}, rows, 1, n, asked.data(),
                queries, found.products.data(), threads);
    run_pages(kernels, found);
    return found;
}

// Fused products of scores may round otherwise; which NaN a product gives is the processor's choice.
bool same(const Floats& a, const Floats& b, float tolerance) {
    for (std::size_t i = 0; i < a.size(); ++i)
        if (std::abs(a[i] - b[i]) > tolerance * (1 + std::abs(b[i])) ||
            std::isnan(a[i]) != std::isnan(b[i]))
            return false;
    return true;
}

bool agrees(const Case& of, const Kernels& table) {
    const Found expected = of.run(portable_kernels().trellis), got = of.run(table.trellis);
    const bool rows = got.rows == expected.rows, scales = got.scales == expected.scales;
    const bool decoded = same(got.decoded, expected.decoded, 0);
    const bool products = same(got.products, expected.products, 1e-3f);
    const bool pages = got.pages == expected.pages && got.page_scales == expected.page_scales &&
                       same(got.decoded_pages, expected.decoded_pages, 0);
    if (rows && scales && decoded && products && pages) return true;
    std::printf("%s: dim %d, window %d, half bits %d, n %d: rows %d, scales %d, decoded %d, "
                "scores %d, pages %d\n",
                table.isa, of.shape.dim, of.shape.window, of.shape.half_bits, of.n, rows, scales,
                decoded, products, pages);
    return false;
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::stoi(argv[1]) : 60;
    int failed = 0;
    for (const Kernels* table : available_kernels()) {
        generator.seed(1);
        for (int i = 0; i < cases; ++i) failed += !agrees(Case(), *table);
        std::printf("%s: %d cases\n", table->isa, cases);
    }
    return failed != 0;
}
