// Operations on one vector of elements, the same in every layout.
#pragma once
#include "activation.hpp"
#include "both.hpp"
#include "call.hpp"
#include "simd.hpp"

namespace normkit {
namespace NK_ISA {

// The cases with an inner loop of their own; everything else is kAny.
enum Kind { kPlain, kReluOnly, kAdd, kGated, kAny };

template <int K> struct KindTag { static constexpr int kind = K; };

template <class T> struct Elements {
  using C = compute_t<T>;
  using V = Vec<C>;
  static constexpr int W = Lanes<C>::count;

  const T *x, *residual, *dy, *gated, *dsum;
  const uint8_t* mask;
  T *y, *dx, *dresidual;
  int64_t activation;
  V slope, floor;
  bool streams;

  explicit Elements(const Call& call)
      : x(static_cast<const T*>(call.sum ? call.sum : call.x)),
        residual(static_cast<const T*>(call.sum ? nullptr : call.residual)),
        dy(static_cast<const T*>(call.dy)),
        gated(static_cast<const T*>(call.gate)),
        dsum(static_cast<const T*>(call.dsum)),
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
  template <class P, class Fill> static NK_INLINE Two get(const P* p, Both, Fill) {
    return load_two(p);
  }
  static NK_INLINE Two get(const C* p, Both) { return load_two(p); }
  // Where outputs stream, whole vectors have to be aligned. The branch costs a cycle; as
  // a template parameter it doubled the library.
  NK_INLINE void put(T* p, V v, Full) const {
    if (NK_RARE(streams)) stream(p, v);
    else store(p, v);
  }
  NK_INLINE void put(T* p, V v, First f) const { store_first(p, f.n, v); }
  NK_INLINE void put(T* p, Two v, Both) const {
    if (NK_RARE(streams)) store_two<true>(p, v);
    else store_two<false>(p, v);
  }
  static NK_INLINE void keep(T* p, V v, Full) { store(p, v); }
  static NK_INLINE void keep(T* p, V v, First f) { store_first(p, f.n, v); }
  static NK_INLINE void keep(T* p, Two v, Both) { store_two<false>(p, v); }
  NK_INLINE Mask<C> valid(int64_t at, Full) const {
    return load_mask<C>(mask ? mask + at : nullptr, W);
  }
  NK_INLINE Mask<C> valid(int64_t at, First f) const {
    return load_mask<C>(mask ? mask + at : nullptr, f.n);
  }

  // x − hi, 0 where masked, also for a masked NaN.
  template <int K, class L, class H>
  NK_INLINE auto centered(int64_t at, L lanes, H hi) const {
    auto d = get(x + at, lanes, hi) - hi;
    if constexpr (K == kAny) {
      if (planted("what_is_masked_is_measured")) return d;
      if (mask) d = select(valid(at, lanes), d, V{});
    }
    return d;
  }

  // act(z [+ residual]), 0 where masked.
  template <int K, class L, class Z>
  NK_INLINE Z finish(Z z, int64_t at, L lanes) const {
    if (K == kReluOnly && planted("relu_swallows_a_nan")) z = select(z != z, V{}, z);
    if constexpr (K == kReluOnly) return select(z < V{}, V{}, z);
    [[maybe_unused]] const bool forgets = planted("the_residual_is_forgotten");
    if constexpr (K == kAdd) {
      if (!forgets) z = z + get(residual + at, lanes, V{});
      return select(z < floor, floor, z);
    }
    if constexpr (K == kAny) {
      if (residual && !forgets) z += get(residual + at, lanes, V{});
      z = activate(activation, z, slope);
      if (mask) z = select(valid(at, lanes), z, V{});
    }
    return z;
  }

  // dy·act′, 0 where masked; z is used only where the kind recomputes it.
  template <int K, class L, class Z>
  NK_INLINE auto gradient(int64_t at, L lanes, const Z& z) const {
    auto g = get(dy + at, lanes, V{});
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

  // Whether loops over elements of kind K take two vectors at once.
  template <int K> static constexpr bool in_twos = comes_in_twos<T> && K != kAny;

  template <class Body> auto with_forward_kind(const Body& body) const {
    const bool is_simple = !mask && (activation == kNone || activation == kRelu);
    if (is_simple && !residual && activation == kNone) return body(KindTag<kPlain>{});
    if constexpr (has_relu_kinds) {
      if (is_simple && !residual) return body(KindTag<kReluOnly>{});
      if (is_simple) return body(KindTag<kAdd>{});
    }
    return body(KindTag<kAny>{});
  }
  template <class Body> auto with_backward_kind(const Body& body) const {
    if (!mask && activation == kNone) return body(KindTag<kPlain>{});
    if constexpr (has_relu_kinds) {
      if (!mask && activation == kRelu) {
        if (gated) return body(KindTag<kGated>{});
        if (!residual) return body(KindTag<kReluOnly>{});
      }
    }
    return body(KindTag<kAny>{});
  }

 private:
  // In float16 and float64 what follows the norm is left to the general loop, which takes
  // up to twice the time: its kinds are half a megabyte of the library.
  static constexpr bool has_relu_kinds =
      std::is_same_v<T, float> || std::is_same_v<T, bf16>;
};

// body(at, Full) for whole vectors of [0, n), then body(at, First) for the rest; before
// them body(at, Both), if InTwos.
template <int W, bool InTwos = false, class Body>
NK_INLINE void each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  if constexpr (InTwos) {
    for (; i + 2 * W <= n; i += 2 * W) body(i, Both{});
  }
  for (; i + W <= n; i += W) body(i, Full{});
  if (planted("columns_drop_their_tail")) return;
  if (i < n) body(i, First{n - i});
}

// Bytes that are written past the caches at once.
template <class T>
constexpr uintptr_t kStreamed =
    Lanes<compute_t<T>>::count * sizeof(T) * (comes_in_twos<T> ? 2 : 1);
// Number of leading values before an address that can be streamed to.
template <class T> NK_INLINE int64_t before_aligned(const T* p) {
  constexpr uintptr_t width = kStreamed<T>;
  return (int64_t)((-reinterpret_cast<uintptr_t>(p) & (width - 1)) / sizeof(T));
}

}  // namespace NK_ISA
}  // namespace normkit
