// Spans whose learned affine is constant along each of M runs of I neighbours: instance
// and group norm in NCHW, RMS and layer norm without weights.
#pragma once
#include "spans.hpp"

namespace normkit {
namespace NK_ISA {

template <class T> class Groups : private Spans<T> {
 public:
  // Longer spans are measured in blocks, by several threads.
  static constexpr int64_t kLongest = 32768;

  explicit Groups(const Call& call)
      : Spans<T>(call),
        runs_(call.M),
        size_(call.I),
        stages_(e_.streams && size_ * (int64_t)sizeof(T) < kStagedBytes) {}

  void forward() const {
    const int64_t together = this->spans_within(kTogetherBytes);
    this->each_batch(together, [&](int64_t first, int64_t stats) {
      if (!call_.has(kGiven)) this->measure(first, stats);
      if (e_.y) write(first, stats, together);
    });
  }

  // Sums over dy, and dx from them; either may be all that is wanted.
  void backward() const {
    const bool wants_sums = this->wants_sums();
    const int64_t n = call_.statistics() * runs_;
    const Scratch<double> sums(wants_sums ? 2 * n : 0);
    const int64_t together = this->spans_within(kTogetherBytes / 2);
    this->each_batch(together, [&](int64_t first, int64_t stats) {
      const RunMaps maps(*this, first, stats);
      Slopes slopes;
      if (wants_sums) {
        double *g = sums.data() + first * runs_, *gx = g + n;
        reduce(first, stats, maps, g, gx);
        slopes = weighted_slopes(first, stats, maps, g, gx);
      }
      if (e_.dx) write_gradient(first, stats, together, maps, slopes, wants_sums);
    });
    if (this->wants_learned()) reduce_learned(sums.data(), sums.data() + n);
  }

  // dx = a·dy·weight + b·(x − center) + c with coefficients from the caller.
  void apply_grads() const {
    const int64_t together = this->spans_within(kTogetherBytes / 2);
    this->each_batch(together, [&](int64_t first, int64_t stats) {
      const RunMaps maps(*this, first, stats);
      const Slopes slopes = this->given_slopes(first, stats);
      write_gradient(first, stats, together, maps, slopes, false);
    });
  }

 private:
  using typename Spans<T>::C;
  using typename Spans<T>::V;
  using typename Spans<T>::Maps;
  using typename Spans<T>::Slopes;
  using Spans<T>::W, Spans<T>::kMost, Spans<T>::kTogetherBytes;
  using Spans<T>::call_, Spans<T>::e_, Spans<T>::length_;

  // The ends of a run share a line of the cache with its neighbours' ends. Written past
  // the caches such a line is read back and written twice, so outputs of short runs are
  // put together in the first cache.
  static constexpr int64_t kStagedBytes = 1024;
  class Output {
   public:
    Output(bool stages, T* to, int64_t n) : staged_(stages ? n : 0), to_(to), n_(n) {}
    ~Output() {
      if (staged_.data()) stream_copy(to_, staged_.data(), n_ * (int64_t)sizeof(T));
    }
    T* data() const { return staged_.data() ? staged_.data() : to_; }

   private:
    const Scratch<T> staged_;
    T* const to_;
    const int64_t n_;
  };

  int64_t entry_of(int64_t stat) const { return call_.P == 1 ? 0 : stat % call_.P; }

  // The maps of the runs of some spans, one after another.
  struct RunMaps {
    Maps of_spans;
    const Scratch<C> of_runs;
    C weight[kMost];
    const C *a, *shift;

    RunMaps(const Groups& owner, int64_t first, int64_t stats)
        : of_spans(owner.call_, first, stats,
                   [&](C* w, C* z, int64_t n) NK_BODY {
                     if (owner.runs_ == 1) owner.weigh(first, stats, w, z);
                     for (int64_t k = 0; k < n; ++k) weight[k] = w[k];
                   }),
          of_runs(owner.runs_ > 1 ? 2 * stats * owner.runs_ : 0),
          a(of_runs.data() ? of_runs.data() : of_spans.a),
          shift(of_runs.data() ? of_runs.data() + stats * owner.runs_ : of_spans.shift) {
      const int64_t n = owner.runs_;
      if (n == 1) return;
      int64_t entry = owner.entry_of(first);
      for (int64_t k = 0; k < stats; ++k, entry = entry + 1 == owner.call_.P ? 0 : entry + 1) {
        const C *w = owner.weight_.data() + entry * n, *z = owner.bias_.data() + entry * n;
        C *of_a = of_runs.data() + k * n, *of_shift = of_a + stats * n;
        const double center = owner.center_of(first + k);
        const double scale = owner.call_.scale[first + k];
        for (int64_t m = 0; m < n; ++m) {
          const Map<C> map(center, scale, w[m], z[m]);
          of_a[m] = map.a;
          of_shift[m] = map.shift;
        }
      }
    }
  };
  // Weight and bias of spans of one run.
  NK_INLINE void weigh(int64_t first, int64_t stats, C* w, C* z) const {
    int64_t entry = entry_of(first);
    if (entry + stats <= call_.P) {
      std::copy_n(this->weight_.data() + entry, stats, w);
      std::copy_n(this->bias_.data() + entry, stats, z);
      return;
    }
    for (int64_t k = 0; k < stats; ++k) {
      w[k] = this->weight_[entry];
      z[k] = this->bias_[entry];
      if (++entry == call_.P) entry = 0;
    }
  }

  void write(int64_t first, int64_t stats, int64_t together) const {
    const RunMaps maps(*this, first, stats);
    const int64_t base = first * length_, ahead = together * length_;
    const Output output(stages_, e_.y + base, stats * length_);
    Elements<T> e = e_;
    e.streams = e_.streams && !stages_;
    e.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      T* y = output.data();
      int64_t run = 0, at = base;
      for (int64_t k = 0; k < stats; ++k) {
        const V hi = splat(maps.of_spans.hi[k]);
        for (int64_t m = 0; m < runs_; ++m, ++run, at += size_, y += size_) {
          const V a = splat(maps.a[run]), shift = splat(maps.shift[run]);
          this->streamed(e.streams, y, size_, [&](int64_t i, auto lanes) NK_BODY {
            this->fetch(e.x + at + i + ahead, nullptr);
            V z = fused(e.template centered<K>(at + i, lanes, hi), a, shift);
            z = e.template finish<K>(z, at + i, lanes);
            e.put(y + i, z, lanes);
          });
        }
      }
    });
  }

