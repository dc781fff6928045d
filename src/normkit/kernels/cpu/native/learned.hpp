// Learned vectors of any dtype: weight and bias, and their gradients.
#pragma once
#include "call.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace normkit {
namespace NK_ISA {

// The stored dtype of a value of the compute type.
template <class C> constexpr int64_t dtype_of() {
  return sizeof(C) == 4 ? kFloat32 : kFloat64;
}

// A vector in the compute type, read in place if it has that dtype; filled with
// `otherwise` if there is none.
template <class C> class Learned {
 public:
  Learned(const void* p, int64_t dtype, int64_t size, C otherwise)
      : own_(p && dtype == dtype_of<C>() ? 0 : size),
        values_(own_.data() ? own_.data() : static_cast<const C*>(p)) {
    if (!own_.data()) return;
    if (!p) {
      std::fill(own_.data(), own_.data() + size, otherwise);
      return;
    }
    switch (dtype) {
      case kFloat32: read(static_cast<const float*>(p), size); break;
      case kBFloat16: read(static_cast<const bf16*>(p), size); break;
      case kFloat16: read(static_cast<const fp16*>(p), size); break;
      default: read(static_cast<const double*>(p), size);
    }
  }
  NK_INLINE C operator[](int64_t k) const { return values_[k]; }
  NK_INLINE const C* data() const { return values_; }

 private:
  template <class E> void read(const E* p, int64_t size) {
    int64_t k = 0;
    if constexpr (sizeof(E) == 2 && sizeof(C) == 4) {
      for (; k + Lanes<C>::count <= size; k += Lanes<C>::count) {
        store(own_.data() + k, load(p + k));
      }
    }
    for (; k < size; ++k) own_[k] = (C)to_double(p[k]);
  }
  const Scratch<C> own_;
  const C* const values_;
};

inline void store_learned(void* p, int64_t dtype, int64_t size, const double* values) {
  if (!p) return;
  const auto each = [&](auto* out) {
    for (int64_t k = 0; k < size; ++k) from_double(values[k], out + k);
  };
  switch (dtype) {
    case kFloat32: return each(static_cast<float*>(p));
    case kBFloat16: return each(static_cast<bf16*>(p));
    case kFloat16: return each(static_cast<fp16*>(p));
    default: each(static_cast<double*>(p));
  }
}

}  // namespace NK_ISA
}  // namespace normkit
