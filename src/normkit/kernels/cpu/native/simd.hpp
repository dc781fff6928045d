// Vectors of the instruction set this file is compiled for.
//
// Vec<float> and Vec<double> are GCC/Clang vector types; half precision is widened to
// float when loaded and rounded to nearest even when stored. Arithmetic is plain
// operators: nothing here allows the compiler to assume that NaN or Inf do not occur.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fault.hpp"
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define NK_BYTES 64
#elif defined(__AVX2__)
#define NK_BYTES 32
#else
#define NK_BYTES 16
#endif
#define NK_INLINE inline __attribute__((always_inline))
#define NK_BODY __attribute__((always_inline))  // of a lambda in an inner loop
// Out of line, off the path of small inputs.
#define NK_RARE(condition) __builtin_expect(!!(condition), 0)

namespace normkit {
namespace NK_ISA {

using vf = float __attribute__((vector_size(NK_BYTES)));
using vd = double __attribute__((vector_size(NK_BYTES)));
using vi = int32_t __attribute__((vector_size(NK_BYTES)));
using vu = uint32_t __attribute__((vector_size(NK_BYTES)));
using vl = int64_t __attribute__((vector_size(NK_BYTES)));
using half_vf = float __attribute__((vector_size(NK_BYTES / 2)));
using half_vu = uint16_t __attribute__((vector_size(NK_BYTES / 2)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <class T> struct Traits { using Compute = float; };
template <> struct Traits<double> { using Compute = double; };
template <class T> using compute_t = typename Traits<T>::Compute;

template <class C> struct Lanes;
template <> struct Lanes<float> {
  using Vec = vf;
  using Mask = vi;
  using Bytes = uint8_t __attribute__((vector_size(NK_BYTES / 4)));
  static constexpr int count = NK_BYTES / 4;
};
template <> struct Lanes<double> {
  using Vec = vd;
  using Mask = vl;
  using Bytes = uint8_t __attribute__((vector_size(NK_BYTES / 8)));
  static constexpr int count = NK_BYTES / 8;
};
template <class C> using Vec = typename Lanes<C>::Vec;
template <class C> using Mask = typename Lanes<C>::Mask;

NK_INLINE vf splat(float v) { return v - vf{}; }
NK_INLINE vd splat(double v) { return v - vd{}; }
template <class V, class M> NK_INLINE V select(M m, V a, V b) { return m ? a : b; }

// a·b + c with one rounding where the instruction set has it. Explicit everywhere and
// never left to the compiler, which contracts a whole vector and a partial one, or two
// copies of a loop, differently: a value must not depend on where in a vector it lies.
NK_INLINE vf fused(vf a, vf b, vf c) {
#if NK_BYTES == 64
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif NK_BYTES == 32
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
NK_INLINE vd fused(vd a, vd b, vd c) {
#if NK_BYTES == 64
  return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif NK_BYTES == 32
  return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// All lanes of a vector, or the first n.
struct Full {};
struct First { int64_t n; };

// Lanes below n.
template <class C> NK_INLINE Mask<C> first_lanes(int64_t n) {
  Mask<C> lane;
  for (int k = 0; k < Lanes<C>::count; ++k) lane[k] = k;
  using E = std::remove_reference_t<decltype(lane[0])>;
  return lane < static_cast<E>(n) - Mask<C>{};
}

// Loads ------------------------------------------------------------------------------
NK_INLINE vf load(const float* p) {
  using unaligned = float __attribute__((vector_size(NK_BYTES), aligned(4), may_alias));
  return *reinterpret_cast<const unaligned*>(p);
}
NK_INLINE vd load(const double* p) {
  using unaligned =
      double __attribute__((vector_size(NK_BYTES), aligned(8), may_alias));
  return *reinterpret_cast<const unaligned*>(p);
}
NK_INLINE half_vu load_bits(const void* p) {
  using unaligned =
      uint16_t __attribute__((vector_size(NK_BYTES / 2), aligned(2), may_alias));
  return *reinterpret_cast<const unaligned*>(p);
}
NK_INLINE void store_bits(void* p, half_vu v) {
  using unaligned =
      uint16_t __attribute__((vector_size(NK_BYTES / 2), aligned(2), may_alias));
  *reinterpret_cast<unaligned*>(p) = v;
}
// GCC 12 converts between element widths in halves: four shuffles for one.
NK_INLINE vu widen_bits(half_vu bits) {
#if NK_BYTES == 64
  return (vu)_mm512_cvtepu16_epi32((__m256i)bits);
#elif NK_BYTES == 32
  return (vu)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, vu);
#endif
}
NK_INLINE half_vu narrow_bits(vu bits) {
#if NK_BYTES == 64
  return (half_vu)_mm512_cvtepi32_epi16((__m512i)bits);
#elif NK_BYTES == 32
  __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  return (half_vu)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8));
#else
  return __builtin_convertvector(bits, half_vu);
#endif
}
NK_INLINE vf widen_bf16(half_vu bits) { return (vf)(widen_bits(bits) << 16); }
NK_INLINE vf load(const bf16* p) { return widen_bf16(load_bits(p)); }

// Half precision without hardware: rebias the exponent by a multiplication, which also
// makes subnormals right; Inf and NaN get their exponent back.
NK_INLINE vf widen_fp16(half_vu bits) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__) && NK_BYTES == 32
  return (vf)_mm256_cvtph_ps((__m128i)bits);
#else
  vu wide = widen_bits(bits);
  vu sign = (wide & 0x8000u) << 16, rest = (wide & 0x7fffu) << 13;
  vf scaled = (vf)rest * 0x1p112f;
  vu is_special = (vu)((wide & 0x7c00u) == 0x7c00u);
  return (vf)(((vu)scaled | (is_special & 0x7f800000u)) | sign);
#endif
}
NK_INLINE vf load(const fp16* p) { return widen_fp16(load_bits(p)); }

// Stores -----------------------------------------------------------------------------
// The bits of the nearest bfloat16, in the low half of each lane.
NK_INLINE vu rounded_bf16(vf v) {
  vu u = (vu)v;
  if (planted("bfloat16_is_cut_off")) return u >> 16;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return select(v != v, vu{} + 0x7fc0u, rounded);
}
NK_INLINE half_vu narrow_bf16(vf v) { return narrow_bits(rounded_bf16(v)); }
NK_INLINE half_vu narrow_fp16(vf v) {
#if defined(__AVX512F__)
  return (half_vu)_mm512_cvtps_ph((__m512)v, 0);
#elif defined(__F16C__) && NK_BYTES == 32
  return (half_vu)_mm256_cvtps_ph((__m256)v, 0);
#else
  // Adding a number whose last bit has the weight of the target's last bit rounds
  // there, subnormals included.
  vu u = (vu)v, sign = (u >> 16) & 0x8000u, size = u & 0x7fffffffu;
  vf magnitude = (vf)size;
  vu normal = ((size + 0xfffu + ((size >> 13) & 1u)) >> 13) - (112u << 10);
  vu subnormal = (vu)(magnitude + 0.5f) - 0x3f000000u;
  if (planted("float16_has_no_subnormals")) subnormal = vu{};
  vu bits = select(size < 0x38800000u + vu{}, subnormal, normal);
  bits = select(size >= 0x477ff000u + vu{}, vu{} + 0x7c00u, bits);
  bits = select(v != v, vu{} + 0x7e00u, bits);
  return narrow_bits(bits | sign);
#endif
}
NK_INLINE void store(float* p, vf v) {
  using unaligned = float __attribute__((vector_size(NK_BYTES), aligned(4), may_alias));
  *reinterpret_cast<unaligned*>(p) = v;
}
NK_INLINE void store(double* p, vd v) {
  using unaligned =
      double __attribute__((vector_size(NK_BYTES), aligned(8), may_alias));
  *reinterpret_cast<unaligned*>(p) = v;
}
NK_INLINE void store(bf16* p, vf v) { store_bits(p, narrow_bf16(v)); }
NK_INLINE void store(fp16* p, vf v) { store_bits(p, narrow_fp16(v)); }

// Past the caches; p is aligned to the stored width.
NK_INLINE void stream(float* p, vf v) {
#if NK_BYTES == 64
  _mm512_stream_ps(p, (__m512)v);
#elif NK_BYTES == 32
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
NK_INLINE void stream(double* p, vd v) {
#if NK_BYTES == 64
  _mm512_stream_pd(p, (__m512d)v);
#elif NK_BYTES == 32
  _mm256_stream_pd(p, (__m256d)v);
#else
  store(p, v);
#endif
}
NK_INLINE void stream_bits(void* p, half_vu v) {
#if NK_BYTES == 64
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif NK_BYTES == 32
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  store_bits(p, v);
#endif
}
NK_INLINE void stream(bf16* p, vf v) { stream_bits(p, narrow_bf16(v)); }
NK_INLINE void stream(fp16* p, vf v) { stream_bits(p, narrow_fp16(v)); }
NK_INLINE void stream_copy(void* to, const void* from, int64_t bytes) {
#if NK_BYTES >= 32
  auto* out = static_cast<char*>(to);
  auto* in = static_cast<const char*>(from);
  int64_t head = (int64_t)(-reinterpret_cast<uintptr_t>(out) & (NK_BYTES - 1));
  if (head > bytes) head = bytes;
  std::memcpy(out, in, (size_t)head);
  int64_t at = head;
  for (; at + NK_BYTES <= bytes; at += NK_BYTES) {
    stream(reinterpret_cast<float*>(out + at), load(reinterpret_cast<const float*>(in + at)));
  }
  std::memcpy(out + at, in + at, (size_t)(bytes - at));
#else
  std::memcpy(to, from, (size_t)bytes);
#endif
}
// Before another thread reads streamed values.
NK_INLINE void finish_streams() {
#if NK_BYTES >= 32
  _mm_sfence();
#endif
}

// The first n < lanes values, the rest `fill` --------------------------------------------
template <class T>
NK_INLINE Vec<compute_t<T>> load_first(const T* p, int64_t n, Vec<compute_t<T>> fill) {
  [[maybe_unused]] constexpr int lanes = Lanes<compute_t<T>>::count;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return (vf)_mm512_mask_loadu_ps((__m512)fill, (__mmask16)((1u << n) - 1), p);
  } else if constexpr (std::is_same_v<T, double>) {
    return (vd)_mm512_mask_loadu_pd((__m512d)fill, (__mmask8)((1u << n) - 1), p);
  } else {
    auto some = (__mmask16)((1u << n) - 1);
    auto bits = (half_vu)_mm256_maskz_loadu_epi16(some, p);
    vf wide;
    if constexpr (std::is_same_v<T, bf16>) wide = widen_bf16(bits);
    else wide = widen_fp16(bits);
    return (vf)_mm512_mask_mov_ps((__m512)fill, some, (__m512)wide);
  }
#else
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    vi some = first_lanes<float>(n);
    return select(some, (vf)_mm256_maskload_ps(p, (__m256i)some), fill);
  }
#endif
  T some[lanes] = {};
  for (int64_t k = 0; k < n; ++k) some[k] = p[k];
  return select(first_lanes<compute_t<T>>(n), load(some), fill);
#endif
}
template <class T>
NK_INLINE void store_first(T* p, int64_t n, Vec<compute_t<T>> v) {
  [[maybe_unused]] constexpr int lanes = Lanes<compute_t<T>>::count;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
  } else {
    half_vu bits;
    if constexpr (std::is_same_v<T, bf16>) bits = narrow_bf16(v);
    else bits = narrow_fp16(v);
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)bits);
  }
