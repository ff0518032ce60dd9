// Every instruction set's vector kernels against the portable ones, bit for bit, on random shapes,
// widths and dtypes. Buffers end where their data does, for a sanitizer to see what lies beyond.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "isa/dispatch.h"
#include "vectors/vectors.h"

using namespace sixfold;
using namespace sixfold::vectors;

namespace {

using Bytes = std::vector<std::uint8_t>;
using Floats = std::vector<float>;

std::mt19937 generator(1);

int below(int n) { return static_cast<int>(generator() % n); }

float normal() { return std::normal_distribution<float>()(generator); }

Floats normals(std::int64_t n, float scale = 1) {
    Floats x(n);
    for (float& value : x) value = normal() * scale;
    return x;
}

template <class T>
T* in(Bytes& bytes) {
    return reinterpret_cast<T*>(bytes.data());
}

constexpr int kHeads = 2, kSlots = 3;
const std::int64_t kSlotOfPage[] = {2, 0};

// Random arguments, and what one table of kernels makes of them.
struct Case {
    int dim = 0, order = 1, rounds = 3, symbol_bits = 1 + below(8), n = 1 + below(70);
    int queries = below(7), threads = 1 + below(3);
    bool paired = (symbol_bits == 5 || symbol_bits == 7) && below(2);
    Layout layout = below(2) ? Layout::key : Layout::value;
    ScaleKind scale = static_cast<ScaleKind>(below(3));
    Dtype dtype = static_cast<Dtype>(below(3));
    Floats turns, factor, points, mean, channel_scale, asked;
    Bytes vectors, paged;

