// The coefficients of runs of neighbours, in vectors.
#pragma once
#include "spans.hpp"

namespace normkit {
namespace NK_ISA {

// Of one vector: y = (x − hi)·a + shift, dx = g·a + (x − hi)·b + c.
template <class C> struct Lines {
  using V = Vec<C>;
  V hi, a, shift, b, c;

  // The lanes of `first`, and the others of `then`.
  static NK_INLINE Lines joined(Mask<C> is_first, const Lines& first, const Lines& then) {
    return {select(is_first, first.hi, then.hi), select(is_first, first.a, then.a),
            select(is_first, first.shift, then.shift), select(is_first, first.b, then.b),
            select(is_first, first.c, then.c)};
  }
};

// Of some runs, one after another.
template <class C> struct RunMaps {
  const C *hi, *a, *shift, *b, *c;

  NK_INLINE Lines<C> operator[](int64_t run) const {
    return {splat(hi[run]), splat(a[run]), splat(shift[run]), splat(b[run]),
            splat(c[run])};
  }
};

using Even = std::integral_constant<int, 0>;
using Odd = std::integral_constant<int, 1>;

// Processes `runs` runs of `size` neighbours, at least a vector each, in vectors from end to
// end: begin(run) before the first vector that begins in a run; body(i, lanes, parity) for
// a vector within it; seam(i, n, run) for one whose lanes from n on are of the run after.
template <int W, class Begin, class Body, class Seam>
NK_INLINE void walk(int64_t runs, int64_t size, const Begin& begin, const Body& body,
                    const Seam& seam) {
  int64_t i = 0, stop = size;
  for (int64_t run = 0; run < runs; ++run, stop += size) {
    begin(run);
    for (; i + 2 * W <= stop; i += 2 * W) {
      body(i, Full{}, Even{});
      body(i + W, Full{}, Odd{});
    }
    if (i + W <= stop) {
      body(i, Full{}, Even{});
      i += W;
    }
    if (i == stop || planted("seams_are_left_out")) continue;
    if (run + 1 == runs) {
      body(i, First{stop - i}, Odd{});
    } else {
      seam(i, stop - i, run);
      i += W;
    }
  }
}

}  // namespace NK_ISA
}  // namespace normkit
