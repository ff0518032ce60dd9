// Thin: addresses and sizes were checked by kernels/*/cpu.py, whose argument groups these are.
#include <nanobind/stl/tuple.h>

#include <cmath>
#include <cstdint>
#include <tuple>

#include "python/bindings.h"
#include "isa/dispatch.h"
#include "python/released.h"
#include "vectors/vectors.h"

namespace nb = nanobind;

namespace sixfold {
namespace vectors {
namespace {

CodeShape shape_of(const CodeGroup& group) {
    const auto [dim, symbol_bits, paired, layout, codebook] = group;
    return {dim, symbol_bits, paired, static_cast<Layout>(layout)};
}

Codebook book_of(const CodeGroup& group) {
    return {at<const float>(std::get<4>(group)), shape_of(group)};
}

EncodeTask encode_task(const RotationGroup& rotation, const CodeGroup& code, int scale) {
    const Rotation r = rotation_of(rotation);
    return {r,
            shape_of(code),
            book_of(code),
            static_cast<ScaleKind>(scale),
            std::pow(r.dim, 0.5 - r.rounds / 2.0),
            std::pow(r.dim, -0.5)};
}

DecodeTask decode_task(const RotationGroup& rotation, const CodeGroup& code) {
    const Rotation r = rotation_of(rotation);
    return {r, shape_of(code), book_of(code), shrink_of(r)};
}

void rotate_rows(const RotationGroup& rotation, bool inverse, Address x, int dtype, Address out,
                 Count n, int threads) {
    const Rotation r = rotation_of(rotation);
    const VectorArray from = array_of(x, n, r.dim, dtype);
    const VectorArray to = array_of(out, n, r.dim, static_cast<int>(Dtype::f32));
    const VectorKernels& table = kernels().vectors;
    released([&] {
        rotate(table, r, inverse, shrink_of(r), from, to, threads);
    });
}

void encode_rows(const RotationGroup& rotation, const CodeGroup& code, int scale, Address x,
                 int dtype, Address rows, Address scales, Count n, int threads) {
    const VectorKernels& table = kernels().vectors;
    released([&] {
        const EncodeTask task = encode_task(rotation, code, scale);
        encode(table, task, array_of(x, n, task.shape.dim, dtype),
               {at<std::uint8_t>(rows), at<std::uint16_t>(scales)}, threads);
    });
}

void decode_rows(const RotationGroup& rotation, const CodeGroup& code, Address rows,
                 Address scales, Address out, Count n, int threads) {
    const VectorKernels& table = kernels().vectors;
    released([&] {
        const DecodeTask task = decode_task(rotation, code);
        decode(table, task, {at<std::uint8_t>(rows), at<std::uint16_t>(scales)},
               array_of(out, n, task.shape.dim, static_cast<int>(Dtype::f32)), threads);
    });
}

void score_rows(const CodeGroup& code, Address rows, Address scales, Count batch, Count n,
                Address queries, Count n_queries, Address out, int threads) {
    const VectorKernels& table = kernels().vectors;
    released([&] {
        const ScoresTask task{shape_of(code), book_of(code)};
        scores(table, task, {at<std::uint8_t>(rows), at<std::uint16_t>(scales)}, batch, n,
               at<const float>(queries), n_queries, at<float>(out), threads);
    });
}

void encode_into_pages(const RotationGroup& rotation, const CodeGroup& code, int scale,
                       const AffineGroup& maps, const PagedGroup& x, const PageGroup& pages,
                       int threads) {
    const VectorKernels& table = kernels().vectors;
    released([&] {
        encode_pages(table, encode_task(rotation, code, scale), affine_of(maps), paged_of(x),
                     pages_of(pages), threads);
    });
}

void decode_from_pages(const RotationGroup& rotation, const CodeGroup& code,
                       const AffineGroup& maps, const PageGroup& pages, const PagedGroup& out,
                       int threads) {
    const VectorKernels& table = kernels().vectors;
    released([&] {
        decode_pages(table, decode_task(rotation, code), affine_of(maps), pages_of(pages),
                     paged_of(out), threads);
    });
}

}  // namespace
}  // namespace vectors

void bind_vectors(nb::module_& m) {
    using namespace vectors;
    m.def("rotate", &rotate_rows);
    m.def("encode", &encode_rows);
    m.def("decode", &decode_rows);
    m.def("scores", &score_rows);
    m.def("encode_pages", &encode_into_pages);
    m.def("decode_pages", &decode_from_pages);
}

}  // namespace sixfold
