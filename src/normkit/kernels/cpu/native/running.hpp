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

// What an operator of torch saved for its backward, judged after the fact.
struct Saved {
  int64_t statistics, count, mean_dtype, var_dtype, flags;
  double bound, eps, rate;
  const float *mean, *inv_std, *var;
  void *running_mean, *running_var;
  int64_t* num_batches_tracked;
};

// Whether every statistic is finite and |mean| <= bound·std; if so, the running ones
// move. `mean` may be null; `var` stands in for `inv_std`.
bool settle(const Saved& saved);

}  // namespace normkit
