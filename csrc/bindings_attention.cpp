#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "attention.h"
#include "bindings.h"
#include "dispatch.h"
#include "released.h"

namespace nb = nanobind;

namespace sixfold {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

bool exact_wanted() {
    const char* value = std::getenv("SIXFOLD_CPU_EXACT");
    return value && *value && std::string_view(value) != "0";
}

void bind_attention(nb::module_& m) {
    using Address = std::uintptr_t;
    m.def(
        "page_attention",
        [](std::int64_t batch, std::int64_t kv_heads, std::int64_t rows, std::int64_t queries,
           std::int64_t pages, std::int64_t slots, Address query, Address key_pages,
           Address key_scales, Address key_centroids, int key_dim, int key_bits, int key_axes,
           Address value_pages, Address value_scales, Address value_centroids, int value_dim,
           int value_bits, int value_axes, Address table, Address starts, Address lengths,
           Address first_token, Address offset, int mask_kind, Address mask,
           std::int64_t mask_batch, std::int64_t mask_head, std::int64_t mask_query,
           std::int64_t mask_columns, float never, float softcap, Address out, Address lse,
           int threads) {
            const Kernels& isa = kernels();
            const bool exact = exact_wanted();
            const PagePool pool{pointer<const std::uint8_t>(key_pages),
                                pointer<const std::uint16_t>(key_scales),
                                pointer<const std::uint8_t>(value_pages),
                                pointer<const std::uint16_t>(value_scales), slots};
            const std::vector<std::int32_t> page_pool(pages, 0);
            const CodecKey keys{key_dim, key_bits, key_axes, false, exact,
                                pointer<const float>(key_centroids)};
            const CodecKey values{value_dim, value_bits, value_axes, true, exact,
                                  pointer<const float>(value_centroids)};
            const AttentionTask task{
                batch, kv_heads, rows, queries, pages, pointer<const float>(query),
                {keys, nullptr}, {values, nullptr}, &pool, page_pool.data(),
                pointer<const std::int64_t>(table), pointer<const std::int64_t>(starts),
                pointer<const std::int64_t>(lengths), pointer<const std::int64_t>(first_token),
                pointer<const float>(offset), static_cast<Mask>(mask_kind),
                pointer<const void>(mask), {mask_batch, mask_head, mask_query}, mask_columns,
                never, softcap, pointer<float>(out), pointer<float>(lse)};
            released([&] {
                check_bounds(task);
                attend(isa.attention, task, threads);
            });
        },
        "Attention on pages; see sixfold.kernels.attention.cpu, which checks what it passes.");
}

}  // namespace sixfold
