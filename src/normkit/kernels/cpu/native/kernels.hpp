// The kernels of each instruction set for each dtype.
#pragma once
#include "call.hpp"

namespace normkit {

struct Kernels {
  void (*forward)(const Call&);
  void (*backward)(const Call&);
  void (*apply_grads)(const Call&);
};

}  // namespace normkit

#define NK_DECLARE(isa)                                                  \
  namespace normkit {                                                    \
  namespace isa {                                                        \
  extern const Kernels float32, bfloat16, float16, float64;              \
  }                                                                      \
  }
