// The struct of one call: geometry, options, pointers.
//
// Memory order of x is (b, o, g, m, i), dense. One statistic per (b, g), over all
// o, m and i:
//
//   batch norm   NCHW (1, N, C, 1, HW)     channels_last (1, NHW, C, 1, 1)
//   layer norm   (1, 1, R, 1, K)           instance norm NCHW (1, 1, NC, 1, HW)
//                                          channels_last (N, HW, C, 1, 1)
//   group norm   NCHW (1, 1, NG, C/G, HW)  channels_last (N, HW, G, 1, C/G)
//
// The learned affine has one entry per (g mod P, m) when `affine` is PerRun and one per
// (g mod P, i) when it is PerElement.
//
// Every field is 8 bytes wide: Python packs the struct with one format string.
#pragma once
#include <cstdint>

namespace normkit {

enum Dtype : int64_t { kFloat32, kBFloat16, kFloat16, kFloat64 };
enum Affine : int64_t { kPerRun, kPerElement };
enum Activation : int64_t {
  kNone, kRelu, kLeakyRelu, kSilu, kGelu, kSigmoid, kTanh
};
enum Flags : int64_t {
  kCentered = 1,        // subtract the mean; otherwise divide by the root mean square
  kGiven = 2,           // statistics come from the caller and are constants
  kWeighted = 4,        // the sums of `reduce` are of dy·weight
  kStream = 8,          // outputs go past the caches
  kSkipNonfinite = 32,  // a batch with a NaN or Inf moves no running statistic
  kEqualShares = 64,    // the rate is 1/(num_batches_tracked + 1)
  kRowMask = 128,       // spans with P = 1: the mask has a byte for each statistic
  kKnownFlags = 1 + 2 + 4 + 8 + 32 + 64 + 128,
};

struct Call {
  // The same for every call of one signature.
  int64_t B, O, G, M, I, P;
  int64_t affine, dtype, weight_dtype, bias_dtype, mean_dtype, var_dtype;
  int64_t activation, flags, threads;
  double eps, slope;
  // New at every call. A null pointer: absent, or not wanted. With a `sum` (spans only)
  // x + residual is written there and normalized; in backward x is that sum, and `dsum`
  // its own gradient, which is added to dx.
  double rate;
  const void *x, *residual;
  const uint8_t* mask;
  const void *weight, *bias, *dy, *gate, *dsum;
  void *y, *dx, *dresidual, *sum, *dweight, *dbias;
  double *center, *scale, *m2;
  int64_t* count;
  double *sum_dy, *sum_dyx;
  const double *b, *c;
  // Forward only. With kGiven they are the statistics, unless there is a center;
  // otherwise they are updated by `rate` with those of the batch.
  void *running_mean, *running_var;
  int64_t *num_batches_tracked, *num_batches_skipped;

  bool has(Flags flag) const { return flags & flag; }
  int64_t statistics() const { return B * G; }
  int64_t values() const { return O * M * I; }
  int64_t affine_size() const { return P * (affine == kPerRun ? M : I); }
};

}  // namespace normkit
