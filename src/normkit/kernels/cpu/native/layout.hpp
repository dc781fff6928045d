// Base of the layouts of statistics: the call, its values, its learned vectors.
#pragma once
#include <algorithm>

#include "elements.hpp"
#include "learned.hpp"
#include "pool.hpp"
#include "scratch.hpp"
#include "statistics.hpp"
#include "sums.hpp"

namespace normkit {
namespace NK_ISA {

template <class T> class Layout {
 protected:
  using C = compute_t<T>;
  using V = Vec<C>;
  static constexpr int W = Lanes<C>::count;

  explicit Layout(const Call& call)
      : call_(call),
        e_(call),
        length_(call.M * call.I),
        weight_(call.weight, call.weight_dtype, call.affine_size(), 1),
        bias_(call.bias, call.bias_dtype, call.affine_size(), 0) {}

  bool wants_learned() const { return call_.dweight || call_.dbias; }
  bool wants_sums() const {
    return wants_learned() || call_.sum_dy || !call_.has(kGiven);
  }
  // Whether the sums that dx needs, or the caller, are of dy·weight.
  bool is_weighted() const { return !call_.sum_dy || call_.has(kWeighted); }

  NK_INLINE double center_of(int64_t stat) const {
    return call_.has(kCentered) ? call_.center[stat] : 0;
  }
  NK_INLINE double count_of(int64_t stat) const {
    return (double)(call_.mask && call_.count ? call_.count[stat] : call_.values());
  }

  // `is_gated`: dresidual already holds dy·act′.
  Elements<T> gated_elements(bool is_gated) const {
    Elements<T> e = e_;
    if (is_gated && e.dresidual) {
      e.dy = e.dresidual;
      e.dresidual = nullptr;
      e.activation = kNone;
    }
    return e;
  }

  // body(i, lanes) over [0, n), two vectors at once if InTwos; where outputs stream, whole
  // vectors are aligned.
  template <bool InTwos, class Body>
  static NK_INLINE void streamed(bool streams, const T* out, int64_t n,
                                 const Body& body) {
    const int64_t before = streams ? before_aligned(out) : 0;
    int64_t i = 0, some = std::min(before % W, n);
    for (;;) {
      if (some) body(i, First{some});
      i += some;
      if constexpr (InTwos) {
        if (i < before && i + W <= n) body(i, Full{}), i += W;
        for (; i + 2 * W <= n; i += 2 * W) body(i, Both{});
      }
      for (; i + W <= n; i += W) body(i, Full{});
      some = n - i;
      if (!some || planted("runs_drop_their_tail")) return;
    }
  }

  const Call& call_;
  const Elements<T> e_;
  const int64_t length_;
  const Learned<C> weight_, bias_;
};

}  // namespace NK_ISA
}  // namespace normkit
