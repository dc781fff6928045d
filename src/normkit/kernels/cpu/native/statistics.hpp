// The algebra between sums and coefficients, in double.
//
// Sums run around a pilot p of the compute type:
//
//   s = Σ(x − p),  q = Σ(x − p)²   ⇒   mean = p + s/n,   m2 = q − s²/n
//
// x − p is exact where x is near p. The subtraction in m2 costs the digits of
// n·(mean − p)²/m2; `is_far` says when that is too many, and the sums are taken again
// around the mean that was found.
//
// Functions of one statistic, and loops over arrays of them that run in vectors: both give
// the same bits, because nothing is contracted.
#pragma once
#include <algorithm>
#include <cmath>

#include "call.hpp"
#include "fault.hpp"
#include "simd.hpp"

namespace normkit {
namespace NK_ISA {

struct Sums {
  double s = 0, q = 0;
  int64_t n = 0;
  NK_INLINE void add(const Sums& other) {
    s += other.s;
    q += other.q;
    n += planted("a_block_is_not_counted") && n ? 0 : other.n;
  }
};

constexpr int kAttempts = 3;

// More than 4 units of the last place of p away from it, and by more than 2 standard
// deviations; false for NaN.
template <class C> NK_INLINE bool is_far(double s, double q, double n, C pilot) {
  if (planted("no_pilot_is_far")) return false;
  constexpr double few_ulp = sizeof(C) == 4 ? 0x1p-21 : 0x1p-50;
  const double shift = s / n, m2 = q - s * shift;
  return (s * shift > 4 * m2) & (std::fabs(shift) > few_ulp * std::fabs((double)pilot));
}

struct Stat {
  double center, m2, scale;
};

// The centre and scale of a normalization.
NK_INLINE Stat finish(double s, double q, double n, double pilot, double eps,
                      bool is_centered) {
  const double inverse = 1 / n, shift = s * inverse, mean = pilot + shift;
  const double m2 = q - (planted("the_spread_is_around_the_pilot") ? 0 : s * shift);
  const double positive = m2 < 0 ? 0 : m2;
  const double spread = positive * inverse + (is_centered ? 0 : mean * mean);
  const double scale = 1 / std::sqrt(spread + eps);
  const bool is_empty = n == 0;
  return {is_empty ? 0 : mean, is_empty ? 0 : positive, is_empty ? 0 : scale};
}

// Sums of up to `Most` statistics.
template <int64_t Most> struct StatSums {
  double s[Most], q[Most], n[Most];
  void clear(int64_t stats) {
    for (double* p : {s, q, n}) std::fill(p, p + stats, 0);
  }
  void add(const StatSums& other, int64_t stats) {
    for (int64_t k = 0; k < stats; ++k) {
      s[k] += other.s[k];
      q[k] += other.q[k];
      n[k] += other.n[k];
    }
  }
};

// Replaces pilots that are far by the means that were found; false where none is.
template <class C>
NK_INLINE bool move_far(const double* s, const double* q, const double* n, int64_t stats,
                        C* pilots) {
  double far = 0;
  for (int64_t k = 0; k < stats; ++k) far += is_far(s[k], q[k], n[k], pilots[k]) ? 1 : 0;
  if (far == 0) return false;
  for (int64_t k = 0; k < stats; ++k) {
    if (is_far(s[k], q[k], n[k], pilots[k])) {
      pilots[k] = (C)((double)pilots[k] + s[k] / n[k]);
    }
  }
  return true;
}

template <class C>
NK_INLINE void store_statistics(const Call& call, int64_t first, int64_t stats,
                                const double* s, const double* q, const double* n,
                                const C* pilots) {
  const double eps = call.eps;
  const bool is_centered = call.has(kCentered);
  const auto take = [&](int64_t k, const Stat& found) NK_BODY {
    call.center[first + k] = found.center;
    if (call.m2) call.m2[first + k] = found.m2;
    if (call.scale) call.scale[first + k] = found.scale;
    if (call.count) call.count[first + k] = (int64_t)n[k];
  };
  constexpr int64_t kSome = 8;  // in vectors, then one by one
  int64_t k = 0;
  for (; k + kSome <= stats; k += kSome) {
    Stat found[kSome];
    for (int64_t j = 0; j < kSome; ++j) {
      found[j] = finish(s[k + j], q[k + j], n[k + j], (double)pilots[k + j], eps, is_centered);
    }
    for (int64_t j = 0; j < kSome; ++j) take(k + j, found[j]);
  }
  for (; k < stats; ++k) {
    take(k, finish(s[k], q[k], n[k], (double)pilots[k], eps, is_centered));
  }
}

// A centre as the part that x is compared with, and what is left of it.
template <class C> struct Split {
  C hi;
  double lo;
  NK_INLINE explicit Split(double center) : hi((C)center) {
    const double rest = center - (double)hi;
    lo = hi - hi == 0 ? rest : 0;  // inf − inf
  }
};

// y = act((x − hi)·a + shift [+ residual]), with the rest of the centre inside shift.
template <class C> struct Map {
  C hi, a, shift;
  NK_INLINE Map(double center, double scale, double weight, double bias) {
    Split<C> split(center);
    hi = split.hi;
    a = (C)(scale * weight);
    if (planted("the_centre_is_rounded")) split.lo = 0;
    shift = (C)(bias - split.lo * (scale * weight));
  }
};

// dx = a·g + b·(x − center) + c, with the statistics' own dependence on x in b and c:
//   b = −scale³·Σg(x − center)/n,   c = −scale·Σg/n     (g here weighted, n values)
struct Slope {
  double b = 0, c = 0;
};
NK_INLINE Slope slope_of(double sum_g, double sum_gx, double scale, double n,
                         const Call& call) {
  const bool is_constant = call.has(kGiven) | (n == 0);
  double b = -scale * scale * scale * sum_gx / n;
  if (planted("the_variance_is_a_constant")) b = 0;
  double c = call.has(kCentered) ? -scale * sum_g / n : 0;
  if (planted("the_mean_is_a_constant")) c = 0;
  return {is_constant ? 0 : b, is_constant ? 0 : c};
}

// The factor of x − hi and the summand, in dx.
template <class C> struct SlopeMap {
  C b, c;
  NK_INLINE SlopeMap(const Slope& slope, double center)
      : b((C)slope.b), c((C)(slope.c - slope.b * Split<C>(center).lo)) {}
};

}  // namespace NK_ISA
}  // namespace normkit
