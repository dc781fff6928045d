// What an operator of torch saved for its backward, judged after the fact and mended.
#pragma once
#include "kernels.hpp"

namespace normkit {

// Every field is 8 bytes wide, as in Call.
struct Saved {
  int64_t statistics, count, flags;
  double bound, most, eps, rate;
  float *mean, *inv_std;  // `mean` may be null
  float *running_mean, *running_var;
  int64_t* num_batches_tracked;
};

enum SavedFlags : int64_t {
  kIsVar = 1,        // in the place of inv_std stands a variance
  kIsInput = 2,      // in the place of mean stands x, (statistics, count), and no inv_std
  kSharesAlike = 4,  // rate = 1/(num_batches_tracked + 1)
};

enum Verdict : int { kFit, kToMend, kUnfit };

// kFit up to |mean| = bound·std everywhere, kToMend up to most·std, kUnfit beyond and
// where something is not finite. If it fits, the running statistics move and the batch
// is counted.
Verdict judge(const Saved& saved);

// A call that says what the operator should have given: y, and what it saved. With
// `kIsVar` that stays: it is the statistics to use.
struct Mend {
  Call call;
  Saved saved;
};

// kFit or, if the statistics are beyond `most` after all, kUnfit.
Verdict mend(const Mend& mend, const Kernels& kernels);

}  // namespace normkit
