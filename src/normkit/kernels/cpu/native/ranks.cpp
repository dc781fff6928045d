#include "ranks.hpp"

#include <cmath>

#include "fault.hpp"

namespace normkit {
namespace {

// d² of this many variances costs the variance 2^26·2^-53 of its digits, 7e-9, for each
// rank's rounding.
constexpr double kFar = 1 << 26;

double pivot_of(const Ranks& ranks, int64_t k) {
  return ranks.pivot && std::isfinite(ranks.pivot[k]) ? ranks.pivot[k] : 0;
}

}  // namespace

void pack_for_ranks(const Ranks& ranks) {
  const int64_t channels = ranks.channels, counts = ranks.counts;
  double *first = ranks.message + counts, *second = first + channels;
  for (int64_t k = 0; k < channels; ++k) {
    const double n = (double)(ranks.count ? ranks.count[k] : ranks.values);
    const double d = ranks.mean[k] - pivot_of(ranks, k);
    ranks.message[counts > 1 ? k : 0] = n;
    first[k] = n * d;
    second[k] = ranks.m2[k] + n * d * d;
  }
}

bool finish_from_ranks(const Ranks& ranks) {
  const int64_t channels = ranks.channels, counts = ranks.counts;
  const double *first = ranks.message + counts, *second = first + channels;
  bool is_far = false;
  for (int64_t k = 0; k < channels; ++k) {
    const double n = ranks.message[counts > 1 ? k : 0], d = n > 0 ? first[k] / n : 0;
    double m2 = second[k] - first[k] * d;
    if (m2 < 0) m2 = 0;  // rounding of a constant channel; NaN stays
    const double var = n > 0 ? m2 / n : 0;
    ranks.mean[k] = n > 0 ? pivot_of(ranks, k) + d : 0;
    ranks.m2[k] = m2;
    ranks.scale[k] = n > 0 ? 1 / std::sqrt(var + ranks.eps) : 0;
    ranks.count[k] = (int64_t)n;
    is_far |= d * d > kFar * (var + ranks.eps) && std::isfinite(d);
  }
  return is_far && !planted("no_mean_of_ranks_is_far");
}

}  // namespace normkit
