// What a binding wraps its driver in.
#pragma once

#include <nanobind/nanobind.h>

namespace sixfold {

// Runs `driver` without the GIL, so that other Python threads go on. Where Ctrl-C stopped a
// parallel_for inside it, the KeyboardInterrupt that is then pending is thrown.
template <typename Driver>
void released(Driver&& driver) {
    {
        nanobind::gil_scoped_release others_run;
        driver();
    }
    if (PyErr_Occurred()) throw nanobind::python_error();
}

}  // namespace sixfold
