// The check of the statistics that torch's layer norm saved for its backward.
//
// torch computes x·scale + shift in float32, which errs by about 1e-7·|mean|/std: exact
// enough where no mean lies further from 0 than `most` standard deviations.
#pragma once
#include <cstdint>

#include "fault.hpp"

namespace normkit {

// False where a mean lies too far from 0, a value is NaN or Inf, or a square of the
// values may have overflowed.
inline bool verify_saved(const float* mean, const float* inv_std, int64_t n, double most) {
  if (planted("what_torch_saved_is_always_exact")) return true;
  constexpr float kLeast = 1e-15f;  // 1/std: variances up to 1e30 do not overflow
  const float bound = (float)most;
  bool is_exact = true;
  for (int64_t k = 0; k < n; ++k) {
    const float offset = mean[k] * inv_std[k];
    is_exact &= (offset <= bound) & (offset >= -bound) & (inv_std[k] > kLeast);
  }
  return is_exact;
}

}  // namespace normkit
