// Running statistics: old + rate·(new − old), as one call instead of twenty.
#pragma once
#include <cstdint>

namespace normkit {

// Every field is 8 bytes wide, as in Call.
struct Update {
  int64_t channels, mean_dtype, var_dtype, flags;
  double rate;
  const double *mean, *m2;
  const int64_t* count;
  void *running_mean, *running_var;
  int64_t* num_batches_tracked;
  bool* is_finite;
};

enum UpdateFlags : int64_t {
  kSkipNonfinite = 1,  // a batch with a NaN or Inf anywhere changes nothing
  kCountEach = 2,      // a count for each channel, instead of one
  kEqualShares = 4,    // rate = 1/(num_batches_tracked + 1)
};

void move_running(const Update& update);

}  // namespace normkit
