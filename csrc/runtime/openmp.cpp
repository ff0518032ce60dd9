#include "runtime/openmp.h"

#include <dlfcn.h>
#include <strings.h>

#include <cstdlib>

namespace sixfold {
namespace {

bool is_set_to(const char* name, const char* value) {
    const char* const found = std::getenv(name);
    return found && strcasecmp(found, value) == 0;
}

}  // namespace

Team torch_team() {
    if (is_set_to("SIXFOLD_THREADS", "own") || is_set_to("OMP_WAIT_POLICY", "passive"))
        return nullptr;
#if defined(__linux__)
    // In the order in which torch's own calls are resolved: a preloaded runtime, then torch's.
    void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (!symbol) {
        void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        if (!torch) return nullptr;
        symbol = dlsym(torch, "GOMP_parallel");
        dlclose(torch);
    }
    return reinterpret_cast<Team>(symbol);
#else
    return nullptr;
#endif
}

}  // namespace sixfold
