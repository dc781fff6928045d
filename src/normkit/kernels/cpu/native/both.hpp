// Two vectors of bfloat16 values at once.
//
// A vector of halves widens to two vectors of floats. In the order of memory that takes a
// shuffle and a shift each, and as many to narrow them. Unpacked against zeros, the values
// 0–3 of every eight come out in one vector, 4–7 in the other, one instruction each and
// shifted already; packing is the inverse. What is done to single values does not see the
// order. Batch norm in eval on AVX2: 0.65 of the time, 0.83 where memory limits it.
#pragma once
#include "simd.hpp"

namespace normkit {
namespace NK_ISA {

// Lanes: a whole vector of halves.
struct Both {};
// Whether values of a dtype can be taken two vectors at once, with elements of kind K.
template <class T>
constexpr bool comes_in_twos = std::is_same_v<T, bf16> && NK_BYTES >= 32;

struct TwoMasks { vi low, high; };
struct Two {
  vf low, high;
};

NK_INLINE vf low_of(vf v) { return v; }
NK_INLINE vf high_of(vf v) { return v; }
NK_INLINE vf low_of(Two v) { return v.low; }
NK_INLINE vf high_of(Two v) { return v.high; }

#define NK_OF_TWO(Result, op)                                                   \
  template <class B> NK_INLINE Result operator op(Two a, B b) {                 \
    return {a.low op low_of(b), a.high op high_of(b)};                          \
  }
NK_OF_TWO(Two, +)
NK_OF_TWO(Two, -)
NK_OF_TWO(Two, *)
NK_OF_TWO(Two, /)
NK_OF_TWO(TwoMasks, <)
NK_OF_TWO(TwoMasks, <=)
NK_OF_TWO(TwoMasks, !=)
#undef NK_OF_TWO

template <class A, class B> NK_INLINE Two select(TwoMasks m, A a, B b) {
  return {select(m.low, low_of(a), low_of(b)), select(m.high, high_of(a), high_of(b))};
}
template <class B, class C> NK_INLINE Two fused(Two a, B b, C c) {
  return {fused(a.low, low_of(b), low_of(c)), fused(a.high, high_of(b), high_of(c))};
}

// Each 16 bytes of a vector are unpacked and packed by themselves.
NK_INLINE Two load_two(const bf16* p) {
#if NK_BYTES == 64
  const __m512i bits = _mm512_loadu_si512(p), zeros = _mm512_setzero_si512();
  return {(vf)_mm512_unpacklo_epi16(zeros, bits), (vf)_mm512_unpackhi_epi16(zeros, bits)};
#elif NK_BYTES == 32
  const __m256i bits = _mm256_loadu_si256((const __m256i*)p), zeros = _mm256_setzero_si256();
  return {(vf)_mm256_unpacklo_epi16(zeros, bits), (vf)_mm256_unpackhi_epi16(zeros, bits)};
#else
  return {load(p), load(p + Lanes<float>::count)};
#endif
}
// Floats in the order that the halves beside them have.
NK_INLINE Two load_two(const float* p) {
  const vf first = load(p), then = load(p + Lanes<float>::count);
#if NK_BYTES == 64
  return {(vf)_mm512_shuffle_f32x4((__m512)first, (__m512)then, 0x88),
          (vf)_mm512_shuffle_f32x4((__m512)first, (__m512)then, 0xdd)};
#elif NK_BYTES == 32
  return {(vf)_mm256_permute2f128_ps((__m256)first, (__m256)then, 0x20),
          (vf)_mm256_permute2f128_ps((__m256)first, (__m256)then, 0x31)};
#else
  return {first, then};
#endif
}
NK_INLINE void store_two(float* p, Two v) {
#if NK_BYTES == 64
  const __m512 low = (__m512)v.low, high = (__m512)v.high;
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i then = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  store(p, (vf)_mm512_permutex2var_ps(low, first, high));
  store(p + Lanes<float>::count, (vf)_mm512_permutex2var_ps(low, then, high));
#elif NK_BYTES == 32
  const Two in_order = {
      (vf)_mm256_permute2f128_ps((__m256)v.low, (__m256)v.high, 0x20),
      (vf)_mm256_permute2f128_ps((__m256)v.low, (__m256)v.high, 0x31)};
  store(p, in_order.low);
  store(p + Lanes<float>::count, in_order.high);
#else
  store(p, v.low);
  store(p + Lanes<float>::count, v.high);
#endif
}
// `p` is aligned to a vector where the values go past the caches.
template <bool Streams> NK_INLINE void store_two(bf16* p, Two v) {
#if NK_BYTES == 64
  const __m512i bits = _mm512_packus_epi32((__m512i)rounded_bf16(v.low),
                                           (__m512i)rounded_bf16(v.high));
  if constexpr (Streams) _mm512_stream_si512((__m512i*)p, bits);
  else _mm512_storeu_si512(p, bits);
#elif NK_BYTES == 32
  const __m256i bits = _mm256_packus_epi32((__m256i)rounded_bf16(v.low),
                                           (__m256i)rounded_bf16(v.high));
  if constexpr (Streams) _mm256_stream_si256((__m256i*)p, bits);
  else _mm256_storeu_si256((__m256i*)p, bits);
#else
  store(p, v.low);
  store(p + Lanes<float>::count, v.high);
#endif
}

}  // namespace NK_ISA
}  // namespace normkit
