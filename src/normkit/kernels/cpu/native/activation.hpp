// Activations and their derivatives on vectors.
//
// float: polynomials fitted for this file (Chebyshev, errors at most 5e-8 before
// rounding); double: the C library, lane by lane. A NaN passes through each of them,
// and relu and leaky_relu pass gradients as torch does where the input is NaN. A number
// that stands for no activation gives NaN, so that a new one that has no case is seen.
#pragma once
#include "call.hpp"
#include "fault.hpp"
#include "simd.hpp"

namespace normkit {
namespace NK_ISA {

// The polynomial in u, coefficients from the highest power down.
template <class... Rest> NK_INLINE vf polynomial(vf u, float first, Rest... rest) {
  vf q = splat(first);
  ((q = fused(q, u, splat(rest))), ...);
  return q;
}

NK_INLINE vf exp_of(vf x) {
  x = select(x > 89.f, splat(89.f), select(x < -104.f, splat(-104.f), x));
  const vf magic = splat(12582912.f);  // 1.5·2²³: adding it rounds to an integer
  const vf n = fused(x, splat(1.44269504f), magic) - magic;
  const vf r = fused(n, splat(2.12194440e-4f), fused(n, splat(-0.693359375f), x));
  vf e = polynomial(r, 1.39262508e-3f, 8.36323288e-3f, 4.16665542e-2f, 1.66665767e-1f,
                    0.5f);
  e = fused(e, r * r, r + 1.f);
  // In two factors, so that results above 2^127 and below 2^-126 come out right.
  vi k = __builtin_convertvector(n, vi), half = k >> 1;
  e = e * (vf)((half + 127) << 23);
  return e * (vf)((k - half + 127) << 23);
}
NK_INLINE vf tanh_of(vf z) {
  vf size = (vf)((vi)z & 0x7fffffff), u = z * z;
  vf q = polynomial(u, -6.04516510e-3f, 2.09613291e-2f, -5.38432632e-2f,
                    1.33327188e-1f, -3.33333284e-1f);
  vf near = fused(q, u * z, z);
  vf far = 1.f - 2.f / (exp_of(2.f * size) + 1.f);
  far = (vf)((vi)far | ((vi)z & (vi{} + INT32_MIN)));
  return select(size < 0.625f, near, far);
}
// Φ(z) = erfc(−z/√2)/2 with erfc(x) = t·exp(−x² + q(t)), t = 1/(1 + x/2), x ≥ 0.
NK_INLINE vf normal_cdf(vf z) {
  const vf x = (vf)((vi)z & 0x7fffffff) * 0.70710678f;
  const vf t = 1.f / fused(x, splat(0.5f), splat(1.f));
  const vf q = polynomial(t, -1.54999483e-1f, 1.04974384f, -2.99050707f, 4.54304684f,
                          -3.84535887f, 1.85494061f, -7.92236595e-1f, 2.48343746e-1f,
                          3.50537009e-1f, 1.00207909f, -1.26558902f);
  const vf tail = 0.5f * t * exp_of(fused(-x, x, q));
  return select(z > 0.f, 1.f - tail, tail);
}
NK_INLINE vf normal_pdf(vf z) { return 0.39894228f * exp_of(-0.5f * (z * z)); }

template <class F> NK_INLINE vd each_lane(vd z, F f) {
  for (int k = 0; k < Lanes<double>::count; ++k) z[k] = f(z[k]);
  return z;
}
NK_INLINE vd exp_of(vd z) {
  return each_lane(z, [](double v) { return std::exp(v); });
}
NK_INLINE vd tanh_of(vd z) {
  return each_lane(z, [](double v) { return std::tanh(v); });
}
NK_INLINE vd normal_cdf(vd z) {
  return each_lane(z, [](double v) { return 0.5 * std::erfc(-v * M_SQRT1_2); });
}
NK_INLINE vd normal_pdf(vd z) {
  return exp_of(-0.5 * (z * z)) * (0.5 * M_SQRT1_2 * M_2_SQRTPI);
}

// f(z); a call, because inlined into every loop the library would be 5 times as large.
template <class V> __attribute__((noinline)) V activate(int64_t f, V z, V slope) {
  const V zero{}, one = zero + 1;
  switch (f) {
    case kRelu: return select(z < zero, zero, z);
    case kLeakyRelu: return select(z > zero, z, z * slope);
    case kSilu: return z / (one + exp_of(-z));
    case kGelu: return z * normal_cdf(z);
    case kSigmoid: return one / (one + exp_of(-z));
    case kTanh: return tanh_of(z);
    case kNone: return z;
    default: return z + std::numeric_limits<float>::quiet_NaN();
  }
}

// dy·f′(z)
template <class V> __attribute__((noinline)) V gate(int64_t f, V dy, V z, V slope) {
  const V zero{}, one = zero + 1;
  switch (f) {
    case kRelu: return select(z <= zero, zero, dy);
    case kLeakyRelu: return select(z > zero, dy, dy * slope);
    case kSilu: {
      V s = one / (one + exp_of(-z));
      return dy * (s * fused(z, one - s, one));
    }
    case kGelu:
      if (planted("gelu_forgets_its_density")) return dy * normal_cdf(z);
      return dy * fused(z, normal_pdf(z), normal_cdf(z));
    case kSigmoid: {
      V s = one / (one + exp_of(-z));
      return dy * (s * (one - s));
    }
    case kTanh: {
      V t = tanh_of(z);
      return dy * fused(-t, t, one);
    }
    case kNone: return dy;
    default: return dy + std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace NK_ISA
}  // namespace normkit
