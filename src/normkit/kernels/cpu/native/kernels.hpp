// The entry points that each instruction set provides.
#pragma once
#include "call.hpp"

#define NK_DECLARE(isa)            \
  namespace isa {                  \
  int forward(const Call& call);   \
  int backward(const Call& call);  \
  int apply_grads(const Call& call); \
  }

namespace normkit {
NK_DECLARE(baseline)
NK_DECLARE(avx2)
NK_DECLARE(avx512)
}  // namespace normkit