#else
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    _mm256_maskstore_ps(p, (__m256i)first_lanes<float>(n), (__m256)v);
    return;
  }
#endif
  T some[lanes];
  store(some, v);
  for (int64_t k = 0; k < n; ++k) p[k] = some[k];
#endif
}

// As many bytes as a vector has lanes, one in each lane. GCC 12 converts vectors of bytes
// one by one: 50 instructions for 16.
template <class C> NK_INLINE Mask<C> widen_bytes(const uint8_t* p) {
  typename Lanes<C>::Bytes some;
  std::memcpy(&some, p, sizeof some);
#if NK_BYTES == 64
  if constexpr (sizeof(C) == 4) return (vi)_mm512_cvtepu8_epi32((__m128i)some);
  else return (vl)_mm512_cvtepu8_epi64(_mm_set_epi64x(0, (int64_t)some));
#elif NK_BYTES == 32
  if constexpr (sizeof(C) == 4) {
    return (vi)_mm256_cvtepu8_epi32(_mm_set_epi64x(0, (int64_t)some));
  } else {
    return (vl)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128((int32_t)some));
  }
#else
  return __builtin_convertvector(some, Mask<C>);
#endif
}

// Which of n values count; a null mask counts all of them.
template <class C> NK_INLINE Mask<C> load_mask(const uint8_t* p, int64_t n) {
  if (!p) return first_lanes<C>(n);
  if (n == Lanes<C>::count) return widen_bytes<C>(p) != Mask<C>{};
  Mask<C> lanes{};
  for (int64_t k = 0; k < n; ++k) lanes[k] = p[k] ? -1 : 0;
  return lanes;
}

