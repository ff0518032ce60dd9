// The OpenMP that torch uses.
#pragma once

#include "runtime/pool.h"

namespace sixfold {

// Why borrow its threads: GNU OpenMP's spin for about 8 ms after every operation of torch, on all
// cores. Threads of our own would wait for a core until our call is over. nullptr if torch is not
// loaded or uses another runtime, if they do not spin (OMP_WAIT_POLICY=passive), or if
// SIXFOLD_THREADS=own.
Team torch_team();

}  // namespace sixfold
