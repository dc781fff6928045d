// Sums of vectors, accumulated in double.
#pragma once
#include <cstring>

#include "both.hpp"
#include "fault.hpp"
#include "simd.hpp"

namespace normkit {
namespace NK_ISA {

// Float lanes hold at most kFlush additions before they are added to double lanes, so a
// sum errs by a few roundings of its own size however many values it has.
constexpr int64_t kFlush = 64;
constexpr int kDoubles = Lanes<double>::count;

// The sum over the lanes, in the order of `sums_of_lanes`.
NK_INLINE double sum_lanes(vd v) {
#if NK_BYTES == 64
  const __m512d all = (__m512d)v;
  const __m512d pairs = all + _mm512_permute_pd(all, 0x55);
  const __m256d low = _mm512_castpd512_pd256(pairs), high = _mm512_extractf64x4_pd(pairs, 1);
  const __m128d two = _mm256_castpd256_pd128(low) + _mm256_extractf128_pd(low, 1);
  const __m128d four = _mm256_castpd256_pd128(high) + _mm256_extractf128_pd(high, 1);
  return two[0] + four[0];
#elif NK_BYTES == 32
  const __m256d pairs = (__m256d)v + _mm256_permute_pd((__m256d)v, 0x5);
  return pairs[0] + _mm256_extractf128_pd(pairs, 1)[0];
#else
  return v[0] + v[1];
#endif
}
NK_INLINE float sum_lanes(vf v) {
#if NK_BYTES == 64
  const __m512 all = (__m512)v;
  const __m512 pairs = all + _mm512_permute_ps(all, 0x4e);
  const __m512 fours = pairs + _mm512_permute_ps(pairs, 0xb1);
  const __m256 low = _mm512_castps512_ps256(fours), high = _mm512_extractf32x8_ps(fours, 1);
  const __m128 two = _mm256_castps256_ps128(low) + _mm256_extractf128_ps(low, 1);
  const __m128 four = _mm256_castps256_ps128(high) + _mm256_extractf128_ps(high, 1);
  return two[0] + four[0];
#elif NK_BYTES == 32
  const __m256 pairs = (__m256)v + _mm256_permute_ps((__m256)v, 0xb1);
  const __m256 fours = pairs + _mm256_permute_ps(pairs, 0x4e);
  return fours[0] + _mm256_extractf128_ps(fours, 1)[0];
#else
  return (v[0] + v[1]) + (v[2] + v[3]);
#endif
}

// The sums over the lanes of as many vectors as a vector has lanes, as one vector: a third
// of the work, or less. Each is summed in the same order, wherever it stands.
NK_INLINE vd sums_of_lanes(const vd* v) {
#if NK_BYTES == 64
  __m512d two[4], four[2];
  for (int k = 0; k < 4; ++k) {
    const __m512d a = (__m512d)v[2 * k], b = (__m512d)v[2 * k + 1];
    two[k] = _mm512_unpacklo_pd(a, b) + _mm512_unpackhi_pd(a, b);
  }
  for (int k = 0; k < 2; ++k) {
    const __m512d a = two[2 * k], b = two[2 * k + 1];
    four[k] = _mm512_shuffle_f64x2(a, b, 0x88) + _mm512_shuffle_f64x2(a, b, 0xdd);
  }
  return (vd)(_mm512_shuffle_f64x2(four[0], four[1], 0x88) +
              _mm512_shuffle_f64x2(four[0], four[1], 0xdd));
#elif NK_BYTES == 32
  const __m256d a = _mm256_hadd_pd((__m256d)v[0], (__m256d)v[1]);
  const __m256d b = _mm256_hadd_pd((__m256d)v[2], (__m256d)v[3]);
  return (vd)(_mm256_permute2f128_pd(a, b, 0x20) + _mm256_permute2f128_pd(a, b, 0x31));
#else
  return vd{v[0][0] + v[0][1], v[1][0] + v[1][1]};
#endif
}
NK_INLINE vf sums_of_lanes(const vf* v) {
#if NK_BYTES == 64
  __m512 four[4], two[2];
  for (int k = 0; k < 4; ++k) {
    const __m512 a = (__m512)v[4 * k], b = (__m512)v[4 * k + 1];
    const __m512 c = (__m512)v[4 * k + 2], d = (__m512)v[4 * k + 3];
    const __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    four[k] = (__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd);
  }
  for (int k = 0; k < 2; ++k) {
    const __m512 a = four[2 * k], b = four[2 * k + 1];
    two[k] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  }
  return (vf)(_mm512_shuffle_f32x4(two[0], two[1], 0x88) +
              _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
#elif NK_BYTES == 32
  __m256 four[2];
  for (int k = 0; k < 2; ++k) {
    const __m256 ab = _mm256_hadd_ps((__m256)v[4 * k], (__m256)v[4 * k + 1]);
    const __m256 cd = _mm256_hadd_ps((__m256)v[4 * k + 2], (__m256)v[4 * k + 3]);
    four[k] = _mm256_hadd_ps(ab, cd);
  }
  return (vf)(_mm256_permute2f128_ps(four[0], four[1], 0x20) +
              _mm256_permute2f128_ps(four[0], four[1], 0x31));
#else
  vf sums;
  for (int k = 0; k < 4; ++k) sums[k] = (v[k][0] + v[k][1]) + (v[k][2] + v[k][3]);
  return sums;
#endif
}

NK_INLINE void store_wide(double* p, vd v) { store(p, v); }
NK_INLINE void store_wide(double* p, vf v) {
  for (int k = 0; k < Lanes<float>::count; ++k) p[k] = (double)v[k];
}

// Sums over the lanes of one vector after another, found for some at once.
template <class C> class LaneSums {
 public:
  explicit NK_INLINE LaneSums(double* sums) : to_(sums) {}
  NK_INLINE void add(Vec<C> v) {
    vectors_[pending_] = v;
    if (++pending_ < W) return;
    store_wide(to_, sums_of_lanes(vectors_));
    to_ += W;
    pending_ = 0;
  }
  NK_INLINE void finish() {
    if (!pending_) return;
    if (pending_ == 1) {
      *to_ = (double)sum_lanes(vectors_[0]);
      return;
    }
    for (int k = pending_; k < W; ++k) vectors_[k] = Vec<C>{};
    const Vec<C> sums = sums_of_lanes(vectors_);
    for (int k = 0; k < pending_; ++k) to_[k] = (double)sums[k];
  }

 private:
  static constexpr int W = Lanes<C>::count;
  double* to_;
  Vec<C> vectors_[W];
  int pending_ = 0;
};

template <class C> struct Wide;
template <> struct Wide<float> {
  vd low{}, high{};
  NK_INLINE void add(vf v) {
#if NK_BYTES == 64
    low += (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
    high += (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif NK_BYTES == 32
    low += (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
    high += (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
    half_vf part[2];
    std::memcpy(part, &v, sizeof v);
    low += __builtin_convertvector(part[0], vd);
    high += __builtin_convertvector(part[1], vd);
#endif
  }
  NK_INLINE vd lanes() const { return low + high; }
  NK_INLINE double total() const { return sum_lanes(lanes()); }
};
template <> struct Wide<double> {
  vd sum{};
  NK_INLINE void add(vd v) { sum += v; }
  NK_INLINE vd lanes() const { return sum; }
  NK_INLINE double total() const { return sum_lanes(sum); }
};

// Σu and Σu·d of vectors, four accumulators each so that additions overlap.
template <class C> class PairSums {
 public:
  using V = Vec<C>;
  static constexpr int W = Lanes<C>::count;

  // term(at, lanes, u, d) gives the two factors of one vector, or of two if InTwos; u is 0
  // beyond First.
  template <bool InTwos = false, class Term>
  NK_INLINE void add(int64_t n, const Term& term) {
    V u0 = u_[0], u1 = u_[1], u2 = u_[2], u3 = u_[3];
    V v0 = v_[0], v1 = v_[1], v2 = v_[2], v3 = v_[3], u, d;
    int64_t i = 0;
    while (n - i >= 4 * W) {
      int64_t room = kFlush - pending_, steps = (n - i) / (4 * W);
      if (steps > room) steps = room;
      pending_ += steps;
      for (; steps > 0; --steps, i += 4 * W) {
        if constexpr (InTwos) {
          Two some_u, some_d;
          term(i, Both{}, some_u, some_d);
          u0 += some_u.low; v0 = fused(some_u.low, some_d.low, v0);
          u1 += some_u.high; v1 = fused(some_u.high, some_d.high, v1);
          term(i + 2 * W, Both{}, some_u, some_d);
          u2 += some_u.low; v2 = fused(some_u.low, some_d.low, v2);
          u3 += some_u.high; v3 = fused(some_u.high, some_d.high, v3);
        } else {
          term(i, Full{}, u, d); u0 += u; v0 = fused(u, d, v0);
          term(i + W, Full{}, u, d); u1 += u; v1 = fused(u, d, v1);
          term(i + 2 * W, Full{}, u, d); u2 += u; v2 = fused(u, d, v2);
          term(i + 3 * W, Full{}, u, d); u3 += u; v3 = fused(u, d, v3);
        }
      }
      if (pending_ >= kFlush) {
        flush(u0, u1, u2, u3, v0, v1, v2, v3);
        u0 = u1 = u2 = u3 = v0 = v1 = v2 = v3 = V{};
      }
    }
    if (i + 2 * W <= n) {
      term(i, Full{}, u, d); u0 += u; v0 = fused(u, d, v0);
      term(i + W, Full{}, u, d); u1 += u; v1 = fused(u, d, v1);
      i += 2 * W;
    }
    if (i + W <= n) {
      term(i, Full{}, u, d); u2 += u; v2 = fused(u, d, v2);
      i += W;
    }
    if (i < n && !planted("sums_drop_their_tail")) {
      term(i, First{n - i}, u, d); u3 += u; v3 = fused(u, d, v3);
    }
    if (++pending_ >= kFlush) {
      flush(u0, u1, u2, u3, v0, v1, v2, v3);
      u0 = u1 = u2 = u3 = v0 = v1 = v2 = v3 = V{};
    }
    u_[0] = u0; u_[1] = u1; u_[2] = u2; u_[3] = u3;
    v_[0] = v0; v_[1] = v1; v_[2] = v2; v_[3] = v3;
  }
  NK_INLINE void lanes(vd& u, vd& v) {
    if (planted("an_accumulator_is_lost")) u_[3] = V{};
    flush(u_[0], u_[1], u_[2], u_[3], v_[0], v_[1], v_[2], v_[3]);
    u = wide_u_.lanes();
    v = wide_v_.lanes();
  }
  NK_INLINE void total(double& u, double& v) {
    vd all_u, all_v;
    lanes(all_u, all_v);
    u = sum_lanes(all_u);
    v = sum_lanes(all_v);
  }

 private:
  NK_INLINE void flush(V u0, V u1, V u2, V u3, V v0, V v1, V v2, V v3) {
    wide_u_.add((u0 + u1) + (u2 + u3));
    wide_v_.add((v0 + v1) + (v2 + v3));
    pending_ = 0;
  }
  V u_[4]{}, v_[4]{};
  Wide<C> wide_u_, wide_v_;
  int64_t pending_ = 0;
};

// The same where there are few vectors: at most kShort of them, so that the lanes need no
// double before they are summed. The first `head` values have a vector of their own.
constexpr int64_t kShort = 16;
template <class C, class Term>
NK_INLINE void short_sums(int64_t head, int64_t n, const Term& term, Vec<C>& u, Vec<C>& v) {
  constexpr int W = Lanes<C>::count;
  Vec<C> u0{}, u1{}, v0{}, v1{}, d;
  if (head) {
    term(0, First{head}, u, d); u1 += u; v1 = fused(u, d, v1);
  }
  int64_t i = head;
  for (; i + 2 * W <= n; i += 2 * W) {
    term(i, Full{}, u, d); u0 += u; v0 = fused(u, d, v0);
    term(i + W, Full{}, u, d); u1 += u; v1 = fused(u, d, v1);
  }
  if (i + W <= n) {
    term(i, Full{}, u, d); u0 += u; v0 = fused(u, d, v0);
    i += W;
  }
  if (i < n && !planted("short_sums_drop_their_tail")) {
    term(i, First{n - i}, u, d); u1 += u; v1 = fused(u, d, v1);
  }
  u = u0 + u1;
  v = v0 + v1;
}

}  // namespace NK_ISA
}  // namespace normkit
