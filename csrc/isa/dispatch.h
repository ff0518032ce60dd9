// Which instruction set runs: the best this processor has, unless SIXFOLD_ISA says otherwise.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "isa/kernels.h"

namespace sixfold {

// SIXFOLD_ISA names none of available_isas().
struct UnknownIsa : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// The instruction sets that were compiled in and that this processor runs, best first.
std::vector<const Kernels*> available_kernels();

// Their names.
std::vector<std::string> available_isas();

// Those that were compiled in and that it does not run, each with the features it lacks.
std::vector<std::pair<std::string, std::vector<std::string>>> missing_features();

// Reads the environment on every call, so that one process can compare instruction sets; 60 ns.
// Call it while holding the GIL: only then does nobody write to the environment. Throws UnknownIsa.
const Kernels& kernels();

}  // namespace sixfold
