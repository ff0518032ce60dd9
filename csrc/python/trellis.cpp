// Thin, as vectors.cpp: kernels/trellis/cpu.py has checked everything.
#include "vectors/trellis.h"

#include <cmath>

#include "isa/dispatch.h"
#include "python/bindings.h"
#include "python/released.h"

namespace nb = nanobind;

namespace sixfold {
namespace vectors {
namespace {

// (dim, bits of a state, twice the bits of a coordinate, layout, codewords)
using PathGroup = std::tuple<int, int, int, int, Address>;
// (codewords, half an interval, intervals a deviation, intervals, margin of the seam)
using GridGroup = std::tuple<Address, int, float, int, int>;
using SearchGroup = std::tuple<PathGroup, GridGroup>;

PathShape shape_of(const PathGroup& group) {
    const auto [dim, window, half_bits, layout, codewords] = group;
    return {dim, window, half_bits, static_cast<Layout>(layout)};
}

Codewords codewords_of(const PathGroup& group) {
    return {at<const float>(std::get<4>(group)), shape_of(group)};
}

SearchGrid grid_of(const GridGroup& group) {
    const auto [words, half, rate, intervals, margin] = group;
    return {at<const std::int16_t>(words), half, rate, intervals, margin};
}

Rows rows_of(Address rows, Address scales) {
    return {at<std::uint8_t>(rows), at<std::uint16_t>(scales)};
}

PathEncodeTask encode_task(const RotationGroup& rotation, const SearchGroup& search, int scale) {
    const Rotation r = rotation_of(rotation);
    const auto& [path, grid] = search;
    return {r,
            shape_of(path),
            codewords_of(path),
            grid_of(grid),
            static_cast<ScaleKind>(scale),
            std::pow(r.dim, 0.5 - r.rounds / 2.0),
            std::pow(r.dim, -0.5)};
}

PathDecodeTask decode_task(const RotationGroup& rotation, const PathGroup& path) {
    const Rotation r = rotation_of(rotation);
    return {r, shape_of(path), codewords_of(path), shrink_of(r)};
}

void encode_rows(const RotationGroup& rotation, const SearchGroup& search, int scale, Address x,
                 int dtype, Address rows, Address scales, Count n, int threads) {
    const TrellisKernels& table = kernels().trellis;
    released([&] {
        const PathEncodeTask task = encode_task(rotation, search, scale);
        encode_paths(table, task, array_of(x, n, task.shape.dim, dtype), rows_of(rows, scales),
                     threads);
    });
}

void decode_rows(const RotationGroup& rotation, const PathGroup& path, Address rows,
                 Address scales, Address out, Count n, int threads) {
    const TrellisKernels& table = kernels().trellis;
    released([&] {
        const PathDecodeTask task = decode_task(rotation, path);
        decode_paths(table, task, rows_of(rows, scales),
                     array_of(out, n, task.shape.dim, static_cast<int>(Dtype::f32)), threads);
    });
}

void encode_into_pages(const RotationGroup& rotation, const SearchGroup& search, int scale,
                       const AffineGroup& maps, const PagedGroup& x, const PageGroup& pages,
                       int threads) {
    const TrellisKernels& table = kernels().trellis;
    released([&] {
        encode_path_pages(table, encode_task(rotation, search, scale), affine_of(maps),
                          paged_of(x), pages_of(pages), threads);
    });
}

void decode_from_pages(const RotationGroup& rotation, const PathGroup& path,
                       const AffineGroup& maps, const PageGroup& pages, const PagedGroup& out,
                       int threads) {
    const TrellisKernels& table = kernels().trellis;
    released([&] {
        decode_path_pages(table, decode_task(rotation, path), affine_of(maps), pages_of(pages),
                          paged_of(out), threads);
    });
}

void score_rows(const PathGroup& path, Address rows, Address scales, Count batch, Count n,
                Address queries, Count n_queries, Address out, int threads) {
    const TrellisKernels& table = kernels().trellis;
    released([&] {
        score_paths(table, {shape_of(path), codewords_of(path)}, rows_of(rows, scales), batch, n,
                    at<const float>(queries), n_queries, at<float>(out), threads);
    });
}

}  // namespace
}  // namespace vectors

void bind_trellis(nb::module_& m) {
    using namespace vectors;
    m.def("encode_paths", &encode_rows);
    m.def("decode_paths", &decode_rows);
    m.def("score_paths", &score_rows);
    m.def("encode_path_pages", &encode_into_pages);
    m.def("decode_path_pages", &decode_from_pages);
}

}  // namespace sixfold
