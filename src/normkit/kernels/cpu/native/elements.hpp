// What happens to one vector of elements, the same in every layout.
#pragma once
#include "activation.hpp"
#include "call.hpp"
#include "simd.hpp"

namespace normkit {
namespace NK_ISA {

// The cases with an inner loop of their own; everything else is kAny.
enum Kind { kPlain, kReluOnly, kAdd, kGated, kAny };

template <int K> struct KindTag { static constexpr int kind = K; };

// All lanes of a vector, or the first n.
struct Full {};
struct First { int64_t n; };

template <class T> struct Elements {
  using C = compute_t<T>;
  using V = Vec<C>;
  static constexpr int W = Lanes<C>::count;
  static constexpr int64_t kFetch = 8192 / sizeof(T);

  const T *x, *residual, *dy, *gated;
  const uint8_t* mask;
  T *y, *dx, *dresidual;
  int64_t activation;
  V slope, floor;
  bool streams;

  explicit Elements(const Call& call)
      : x(static_cast<const T*>(call.x)),
        residual(static_cast<const T*>(call.residual)),
        dy(static_cast<const T*>(call.dy)),
        gated(static_cast<const T*>(call.gate)),
        mask(call.mask),
        y(static_cast<T*>(call.y)),
        dx(static_cast<T*>(call.dx)),
        dresidual(static_cast<T*>(call.dresidual)),
        activation(call.activation),
        slope(splat((C)call.slope)),
        floor(splat(activation == kRelu ? (C)0 : -(C)INFINITY)),
        streams(call.has(kStream)) {}

  static NK_INLINE V get(const T* p, Full, V) { return load(p); }
  static NK_INLINE V get(const T* p, First f, V fill) {
    return load_first(p, f.n, fill);
  }
  static NK_INLINE V get(const C* p, Full) { return load(p); }
  static NK_INLINE V get(const C* p, First f) { return load_first(p, f.n, V{}); }
  // Where outputs stream, whole vectors have to be aligned. The branch costs a cycle; as
  // a template parameter it doubled the library.
  NK_INLINE void put(T* p, V v, Full) const {
    if (streams) stream(p, v);
    else store(p, v);
  }
  NK_INLINE void put(T* p, V v, First f) const { store_first(p, f.n, v); }
  static NK_INLINE void keep(T* p, V v, Full) { store(p, v); }
  static NK_INLINE void keep(T* p, V v, First f) { store_first(p, f.n, v); }
  NK_INLINE Mask<C> valid(int64_t at, Full) const {
    return load_mask<C>(mask ? mask + at : nullptr, W);
  }
  NK_INLINE Mask<C> valid(int64_t at, First f) const {
    return load_mask<C>(mask ? mask + at : nullptr, f.n);
  }

  // What is read after `at`, two pages on: the hardware's own prefetch stops at the end of
  // a page. 0.9 of the time forward and 0.7 backward in channels_last of 64 channels, and
  // nothing lost where rows are wide. An address beyond the end is not looked at.
  template <int K> NK_INLINE void fetch(int64_t at) const {
    __builtin_prefetch(x + at + kFetch);
    if constexpr (K == kAdd) __builtin_prefetch(residual + at + kFetch);
  }
  template <int K> NK_INLINE void fetch_gradient(int64_t at) const {
    __builtin_prefetch(x + at + kFetch);
    __builtin_prefetch(dy + at + kFetch);
    if constexpr (K == kGated) __builtin_prefetch(gated + at + kFetch);
  }

  // x − hi, 0 where masked: what is masked is never looked at, NaN included.
  template <int K, class L> NK_INLINE V centered(int64_t at, L lanes, V hi) const {
    V d = get(x + at, lanes, hi) - hi;
    if constexpr (K == kAny) {
      if (planted("what_is_masked_is_measured")) return d;
      if (mask) d = select(valid(at, lanes), d, V{});
    }
    return d;
  }

  // act(z [+ residual]), 0 where masked.
  template <int K, class L> NK_INLINE V finish(V z, int64_t at, L lanes) const {
    if (K == kReluOnly && planted("relu_swallows_a_nan")) z = select(z != z, V{}, z);
    if constexpr (K == kReluOnly) return select(z < V{}, V{}, z);
    if (planted("the_residual_is_forgotten")) return activate(activation, z, slope);
    if constexpr (K == kAdd) {
      z += get(residual + at, lanes, V{});
      return select(z < floor, floor, z);
    }
    if constexpr (K == kAny) {
      if (residual) z += get(residual + at, lanes, V{});
      z = activate(activation, z, slope);
      if (mask) z = select(valid(at, lanes), z, V{});
    }
    return z;
  }

  // dy·act′, 0 where masked; z is wanted only where the kind recomputes it.
  template <int K, class L, class Z>
  NK_INLINE V gradient(int64_t at, L lanes, const Z& z) const {
    V g = get(dy + at, lanes, V{});
    if (planted("every_gate_is_open")) return g;
    if constexpr (K == kReluOnly) return select(z() <= V{}, V{}, g);
    if constexpr (K == kGated) {
      return select(get(gated + at, lanes, V{}) <= V{}, V{}, g);
    }
    if constexpr (K == kAny) {
      if (activation == kRelu && gated) {
        g = select(get(gated + at, lanes, V{}) <= V{}, V{}, g);
      } else if (activation != kNone) {
        V pre = z();
        if (residual) pre += get(residual + at, lanes, V{});
        g = gate(activation, g, pre, slope);
      }
      if (planted("the_gradient_ignores_the_mask")) return g;
      if (mask) g = select(valid(at, lanes), g, V{});
    }
    return g;
  }

  template <class Body> auto with_forward_kind(const Body& body) const {
    if constexpr (is_fast) {
      bool is_simple = !mask && (activation == kNone || activation == kRelu);
      if (is_simple && !residual && activation == kNone) {
        return body(KindTag<kPlain>{});
      }
      if (is_simple && !residual) return body(KindTag<kReluOnly>{});
      if (is_simple) return body(KindTag<kAdd>{});
    }
    return body(KindTag<kAny>{});
  }
  template <class Body> auto with_backward_kind(const Body& body) const {
    if constexpr (is_fast) {
      if (!mask && activation == kNone) return body(KindTag<kPlain>{});
      if (!mask && activation == kRelu) {
        if (gated) return body(KindTag<kGated>{});
        if (!residual) return body(KindTag<kReluOnly>{});
      }
    }
    return body(KindTag<kAny>{});
  }

 private:
  // float16 and float64 have the general loop only: each kind costs a megabyte.
  static constexpr bool is_fast = std::is_same_v<T, float> || std::is_same_v<T, bf16>;
};

// body(at, Full) for whole vectors of [0, n), then body(at, First) for the rest.
template <int W, class Body> NK_INLINE void each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, Full{});
  if (planted("columns_drop_their_tail")) return;
  if (i < n) body(i, First{n - i});
}

