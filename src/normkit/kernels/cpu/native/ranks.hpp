// Statistics of all ranks: the message that is summed, and the statistics from its sums.
//
//   message     n,  n·(mean − pivot),  m2 + n·(mean − pivot)²        (without a pivot: 0)
//
// n is one number, or one for each channel under a mask.
#pragma once
#include <cstdint>

namespace normkit {

// Every field is 8 bytes wide, as in Call.
struct Ranks {
  int64_t channels, counts;  // numbers of channels, and of counts in the message
  int64_t values;            // of each channel on this rank, without a `count`
  double eps;
  double* mean;
  double* scale;  // 1/sqrt(var + eps)
  double* m2;
  int64_t* count;       // one for each channel; to pack, null without a mask
  const double* pivot;  // or null
  double* message;
};

void pack_for_ranks(const Ranks& ranks);

// Writes mean, scale, m2 and count from the sums. True where they have lost digits because
// a mean lies too far from the pivot.
bool finish_from_ranks(const Ranks& ranks);

}  // namespace normkit
