// Running statistics: read and updated in place, (1 − rate)·old + rate·new.
#pragma once
#include <cstdint>

namespace normkit {

// Every field is 8 bytes wide, as in Call.
struct Update {
  int64_t channels, mean_dtype, var_dtype, flags;
  double rate;
  const double *mean, *m2;
  const int64_t* count;  // one for each channel with kCountEach, otherwise one
  void *running_mean, *running_var;
  int64_t *num_batches_tracked, *num_batches_skipped;
};

// In addition to kSkipNonfinite and kEqualShares of Call.
enum UpdateFlags : int64_t { kCountEach = 1 };

// Returns true if every statistic of the batch was finite.
bool move_running(const Update& update);

// center = running_mean, scale = 1/sqrt(running_var + eps).
void read_running(const void* running_mean, int64_t mean_dtype, const void* running_var,
                  int64_t var_dtype, int64_t channels, double eps, double* center,
                  double* scale);

}  // namespace normkit