  // Σg and Σg·(x − center) of each run, g before the weight.
  void reduce(int64_t first, int64_t stats, const RunMaps& maps, double* g,
              double* gx) const {
    e_.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      this->sum_runs(size_, g, gx, [&](const auto& add) NK_BODY {
        int64_t run = 0, at = first * length_;
        for (int64_t k = 0; k < stats; ++k) {
          const V hi = splat(maps.of_spans.hi[k]);
          for (int64_t m = 0; m < runs_; ++m, ++run, at += size_) {
            const V a = splat(maps.a[run]), shift = splat(maps.shift[run]);
            add([&](int64_t i, auto lanes, V& u, V& d) NK_BODY {
              this->fetch(e_.dx + at + i);
              d = e_.template centered<K>(at + i, lanes, hi);
              u = e_.template gradient<K>(at + i, lanes,
                                          [&]() NK_BODY { return fused(d, a, shift); });
              if (NK_RARE(e_.dresidual)) e_.keep(e_.dresidual + at + i, u, lanes);
            });
          }
        }
      });
    });
    if (planted("sums_are_around_the_rounded_centre")) return;
    for (int64_t k = 0; k < stats; ++k, g += runs_, gx += runs_) {
      const double lo = Split<C>(this->center_of(first + k)).lo;
      for (int64_t m = 0; m < runs_; ++m) gx[m] -= lo * g[m];
    }
  }
  Slopes weighted_slopes(int64_t first, int64_t stats, const RunMaps& maps,
                         const double* g, const double* gx) const {
    double sum_g[kMost] = {}, sum_gx[kMost] = {};
    const bool is_weighted = this->is_weighted();
    if (runs_ == 1) {
      for (int64_t k = 0; k < stats; ++k) {
        const double w = is_weighted ? maps.weight[k] : 1;
        sum_g[k] = w * g[k];
        sum_gx[k] = w * gx[k];
      }
    } else {
      int64_t entry = entry_of(first);
      for (int64_t k = 0; k < stats; ++k, g += runs_, gx += runs_) {
        const C* w = this->weight_.data() + entry * runs_;
        sum_products(runs_, is_weighted ? w : nullptr, g, gx, &sum_g[k], &sum_gx[k]);
        if (++entry == call_.P) entry = 0;
      }
    }
    return this->slopes_of(first, stats, sum_g, sum_gx);
  }
  // Σw·u and Σw·v; a null w is 1.
  static void sum_products(int64_t n, const C* w, const double* u, const double* v,
                           double* sum_u, double* sum_v) {
    double us[2] = {}, vs[2] = {};  // so that additions overlap
    for (int64_t m = 0; m < n; ++m) {
      const double weight = w ? (double)w[m] : 1;
      us[m & 1] += weight * u[m];
      vs[m & 1] += weight * v[m];
    }
    *sum_u = us[0] + us[1];
    *sum_v = vs[0] + vs[1];
  }

  // `is_gated`: dresidual already holds dy·act′.
  void write_gradient(int64_t first, int64_t stats, int64_t together,
                      const RunMaps& maps, const Slopes& slopes, bool is_gated) const {
    const int64_t base = first * length_, ahead = together * length_;
    const Output output(stages_, e_.dx + base, stats * length_);
    Elements<T> e = this->gated_elements(is_gated);
    e.streams = e_.streams && !stages_;
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      T* dx = output.data();
      int64_t run = 0, at = base;
      for (int64_t k = 0; k < stats; ++k) {
        const V hi = splat(maps.of_spans.hi[k]);
        const V b = splat(slopes.b[k]), c = splat(slopes.c[k]);
        for (int64_t m = 0; m < runs_; ++m, ++run, at += size_, dx += size_) {
          const V a = splat(maps.a[run]), shift = splat(maps.shift[run]);
          this->streamed(e.streams, dx, size_, [&](int64_t i, auto lanes) NK_BODY {
            const int64_t here = at + i;
            this->fetch(e.x + here + ahead, e.dy + here + ahead);
            const V d = e.template centered<K>(here, lanes, hi);
            V g = e.template gradient<K>(here, lanes,
                                         [&]() NK_BODY { return fused(d, a, shift); });
            if (NK_RARE(e.dresidual)) e.keep(e.dresidual + here, g, lanes);
            g = fused(g, a, fused(d, b, c));
            if (K == kAny && e.mask) g = select(e.valid(here, lanes), g, V{});
            e.put(dx + i, g, lanes);
          });
        }
      }
    });
  }

  // dweight = Σ scale·Σg(x − center), dbias = ΣΣg, over the spans of each entry.
  void reduce_learned(const double* g, const double* gx) const {
    const int64_t entries = call_.P * runs_, n = call_.statistics();
    const Scratch<double> dweight(entries, 0), dbias(entries, 0);
    for (int64_t first = 0; first < n; first += call_.P) {
      if (runs_ == 1) {
        for (int64_t k = 0; k < entries; ++k) {
          dbias[k] += g[first + k];
          dweight[k] += call_.scale[first + k] * gx[first + k];
        }
        continue;
      }
      double *to_weight = dweight.data(), *to_bias = dbias.data();
      for (int64_t k = first; k < first + call_.P; ++k) {
        const double scale = call_.scale[k];
        for (int64_t m = k * runs_; m < (k + 1) * runs_; ++m) {
          *to_bias++ += g[m];
          *to_weight++ += scale * gx[m];
        }
      }
    }
    store_learned(call_.dweight, call_.weight_dtype, entries, dweight.data());
    store_learned(call_.dbias, call_.bias_dtype, entries, dbias.data());
  }

  const int64_t runs_, size_;
  const bool stages_;
};

}  // namespace NK_ISA
}  // namespace normkit
