// The kernels for one instruction set; compiled once for each, with NK_ISA its name.
#include "columns.hpp"
#include "rows.hpp"
#include "runs.hpp"

#include "kernels.hpp"

namespace normkit {
namespace NK_ISA {
namespace {

// Below this many neighbours a vector would be mostly empty.
constexpr int64_t kShortRun = 16;

template <class T, class Body> void with_layout(const Call& call, const Body& body) {
  if (call.O > 1 && (call.affine == kPerElement || call.I < kShortRun) && call.M == 1) {
    return body(Columns<T>(call));
  }
  if (call.O == 1 && call.M == 1 && call.affine == kPerElement) {
    return body(Rows<T>(call));
  }
  if (call.O == 1 && call.M > 1 && call.I < kShortRun) return body(Rows<T>(call));
  return body(Runs<T>(call));
}

template <class Body> int with_dtype(const Call& call, const Body& body) {
  switch (call.dtype) {
    case kFloat32: with_layout<float>(call, body); return 0;
    case kBFloat16: with_layout<bf16>(call, body); return 0;
    case kFloat16: with_layout<fp16>(call, body); return 0;
    case kFloat64: with_layout<double>(call, body); return 0;
    default: return 1;
  }
}

}  // namespace

int forward(const Call& call) {
  return with_dtype(call, [](const auto& layout) { layout.forward(); });
}
int backward(const Call& call) {
  return with_dtype(call, [](const auto& layout) { layout.backward(); });
}
int apply_grads(const Call& call) {
  return with_dtype(call, [](const auto& layout) { layout.apply_grads(); });
}

}  // namespace NK_ISA
}  // namespace normkit
