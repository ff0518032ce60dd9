// One function per file of bindings; module.cpp calls them.
#pragma once

#include <nanobind/nanobind.h>

namespace sixfold {

void bind_vectors(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_cached(nanobind::module_& m);

// SIXFOLD_CPU_EXACT, read at every call: tests and users switch it while the process runs.
bool exact_wanted();

}  // namespace sixfold