// How many of n values count.
NK_INLINE int64_t count_valid(const uint8_t* mask, int64_t n) {
  int64_t valid = 0, i = 0;
#if NK_BYTES == 64
  for (; i + 64 <= n; i += 64) {
    const __m512i some = _mm512_loadu_si512(mask + i);
    valid += __builtin_popcountll(_mm512_test_epi8_mask(some, some));
  }
#elif NK_BYTES == 32
  for (; i + 32 <= n; i += 32) {
    const __m256i some = _mm256_loadu_si256((const __m256i*)(mask + i));
    const __m256i hidden = _mm256_cmpeq_epi8(some, _mm256_setzero_si256());
    valid += 32 - __builtin_popcount((unsigned)_mm256_movemask_epi8(hidden));
  }
#endif
  for (; i < n; ++i) valid += mask[i] != 0;
  return valid;
}

// Scalars of any dtype -------------------------------------------------------------------
NK_INLINE double to_double(float v) { return v; }
NK_INLINE double to_double(double v) { return v; }
NK_INLINE double to_double(bf16 v) {
  uint32_t bits = (uint32_t)v.bits << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
NK_INLINE double to_double(fp16 v) {
  half_vu bits{};
  bits[0] = v.bits;
  return widen_fp16(bits)[0];
}
NK_INLINE void from_double(double v, float* p) { *p = (float)v; }
NK_INLINE void from_double(double v, double* p) { *p = v; }
NK_INLINE void from_double(double v, bf16* p) {
  p->bits = narrow_bf16(vf{} + (float)v)[0];
}
NK_INLINE void from_double(double v, fp16* p) {
  p->bits = narrow_fp16(vf{} + (float)v)[0];
}

}  // namespace NK_ISA
}  // namespace normkit
