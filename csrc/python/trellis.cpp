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

// (dim, bits of a state, twice the bits of a coordinate, codewords)
using PathGroup = std::tuple<int, int, int, Address>;
// (codewords, half an interval, intervals a deviation, intervals, margin of the seam)
using GridGroup = std::tuple<Address, int, float, int, int>;

PathShape shape_of(const PathGroup& group) {
    const auto [dim, window, half_bits, codewords] = group;
    return {dim, window, half_bits};
}

Codewords codewords_of(const PathGroup& group) {
    return {at<const float>(std::get<3>(group)), shape_of(group)};
}

SearchGrid grid_of(const GridGroup& group) {
    const auto [words, half, rate, intervals, margin] = group;
    return {at<const std::int16_t>(words), half, rate, intervals, margin};
}

Rows rows_of(Address rows, Address scales) {
    return {at<std::uint8_t>(rows), at<std::uint16_t>(scales)};
}

void encode_rows(const RotationGroup& rotation, const PathGroup& path, const GridGroup& grid,
                 int scale, Address x, int dtype, Address rows, Address scales, Count n,
                 int threads) {
    const TrellisKernels& table = kernels().trellis;
    released([&] {
        const Rotation r = rotation_of(rotation);
        const PathEncodeTask task{r,
                                  shape_of(path),
                                  codewords_of(path),
                                  grid_of(grid),
                                  static_cast<ScaleKind>(scale),
                                  std::pow(r.dim, 0.5 - r.rounds / 2.0),
                                  std::pow(r.dim, -0.5)};
        encode_paths(table, task, array_of(x, n, r.dim, dtype), rows_of(rows, scales), threads);
    });
}

void decode_rows(const RotationGroup& rotation, const PathGroup& path, Address rows,
                 Address scales, Address out, Count n, int threads) {
    const TrellisKernels& table = kernels().trellis;
    released([&] {
        const Rotation r = rotation_of(rotation);
        decode_paths(table, {r, shape_of(path), codewords_of(path), shrink_of(r)},
                     rows_of(rows, scales),
                     array_of(out, n, r.dim, static_cast<int>(Dtype::f32)), threads);
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
}

}  // namespace sixfold
