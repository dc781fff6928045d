// The algebra between sums and coefficients, in double.
//
// Sums run around a pilot p of the compute type:
//
//   s = Σ(x − p),  q = Σ(x − p)²   ⇒   mean = p + s/n,   m2 = q − s²/n
//
// x − p is exact where x is near p. The subtraction in m2 costs the digits of
// n·(mean − p)²/m2; `is_far` says when that is too many, and the sums are taken again
// around the mean that was found.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

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

// What a normalization subtracts and multiplies by; without branches, so that loops
// over statistics run in vectors.
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

// Sums of some statistics as arrays, so that loops over them run in vectors.
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

template <int64_t Most, class C>
void store_statistics(const Call& call, int64_t first, int64_t stats,
                      const StatSums<Most>& sums, const C* pilots) {
  Stat found[Most];
  const double eps = call.eps;
  const bool is_centered = call.has(kCentered);
  for (int64_t k = 0; k < stats; ++k) {
    found[k] = finish(sums.s[k], sums.q[k], sums.n[k], (double)pilots[k], eps, is_centered);
  }
  for (int64_t k = 0; k < stats; ++k) {
    call.center[first + k] = found[k].center;
    if (call.m2) call.m2[first + k] = found[k].m2;
    if (call.scale) call.scale[first + k] = found[k].scale;
    if (call.count) call.count[first + k] = (int64_t)sums.n[k];
  }
}

// A centre as the part that x is compared with, and what is left of it.
template <class C> struct Split {
  C hi;
  double lo;
  NK_INLINE explicit Split(double center) : hi((C)center), lo(center - (double)hi) {
    if (!std::isfinite(hi)) lo = 0;  // inf − inf
  }
};

// A learned vector of any dtype, with a default where there is none.
class Learned {
 public:
  Learned(const void* p, int64_t dtype, int64_t size, double otherwise)
      : values_(size, otherwise) {
    if (!p) return;
    switch (dtype) {
      case kFloat32: read(static_cast<const float*>(p)); break;
      case kBFloat16: read(static_cast<const bf16*>(p)); break;
      case kFloat16: read(static_cast<const fp16*>(p)); break;
      default: read(static_cast<const double*>(p));
    }
  }
  NK_INLINE double operator[](int64_t k) const { return values_[k]; }

 private:
  template <class T> void read(const T* p) {
    for (size_t k = 0; k < values_.size(); ++k) values_[k] = to_double(p[k]);
  }
  std::vector<double> values_;
};

inline void store_learned(void* p, int64_t dtype, int64_t k, double v) {
  switch (dtype) {
    case kFloat32: from_double(v, static_cast<float*>(p) + k); break;
    case kBFloat16: from_double(v, static_cast<bf16*>(p) + k); break;
    case kFloat16: from_double(v, static_cast<fp16*>(p) + k); break;
    default: from_double(v, static_cast<double*>(p) + k);
  }
}

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
NK_INLINE Slope slope_of(double sum_g, double sum_gx, double scale, int64_t count,
                         const Call& call) {
  if (call.has(kGiven) || count == 0) return {};
  double n = (double)count;
  double b = -scale * scale * scale * sum_gx / n;
  if (planted("the_variance_is_a_constant")) b = 0;
  if (planted("the_mean_is_a_constant")) return {b, 0};
  return {b, call.has(kCentered) ? -scale * sum_g / n : 0};
}

}  // namespace NK_ISA
}  // namespace normkit
