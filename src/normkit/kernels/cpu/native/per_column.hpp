// Coefficients of the columns of a matrix, in vectors.
#pragma once
#include "layout.hpp"

namespace normkit {
namespace NK_ISA {

// N coefficients for each of `columns` columns, repeated up to `width`, as rows are read
// together; and once more in the order of `Both`, so that not every row shuffles them.
template <class T, int N> class PerColumn {
 public:
  using C = compute_t<T>;
  using V = Vec<C>;
  static constexpr int W = Lanes<C>::count;

  PerColumn(int64_t columns, int64_t width)
      : columns_(columns), width_(width), all_(N * width * (kTwos ? 2 : 1)) {}

  C* operator[](int k) const { return all_.data() + k * width_; }
  // Of the vector, or of two, from column j on.
  template <class Lanes> NK_INLINE V get(int k, int64_t j, Lanes lanes) const {
    return Elements<T>::get((*this)[k] + j, lanes);
  }
  NK_INLINE Two get(int k, int64_t j, Both) const {
    const C* v = (*this)[N + k] + j;
    return {load(v), load(v + W)};
  }

 protected:
  // The first `columns` of each are set; sets all others.
  void finish() const {
    for (int k = 0; k < N; ++k) {
      C* const v = (*this)[k];
      for (int64_t j = columns_; j < width_; ++j) v[j] = v[j - columns_];
      if constexpr (kTwos) {
        for (int64_t j = 0; j + 2 * W <= width_; j += 2 * W) {
          const Two two = load_two(v + j);
          store((*this)[N + k] + j, two.low);
          store((*this)[N + k] + j + W, two.high);
        }
      }
    }
  }

 private:
  static constexpr bool kTwos = comes_in_twos<T>;
  const int64_t columns_, width_;
  const Scratch<C> all_;
};

}  // namespace NK_ISA
}  // namespace normkit
