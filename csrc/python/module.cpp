#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

#include <stdexcept>

#include "python/bindings.h"
#include "isa/dispatch.h"
#include "runtime/openmp.h"
#include "runtime/pool.h"
#include "runtime/probe.h"
#include "python/released.h"

namespace nb = nanobind;

namespace {

// Python runs signal handlers in the main thread alone: no other one need take the GIL to ask.
bool is_main_thread() {
#if defined(__linux__)
    return syscall(SYS_gettid) == getpid();
#elif defined(__APPLE__)
    return pthread_main_np() != 0;
#else
    return true;
#endif
}

// True leaves the handler's exception pending: see released.h.
bool signal_raised() {
    if (!is_main_thread()) return false;
    nb::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

void set_error(const char* name, const std::exception& error) {
    nb::object type = nb::module_::import_("sixfold.errors").attr(name);
    PyErr_SetString(type.ptr(), error.what());
}

// A user's mistake is a SixfoldError, as everywhere else. Here alone: callers in Python catch none.
void translate(const std::exception_ptr& thrown, void*) {
    try {
        std::rethrow_exception(thrown);
    } catch (const sixfold::UnknownIsa& error) {
        set_error("BackendError", error);
    } catch (const std::invalid_argument& error) {
        set_error("ShapeError", error);
    }
}

std::uint64_t sum_words(std::uintptr_t address, std::size_t count, int passes, int threads) {
    const auto* words = reinterpret_cast<const std::uint64_t*>(address);
    std::uint64_t sum = 0;
    sixfold::released([&] { sixfold::sum_words(words, count, passes, threads, sum); });
    return sum;
}

}  // namespace

NB_MODULE(_cpu, m) {
    nb::register_exception_translator(translate);
    sixfold::set_interrupt_check(signal_raised);
    const sixfold::Team team = sixfold::torch_team();
    sixfold::set_team(team);
    m.attr("borrows_threads") = team != nullptr;
    m.def("isa", [] { return std::string(sixfold::kernels().isa); });
    m.def("available_isas", &sixfold::available_isas);
    m.def("missing_features", &sixfold::missing_features);
    m.def("pool_workers", &sixfold::pool_workers);
    m.def("sum_words", &sum_words, nb::arg("address"), nb::arg("count"), nb::arg("passes"),
          nb::arg("threads"));
    sixfold::bind_vectors(m);
    sixfold::bind_trellis(m);
    sixfold::bind_attention(m);
    sixfold::bind_nearest(m);
}
