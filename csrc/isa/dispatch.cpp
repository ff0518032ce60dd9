#include "isa/dispatch.h"

#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace sixfold {
namespace {

using Names = std::vector<std::string>;

// The names of -m flags. The builtin knows whether the operating system saves the registers, and
// takes literals only.
#define SIXFOLD_NEEDS(feature) \
    if (!__builtin_cpu_supports(feature)) missing.push_back(feature)

#if defined(SIXFOLD_HAS_AVX2)
Names missing_for_avx2() {
    Names missing;
    SIXFOLD_NEEDS("avx2");
    SIXFOLD_NEEDS("fma");
    SIXFOLD_NEEDS("f16c");
    SIXFOLD_NEEDS("bmi2");
    return missing;
}
#endif

#if defined(SIXFOLD_HAS_AVX512)
Names missing_for_avx512() {
    Names missing;
    SIXFOLD_NEEDS("avx512f");
    SIXFOLD_NEEDS("avx512bw");
    SIXFOLD_NEEDS("avx512vl");
    SIXFOLD_NEEDS("avx512dq");
    SIXFOLD_NEEDS("avx512vnni");
    SIXFOLD_NEEDS("avx512vbmi");
    SIXFOLD_NEEDS("avx512vbmi2");
    SIXFOLD_NEEDS("avx2");
    SIXFOLD_NEEDS("fma");
    SIXFOLD_NEEDS("f16c");
    SIXFOLD_NEEDS("bmi2");
    return missing;
}
#endif

#if defined(SIXFOLD_HAS_NEON)
Names missing_for_neon() {
    Names missing;
#if defined(__linux__)
    const unsigned long capabilities = getauxval(AT_HWCAP);
    if (!(capabilities & HWCAP_ASIMDDP)) missing.push_back("dotprod");
    if (!(capabilities & HWCAP_ASIMDHP)) missing.push_back("fp16");
#elif defined(__APPLE__)
    const auto has = [](const char* name) {
        int value = 0;
        std::size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
    };
    if (!has("hw.optional.arm.FEAT_DotProd")) missing.push_back("dotprod");
    if (!has("hw.optional.arm.FEAT_FP16")) missing.push_back("fp16");
#else
    missing.push_back("a system that says what the processor has");
#endif
    return missing;
}
#endif

struct Candidate {
    const Kernels* kernels;
    Names missing;
};

// Best first; found out once.
const std::vector<Candidate>& candidates() {
    static const std::vector<Candidate> all = {
#if defined(SIXFOLD_HAS_AVX512)
        {&avx512_kernels(), missing_for_avx512()},
#endif
#if defined(SIXFOLD_HAS_AVX2)
        {&avx2_kernels(), missing_for_avx2()},
#endif
#if defined(SIXFOLD_HAS_NEON)
        {&neon_kernels(), missing_for_neon()},
#endif
        {&portable_kernels(), {}},
    };
    return all;
}

[[noreturn]] void refuse(const char* wanted) {
    std::string message = "SIXFOLD_ISA must be ";
    for (const std::string& name : available_isas()) message += name + ", ";
    message += std::string("or unset, got '") + wanted + "'";
    for (const Candidate& one : candidates()) {
        if (std::strcmp(one.kernels->isa, wanted) != 0) continue;
        message += ", for which this processor lacks";
        for (const std::string& feature : one.missing) message += " " + feature;
    }
    throw UnknownIsa(message);
}

}  // namespace

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found;
    for (const Candidate& one : candidates())
        if (one.missing.empty()) found.push_back(one.kernels);
    return found;
}

std::vector<std::string> available_isas() {
    Names names;
    for (const Kernels* table : available_kernels()) names.push_back(table->isa);
    return names;
}

std::vector<std::pair<std::string, Names>> missing_features() {
    std::vector<std::pair<std::string, Names>> found;
    for (const Candidate& one : candidates())
        if (!one.missing.empty()) found.emplace_back(one.kernels->isa, one.missing);
    return found;
}

const Kernels& kernels() {
    const char* const wanted = std::getenv("SIXFOLD_ISA");
    const bool any = !wanted || !*wanted;
    for (const Candidate& one : candidates())
        if (one.missing.empty() && (any || std::strcmp(one.kernels->isa, wanted) == 0))
            return *one.kernels;
    refuse(wanted);
}

}  // namespace sixfold
