#include "nearest/many.h"

#include <cstdlib>
#include <cstring>

#if defined(SIXFOLD_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sixfold {

#if defined(SIXFOLD_HAS_AMX)
const ManyKernel& amx_kernel();

namespace {

constexpr long kRequestState = 0x1023, kTileData = 18;

// The system gives a process these registers when it asks for them, to all its threads.
bool has_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
    if (!(d & kTiles) || !(d & kBytes)) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kSaved = 3u << 17;
    return (low & kSaved) == kSaved && syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
}

}  // namespace

const ManyKernel* many_kernel() {
    static const bool has = has_tiles();
    const char* wanted = std::getenv("SIXFOLD_AMX");
    return has && !(wanted && std::strcmp(wanted, "0") == 0) ? &amx_kernel() : nullptr;
}
#else
const ManyKernel* many_kernel() { return nullptr; }
#endif

}  // namespace sixfold