// How many leading values keep p from an address that can be streamed to.
template <class T> NK_INLINE int64_t before_aligned(const T* p) {
  constexpr uintptr_t width = Lanes<compute_t<T>>::count * sizeof(T);
  return (int64_t)((-reinterpret_cast<uintptr_t>(p) & (width - 1)) / sizeof(T));
}

// Two sums of vectors at once, four accumulators each so that additions overlap.
template <class C> class PairSums {
 public:
  using V = Vec<C>;
  static constexpr int W = Lanes<C>::count;

  // term(at, lanes, u, v) gives the summands of one vector; lanes beyond First are 0.
  template <class Term> NK_INLINE void add(int64_t n, const Term& term) {
    V u0 = u_[0], u1 = u_[1], u2 = u_[2], u3 = u_[3];
    V v0 = v_[0], v1 = v_[1], v2 = v_[2], v3 = v_[3], u, v;
    int64_t i = 0;
    while (n - i >= 4 * W) {
      int64_t room = kFlush - pending_, steps = (n - i) / (4 * W);
      if (steps > room) steps = room;
      pending_ += steps;
      for (; steps > 0; --steps, i += 4 * W) {
        term(i, Full{}, u, v); u0 += u; v0 += v;
        term(i + W, Full{}, u, v); u1 += u; v1 += v;
        term(i + 2 * W, Full{}, u, v); u2 += u; v2 += v;
        term(i + 3 * W, Full{}, u, v); u3 += u; v3 += v;
      }
      if (pending_ >= kFlush) {
        flush(u0, u1, u2, u3, v0, v1, v2, v3);
        u0 = u1 = u2 = u3 = v0 = v1 = v2 = v3 = V{};
      }
    }
    for (; i + W <= n; i += W) {
      term(i, Full{}, u, v); u0 += u; v0 += v;
    }
    if (i < n && !planted("sums_drop_their_tail")) {
      term(i, First{n - i}, u, v); u1 += u; v1 += v;
    }
    if (++pending_ >= kFlush) {
      flush(u0, u1, u2, u3, v0, v1, v2, v3);
      u0 = u1 = u2 = u3 = v0 = v1 = v2 = v3 = V{};
    }
    u_[0] = u0; u_[1] = u1; u_[2] = u2; u_[3] = u3;
    v_[0] = v0; v_[1] = v1; v_[2] = v2; v_[3] = v3;
  }
  NK_INLINE void total(double& u, double& v) {
    if (planted("an_accumulator_is_lost")) u_[3] = V{};
    flush(u_[0], u_[1], u_[2], u_[3], v_[0], v_[1], v_[2], v_[3]);
    u = wide_u_.total();
    v = wide_v_.total();
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

}  // namespace NK_ISA
}  // namespace normkit
