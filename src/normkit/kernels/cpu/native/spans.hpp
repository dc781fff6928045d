// Statistics of one span of neighbours each, O = 1: what group norm in NCHW and layer
// norm have in common.
//
// Statistics are processed in groups that fit into the first cache: first the sums of
// each, then their algebra in vectors over the statistics, then the values again. One by
// one, a statistic costs the latency of a dozen dependent steps (sums across lanes, a
// root, two divisions: 300 cycles), as much as 1000 values. The result of a span depends
// on its own values alone, never on its neighbours.
#pragma once
#include "layout.hpp"

namespace normkit {
namespace NK_ISA {

template <class T> class Spans : protected Layout<T> {
 protected:
  using typename Layout<T>::C;
  using typename Layout<T>::V;
  using Layout<T>::W, Layout<T>::call_, Layout<T>::e_, Layout<T>::length_;

  static constexpr int64_t kMost = 32, kTogetherBytes = 64 << 10;
  // Larger values are in no cache of one core.
  static constexpr int64_t kCached = 2 << 20;
  // Fewer values are not worth a task of their own.
  static constexpr int64_t kTaskValues = 8192;

  explicit Spans(const Call& call)
      : Layout<T>(call),
        is_large_(call.statistics() * length_ * (int64_t)sizeof(T) > kCached),
        fetches_outputs_(is_large_ && !e_.streams && (e_.y || e_.dx)) {}

  // Number of spans in a group, if `arrays` arrays are read: larger groups rely on hardware
  // prefetch, smaller ones stay in the cache together with the prefetched lines.
  int64_t together(int64_t arrays) const {
    const int64_t bytes = kTogetherBytes / (is_large_ ? 2 : 1) / arrays;
    const int64_t n = bytes / std::max<int64_t>(length_ * (int64_t)sizeof(T), 1);
    return n < 1 ? 1 : n < kMost ? n : kMost;
  }

  // task(first, stats): all statistics, `together` at a time.
  template <class Task> void each_batch(int64_t together, const Task& task) const {
    const int64_t n = call_.statistics(), threads = call_.threads;
    const int64_t batches = (n + together - 1) / together;
    const int64_t worth = kTaskValues / (together * length_ + 1) + 1;
    const int64_t share = (batches - 1) / (8 * std::max<int64_t>(threads, 1)) + 1;
    const int64_t per_task = std::max(worth, share) * together;
    parallel_for((n + per_task - 1) / per_task, threads, [&](int64_t k) {
      const int64_t end = std::min(n, (k + 1) * per_task);
      for (int64_t first = k * per_task; first < end; first += together) {
        task(first, std::min(together, end - first));
      }
    });
  }

  // Where all is in no cache of one core, each pass fetches what the next one needs: sums
  // the lines that outputs will be written to, unless these go past the caches, and outputs
  // the inputs `ahead`. Rows of 256 in 8 MB: forward 0.65 of the time, backward 0.7. In a
  // cache it would cost a twentieth.
  NK_INLINE void fetch(const T* output) const {
    if (NK_RARE(fetches_outputs_)) __builtin_prefetch(output, 0, 2);
  }
  NK_INLINE void fetch(const T* input, const T* other) const {
    if (!NK_RARE(is_large_)) return;
    __builtin_prefetch(input, 0, 2);
    if (other) __builtin_prefetch(other, 0, 2);
  }

  // each(add) calls add(at, term) for one run of n values after another, the first of them
  // at `at`, where term gives the factors of a vector as in PairSums; Σu and Σu·d of the
  // runs go to u and v. Short runs are cut where vectors of x are aligned: a vector that
  // crosses a line of the cache takes twice as long.
  template <bool InTwos, class EachRun>
  static NK_INLINE void sum_runs(int64_t n, double* u, double* v, const EachRun& each) {
    if (n <= kShort * W) {
      LaneSums<C> of_u(u), of_v(v);
      each([&](int64_t at, const auto& term) NK_BODY {
        V some_u, some_v;
        short_sums<C>(std::min(-at & (W - 1), n), n, term, some_u, some_v);
        of_u.add(some_u);
        of_v.add(some_v);
      });
      of_u.finish();
      of_v.finish();
    } else {
      LaneSums<double> of_u(u), of_v(v);
      each([&](int64_t, const auto& term) NK_BODY {
        PairSums<C> pair;
        pair.template add<InTwos>(n, term);
        vd some_u, some_v;
        pair.lanes(some_u, some_v);
        of_u.add(some_u);
        of_v.add(some_v);
      });
      of_u.finish();
      of_v.finish();
    }
  }

  // Loops over some statistics run in vectors over all of kMost, but one is taken alone.
  static NK_INLINE int64_t loop(int64_t stats) { return stats == 1 ? 1 : kMost; }
  static NK_INLINE void take(const double* from, int64_t stats, double* to) {
    if (stats == 1) *to = *from;
    else std::copy_n(from, stats, to);
  }

  // The maps of some spans. Those of x̂ itself have weight 1 and bias 0.
  struct Maps {
    C hi[kMost], a[kMost], shift[kMost];
    template <class Weigh>
    NK_INLINE Maps(const Call& call, int64_t first, int64_t stats, const Weigh& weigh) {
      const int64_t n = loop(stats);
      double center[kMost], scale[kMost];
      C w[kMost], z[kMost];
      for (int64_t k = 0; k < n; ++k) center[k] = scale[k] = w[k] = z[k] = 0;
      weigh(w, z, n);
      if (call.has(kCentered)) take(call.center + first, stats, center);
      take(call.scale + first, stats, scale);
      for (int64_t k = 0; k < n; ++k) {
        const Map<C> map(center[k], scale[k], w[k], z[k]);
        hi[k] = map.hi;
        a[k] = map.a;
        shift[k] = map.shift;
      }
    }
  };
  NK_INLINE Maps maps_of_x_hat(int64_t first, int64_t stats) const {
    return {call_, first, stats, [](C* w, C*, int64_t n) NK_BODY {
              for (int64_t k = 0; k < n; ++k) w[k] = 1;
            }};
  }

  struct Slopes {
    C b[kMost] = {}, c[kMost] = {};
  };
  // Of the weighted sums of each span.
  NK_INLINE Slopes slopes_of(int64_t first, int64_t stats, const double* g,
                             const double* gx) const {
    const int64_t size = loop(stats);
    double center[kMost], scale[kMost], n[kMost];
    for (int64_t k = 0; k < size; ++k) {
      center[k] = scale[k] = 0;
      n[k] = (double)call_.values();
    }
    if (call_.has(kCentered)) take(call_.center + first, stats, center);
    take(call_.scale + first, stats, scale);
    if (call_.mask) {
      for (int64_t k = 0; k < stats; ++k) n[k] = this->count_of(first + k);
    }
    Slopes found;
    for (int64_t k = 0; k < size; ++k) {
      const SlopeMap<C> map(slope_of(g[k], gx[k], scale[k], n[k], call_), center[k]);
      found.b[k] = map.b;
      found.c[k] = map.c;
    }
    if (call_.sum_dy) {
      take(g, stats, call_.sum_dy + first);
      take(gx, stats, call_.sum_dyx + first);
    }
    return found;
  }
  Slopes given_slopes(int64_t first, int64_t stats) const {
    Slopes found;
    for (int64_t k = 0; k < stats; ++k) {
      const SlopeMap<C> map({call_.b[first + k], call_.c[first + k]},
                            this->center_of(first + k));
      found.b[k] = map.b;
      found.c[k] = map.c;
    }
    return found;
  }

  // x + residual of some spans, rounded as a tensor of its own is.
  void add_residual(int64_t first, int64_t stats) const {
    if (!call_.sum) return;
    const int64_t begin = first * length_, n = stats * length_;
    const T *x = static_cast<const T*>(call_.x) + begin;
    const T *residual = static_cast<const T*>(call_.residual) + begin;
    T* sum = static_cast<T*>(call_.sum) + begin;
    each_vector<W>(n, [&](int64_t i, auto lanes) NK_BODY {
      fetch(x + i + n, residual + i + n);
      const V total = e_.get(x + i, lanes, V{}) + e_.get(residual + i, lanes, V{});
      e_.keep(sum + i, planted("the_sum_forgets_the_residual") ? V{} : total, lanes);
    });
  }

  // Near enough to the mean: of up to four vectors of values, from four places.
  void find_pilots(int64_t first, int64_t stats, C* pilots) const {
    const int64_t places = length_ > 16 * W ? 4 : 1, some = length_ < W ? length_ : W;
    double sums[kMost];
    LaneSums<double> lanes(sums);
    for (int64_t k = 0; k < stats; ++k) {
      const T* x = e_.x + (first + k) * length_;
      V v{};
      for (int64_t p = 0; p < places; ++p, x += length_ / places) {
        v += some == W ? load(x) : load_first(x, some, V{});
      }
      Wide<C> wide;
      wide.add(v);
      lanes.add(wide.lanes());
    }
    lanes.finish();
    const double share = 1 / (double)(places * some);
    for (int64_t k = 0; k < stats; ++k) {
      const C pilot = (C)(sums[k] * share);
      pilots[k] = pilot - pilot == 0 ? pilot : 0;  // 0 for what is not finite
    }
  }
  // Likewise of the first values that count.
  C masked_pilot(int64_t at) const {
    double sum = 0;
    int64_t n = 0;
    for (int64_t i = at; i < at + length_ && n < W; ++i) {
      if (e_.mask[i]) sum += to_double(e_.x[i]), ++n;
    }
    const C pilot = n ? (C)(sum / (double)n) : 0;
    return pilot - pilot == 0 ? pilot : 0;
  }

  void measure(int64_t first, int64_t stats) const {
    StatSums<kMost> sums;
    C pilots[kMost];
    for (int64_t k = 0; k < stats; ++k) sums.n[k] = (double)length_;
    if (e_.mask) {
      for (int64_t k = 0; k < stats; ++k) {
        const int64_t at = (first + k) * length_;
        pilots[k] = masked_pilot(at);
        sums.n[k] = (double)count_valid(e_.mask + at, length_);
      }
    } else {
      find_pilots(first, stats, pilots);
    }
    for (int attempt = 1;; ++attempt) {
      if (e_.mask) add_up<kAny>(first, stats, pilots, sums);
      else add_up<kPlain>(first, stats, pilots, sums);
      if (attempt == kAttempts || !move_far(sums.s, sums.q, sums.n, stats, pilots)) break;
    }
    store_statistics(call_, first, stats, sums.s, sums.q, sums.n, pilots);
  }
  template <int K>
  void add_up(int64_t first, int64_t stats, const C* pilots,
              StatSums<kMost>& sums) const {
    LaneSums<double> s(sums.s), q(sums.q);
    for (int64_t k = 0; k < stats; ++k) {
      const int64_t at = (first + k) * length_;
      const V pilot = splat(pilots[k]);
      PairSums<C> pair;
      constexpr bool in_twos = Elements<T>::template in_twos<K>;
      pair.template add<in_twos>(length_, [&](int64_t i, auto lanes, auto& u, auto& d) NK_BODY {
        fetch(e_.y + at + i);
        u = d = e_.template centered<K>(at + i, lanes, pilot);
      });
      vd u, v;
      pair.lanes(u, v);
      s.add(u);
      q.add(v);
    }
    s.finish();
    q.finish();
  }

  const bool is_large_, fetches_outputs_;
};

}  // namespace NK_ISA
}  // namespace normkit