    Case();
    Bytes random_vectors(int count) const;
    std::vector<Bytes> run(const VectorKernels& kernels) const;
    bool run_and_compare(const Kernels& table) const;
};

Case::Case() {
    static const int orders[] = {1, 1, 1, 4, 12, 20, 28};
    order = orders[below(std::size(orders))];
    dim = order << (order == 1 ? 1 + below(8) : below(5));
    if (below(4) == 0) {
        rounds = 0;
        dim = order = 1 + below(140);
    }
    turns = normals(rounds * dim);
    factor = normals(order * order);
    if (rounds)
        for (float& f : factor) f = std::copysign(1.0f, f);
    // Ascending, now and then with equal levels; pairs may be anything.
    points = normals((1 << symbol_bits) * (paired ? 2 : 1));
    if (!paired) std::sort(points.begin(), points.end());
    const std::size_t levels = points.size();
    if (!paired && below(8))  // evenly spaced, as the search by cells wants them
        for (std::size_t i = 0; i < levels; ++i) points[i] = (2.0f * i + 1) / levels - 1;
    if (below(4) == 0) points[0] = points[1];
    mean = normals(kHeads * dim);
    channel_scale = normals(kHeads * dim);
    asked = normals(queries * dim);
    vectors = random_vectors(n);
    paged = random_vectors(2 * kHeads * kPageTokens);
}

Bytes Case::random_vectors(int count) const {
    const int size = dtype == Dtype::f32 ? 4 : 2;
    Bytes bytes(static_cast<std::size_t>(count) * dim * size);
    for (int i = 0; i < count * dim; ++i) {
        const int kind = i / dim % 16;
        float x = normal() * std::exp2(static_cast<float>(4 * kind - 30));
        if (kind == 0) x = 0;
        if (kind == 1 && i % 3 == 0) x = INFINITY;
        std::uint32_t pattern;
        std::memcpy(&pattern, &x, 4);
        // The upper half of a float32 is a bfloat16, and some half or other.
        if (size == 2) pattern >>= 16;
        std::memcpy(&bytes[static_cast<std::size_t>(i) * size], &pattern, size);
    }
    return bytes;
}

std::vector<Bytes> Case::run(const VectorKernels& kernels) const {
    Bytes x = vectors, x_paged = paged;
    const Rotation rotation{dim, order, rounds, turns.data(), factor.data()};
    const CodeShape shape(dim, symbol_bits, paired, Layout::rows);
    const CodeShape page_shape(dim, symbol_bits, paired, layout);
    const Codebook book(points.data(), shape);
    const double stretch = std::pow(dim, 0.5 - rounds / 2.0), unit = std::pow(dim, -0.5);
    const auto shrink = static_cast<float>(std::pow(dim, -rounds / 2.0));
    const std::int64_t size = dtype == Dtype::f32 ? 4 : 2, vector = dim * size;

    Bytes rotated(n * dim * 4), back(n * dim * 4), decoded(n * dim * 4), products(n * queries * 4);
    Bytes rows(n * shape.planes.row_bytes), scales(n * 2), decoded_pages(x_paged.size());
    Bytes pages(kSlots * kHeads * kPageTokens * shape.planes.row_bytes);
    Bytes page_scales(kSlots * kHeads * kPageTokens * 2);

    const VectorArray from{in<char>(x), n, vector, dtype};
    const auto floats = [&](Bytes& to) {
        return VectorArray{in<char>(to), n, dim * 4, Dtype::f32};
    };
    rotate(kernels, rotation, false, shrink, from, floats(rotated), threads);
    rotate(kernels, rotation, true, shrink, from, floats(back), threads);

    const Rows codes{rows.data(), in<std::uint16_t>(scales)};
    encode(kernels, {rotation, shape, book, scale, stretch, unit}, from, codes, threads);
    decode(kernels, {rotation, shape, book, shrink}, codes, floats(decoded), threads);
    scores(kernels, {shape, book}, codes, 1, n, asked.data(), queries, in<float>(products),
           threads);

    // [1, tokens, heads, dim] in memory, as models have them.
    const auto page_view = [&](Bytes& of) {
        return PagedVectors{in<char>(of), 0, vector, kHeads * vector, dtype};
    };
    const Affine maps{below(2) ? mean.data() : nullptr, below(2) ? channel_scale.data() : nullptr};
    const std::int64_t page = kPageTokens * shape.planes.row_bytes;
    const Pages table{{pages.data(), kHeads * page, page},
                      {in<std::uint16_t>(page_scales), kHeads * kPageTokens,
                       kPageTokens},
                      kSlotOfPage, 1, 2, kHeads};
    encode_pages(kernels, {rotation, page_shape, book, scale, stretch, unit}, maps,
                 page_view(x_paged), table, threads);
    decode_pages(kernels, {rotation, page_shape, book, shrink}, maps, table,
                 page_view(decoded_pages), threads);
    return {rotated, back, rows, scales, decoded, pages, page_scales, decoded_pages, products};
}

// Fused products of scores may round otherwise; which NaN a sum gives is the processor's choice.
bool same(const Bytes& a, const Bytes& b, bool floats, float tolerance) {
    if (!floats) return a == b;
    for (std::size_t i = 0; i < a.size(); i += 4) {
        float x, y;
        std::memcpy(&x, &a[i], 4);
        std::memcpy(&y, &b[i], 4);
        const bool equal = tolerance == 0 ? std::memcmp(&x, &y, 4) == 0
                                          : !(std::abs(x - y) > tolerance * (1 + std::abs(y)));
        if (!equal && !(std::isnan(x) && std::isnan(y))) return false;
    }
    return true;
}

bool Case::run_and_compare(const Kernels& table) const {
    static const char* names[] = {"rotate", "inverse", "codes", "scales", "decode", "pages",
                                  "page scales", "decoded pages", "scores"};
    const std::mt19937 before = generator;
    const std::vector<Bytes> expected = run(portable_kernels().vectors);
    generator = before;
    const std::vector<Bytes> got = run(table.vectors);
    for (std::size_t i = 0; i < got.size(); ++i) {
        const std::string name = names[i];
        const bool floats = name == "rotate" || name == "inverse" || name == "decode" ||
                            name == "scores" || (name == "decoded pages" && dtype == Dtype::f32);
        if (same(got[i], expected[i], floats, name == "scores" ? 1e-3f : 0)) continue;
        std::printf("%s, %s: dim %d, order %d, rounds %d, bits %d, paired %d, n %d, dtype %d\n",
                    table.isa, names[i], dim, order, rounds, symbol_bits, paired, n,
                    static_cast<int>(dtype));
        return false;
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::stoi(argv[1]) : 300;
    int failed = 0;
    for (const Kernels* table : available_kernels()) {
        generator.seed(1);
        for (int i = 0; i < cases; ++i) failed += !Case().run_and_compare(*table);
        std::printf("%s: %d cases\n", table->isa, cases);
    }
    return failed != 0;
}
