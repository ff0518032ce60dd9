#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string_view>

#include "python/bindings.h"
#include "isa/dispatch.h"
#include "python/released.h"
#include "nearest/nearest.h"

namespace nb = nanobind;

namespace sixfold {
namespace {

// code, codes, scales.
using VectorPart = std::tuple<PageCode, Address, Address>;
// parts, offsets (0: none), whether these are float32, allowed, pages.
using VectorPages = std::tuple<std::vector<VectorPart>, Address, bool, Address, Count>;
// query, weight, constant, queries.
using Queries = std::tuple<Address, Address, Address, Count>;
// scores, slots, best.
using Found = std::tuple<Address, Address, Count>;

const ManyKernel* many_of(const Kernels& isa) {
    return std::string_view(isa.isa) == "avx512" ? many_kernel() : nullptr;
}

void nearest_in_pages(const VectorPages& pages, const Queries& queries, const Found& found,
                      int threads) {
    NearestTask task{};
    const auto& [parts, offsets, single, allowed, count] = pages;
    if (parts.empty() || parts.size() > kMostParts)
        throw std::invalid_argument("vectors have 1 to 8 parts");
    for (const auto& [code, codes, scales] : parts)
        task.parts.push_back({codec_of(code), nullptr, at<const std::uint8_t>(codes),
                              at<const std::uint16_t>(scales)});
    task.offsets = at<const void>(offsets);
    task.offset_kind = !offsets ? OffsetKind::none : single ? OffsetKind::single : OffsetKind::half;
    task.allowed = at<const std::uint64_t>(allowed);
    task.pages = count;
    const auto [query, weight, constant, asked] = queries;
    task.query = at<const float>(query);
    task.weight = at<const float>(weight);
    task.constant = at<const float>(constant);
    task.queries = asked;
    const auto [scores, slots, best] = found;
    task.scores = at<float>(scores);
    task.slots = at<Count>(slots);
    task.best = best;
    const Kernels& isa = kernels();
    task.many = many_of(isa);
    released([&] { nearest(isa.nearest, task, threads); });
}

}  // namespace

void bind_nearest(nb::module_& m) {
    m.def("nearest", nearest_in_pages);
    m.def("multiplies_tiles", [] { return many_of(kernels()) != nullptr; });
}

}  // namespace sixfold
