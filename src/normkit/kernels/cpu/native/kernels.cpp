// The kernels of one dtype for one instruction set. Compiled once for each pair, with
// NK_ISA the namespace, NK_DTYPE the name of the table and NK_TYPE the element.
#include "kernels.hpp"

#include "columns.hpp"
#include "groups.hpp"
#include "rows.hpp"
#include "runs.hpp"
#include "short_runs.hpp"

NK_DECLARE(NK_ISA)

namespace normkit {
namespace NK_ISA {
namespace {

// Below this many neighbours a vector would be mostly empty.
constexpr int64_t kShortRun = 16;
// Up to here tiles of runs are faster: three times at 49 neighbours, as fast at 784. Where
// all is in a cache they are slower from 64 neighbours on: 1.5 times the time at 256.
constexpr int64_t kTiled = 512, kTiledInCache = 63, kCacheBytes = 2 << 20;

// The choice depends on the layout of one statistic's values and, where each sample has
// its own, never on the number of statistics: it must not depend on the batch.
template <class Body> void with_layout(const Call& call, const Body& body) {
  if (call.has(kRowMask)) {
    Call unmasked = call;
    unmasked.mask = nullptr;
    return body(Rows<NK_TYPE>(unmasked, call.mask));
  }
  const bool is_own = call.affine == kPerElement, is_short = call.I < kShortRun;
  const bool is_narrow = call.M == 1 && (is_own || is_short);
  if (is_narrow && (call.O > 1 || (is_short && call.has(kGiven)))) {
    return body(Columns<NK_TYPE>(call));
  }
  if (call.O == 1 && (is_own || (call.M > 1 && is_short))) {
    return body(Rows<NK_TYPE>(call));
  }
  if (call.O == 1 && call.values() <= Groups<NK_TYPE>::kLongest) {
    return body(Groups<NK_TYPE>(call));
  }
  const int64_t bytes = call.statistics() * call.values() * (int64_t)sizeof(NK_TYPE);
  const int64_t tiled = bytes > kCacheBytes ? kTiled : kTiledInCache;
  if (call.O > 1 && call.M == 1 && call.G > 1 && call.I <= tiled) {
    return body(ShortRuns<NK_TYPE>(call));
  }
  return body(Runs<NK_TYPE>(call));
}

}  // namespace

const Kernels NK_DTYPE = {
    [](const Call& call) {
      with_layout(call, [](const auto& layout) { layout.forward(); });
      finish_streams();
    },
    [](const Call& call) {
      with_layout(call, [](const auto& layout) { layout.backward(); });
      finish_streams();
    },
    [](const Call& call) {
      with_layout(call, [](const auto& layout) { layout.apply_grads(); });
      finish_streams();
    },
};

}  // namespace NK_ISA
}  // namespace normkit
