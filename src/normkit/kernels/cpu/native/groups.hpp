// Spans whose learned affine is constant along each of M runs of I neighbours: instance
// and group norm in NCHW, RMS and layer norm without weights.
//
// The runs of some spans are contiguous. Short ones are processed in vectors from end to
// end, and a vector across two runs takes its coefficients from both: with a cut at every
// end of a run, a third of the vectors would be nearly empty or cross a cache line.
#pragma once
#include "run_maps.hpp"

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
        walks_(size_ >= W && size_ <= kShort * W),
        stages_(e_.streams && walks_ && size_ % W != 0) {}

  void forward() const {
    const int64_t together = this->together(1);
    this->each_batch(together, [&](int64_t first, int64_t stats) {
      this->add_residual(first, stats);
      if (!call_.has(kGiven)) this->measure(first, stats);
      if (e_.y) write(first, stats, together);
    });
  }

  // Sums over dy, and dx from them, or one of the two.
  void backward() const {
    const bool wants_sums = this->wants_sums();
    const int64_t n = call_.statistics() * runs_;
    const Scratch<double> sums(wants_sums ? 2 * n : 0);
    const int64_t together = this->together(2);
    this->each_batch(together, [&](int64_t first, int64_t stats) {
      Coefficients at(*this, first, stats);
      if (wants_sums) {
        double *g = sums.data() + first * runs_, *gx = g + n;
        reduce(first, stats, at, g, gx);
        at.set(weighted_slopes(first, stats, at, g, gx));
      }
      if (e_.dx) write_gradient(first, stats, together, at, wants_sums);
    });
    if (this->wants_learned()) reduce_learned(sums.data(), sums.data() + n);
  }

  // dx = a·dy·weight + b·(x − center) + c with coefficients from the caller.
  void apply_grads() const {
    const int64_t together = this->together(2);
    this->each_batch(together, [&](int64_t first, int64_t stats) {
      Coefficients at(*this, first, stats);
      at.set(this->given_slopes(first, stats));
      write_gradient(first, stats, together, at, false);
    });
  }

 private:
  using typename Spans<T>::C;
  using typename Spans<T>::V;
  using typename Spans<T>::Maps;
  using typename Spans<T>::Slopes;
  using Spans<T>::W, Spans<T>::kMost;
  using Spans<T>::call_, Spans<T>::e_, Spans<T>::length_;
  using Lines = NK_ISA::Lines<C>;

  int64_t entry_of(int64_t stat) const { return call_.P == 1 ? 0 : stat % call_.P; }

  // The coefficients of the runs of some spans.
  class Coefficients {
   public:
    RunMaps<C> of_runs;
    C weight[kMost];  // of spans of one run

    Coefficients(const Groups& owner, int64_t first, int64_t stats)
        : stats_(stats),
          runs_(owner.runs_),
          of_spans_(owner.call_, first, stats,
                    [&](C* w, C* z, int64_t n) NK_BODY {
                      if (owner.runs_ == 1) owner.weigh(first, stats, w, z);
                      for (int64_t k = 0; k < n; ++k) weight[k] = w[k];
                    }),
          own_(runs_ > 1 ? 5 * stats * runs_ : 0) {
      if (runs_ == 1) {
        of_runs = {of_spans_.hi, of_spans_.a, of_spans_.shift, slopes_.b, slopes_.c};
        return;
      }
      const int64_t n = stats * runs_;
      C *hi = own_.data(), *a = hi + n, *shift = a + n, *b = shift + n, *c = b + n;
      of_runs = {hi, a, shift, b, c};
      int64_t entry = owner.entry_of(first);
      for (int64_t k = 0; k < stats; ++k) {
        const C *w = owner.weight_.data() + entry * runs_;
        const C *z = owner.bias_.data() + entry * runs_;
        const double center = owner.center_of(first + k);
        const double scale = owner.call_.scale[first + k];
        for (int64_t m = 0; m < runs_; ++m) {
          const Map<C> map(center, scale, w[m], z[m]);
          *hi++ = map.hi;
          *a++ = map.a;
          *shift++ = map.shift;
        }
        if (++entry == owner.call_.P) entry = 0;
      }
    }
    Coefficients(const Coefficients&) = delete;

    void set(const Slopes& slopes) {
      slopes_ = slopes;
      if (runs_ == 1) return;
      C *b = own_.data() + 3 * stats_ * runs_, *c = b + stats_ * runs_;
      for (int64_t k = 0; k < stats_; ++k, b += runs_, c += runs_) {
        std::fill(b, b + runs_, slopes.b[k]);
        std::fill(c, c + runs_, slopes.c[k]);
      }
    }

   private:
    const int64_t stats_, runs_;
    const Maps of_spans_;
    Slopes slopes_;
    const Scratch<C> own_;
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

  // Destination of the outputs of some spans: a buffer, streamed from there, if runs do not
  // end at addresses for streaming stores.
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
  // emit(i, lanes, lines) for the vectors of some runs, i from the first run's begin.
  template <int K, class Emit>
  NK_INLINE void each_vector_of(int64_t runs, const RunMaps<C>& maps, bool streams,
                                const T* out, const Emit& emit) const {
    Lines now;
    if (walks_) {
      walk<W>(
          runs, size_, [&](int64_t run) NK_BODY { now = maps[run]; },
          [&](int64_t i, auto lanes, auto) NK_BODY { emit(i, lanes, now); },
          [&](int64_t i, int64_t n, int64_t run) NK_BODY {
            emit(i, Full{}, Lines::joined(first_lanes<C>(n), now, maps[run + 1]));
          });
      return;
    }
    for (int64_t run = 0, at = 0; run < runs; ++run, at += size_) {
      now = maps[run];
      this->template streamed<Elements<T>::template in_twos<K>>(
          streams, out + at, size_,
          [&](int64_t i, auto lanes) NK_BODY { emit(at + i, lanes, now); });
    }
  }

  void write(int64_t first, int64_t stats, int64_t together) const {
    const Coefficients at(*this, first, stats);
    const int64_t base = first * length_, ahead = together * length_;
    const Output output(stages_, e_.y + base, stats * length_);
    T* const y = output.data();
    Elements<T> e = e_;
    e.streams = can_stream(y);
    e.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      each_vector_of<K>(stats * runs_, at.of_runs, e.streams, y,
                        [&](int64_t i, auto lanes, const Lines& lines) NK_BODY {
        this->fetch(e.x + base + i + ahead, nullptr);
        const auto d = e.template centered<K>(base + i, lanes, lines.hi);
        const auto z = fused(d, lines.a, lines.shift);
        e.put(y + i, e.template finish<K>(z, base + i, lanes), lanes);
      });
    });
  }
  bool can_stream(const T* out) const {
    return e_.streams && !stages_ && (!walks_ || before_aligned(out) == 0);
  }

  // Σg and Σg·(x − center) of each run, g before the weight.
  void reduce(int64_t first, int64_t stats, const Coefficients& at, double* g,
              double* gx) const {
    const int64_t base = first * length_;
    const RunMaps<C>& maps = at.of_runs;
    const Elements<T> e = e_;
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      const auto term = [&](int64_t i, auto lanes, const Lines& lines, auto& u,
                            auto& d) NK_BODY {
        this->fetch(e.dx + base + i);
        d = e.template centered<K>(base + i, lanes, lines.hi);
        u = e.template gradient<K>(base + i, lanes, [&]() NK_BODY {
          return fused(d, lines.a, lines.shift);
        });
        if (NK_RARE(e.dresidual)) e.keep(e.dresidual + base + i, u, lanes);
      };
      if (walks_) return walk_sums(stats * runs_, maps, g, gx, term);
      constexpr bool in_twos = Elements<T>::template in_twos<K>;
      this->template sum_runs<in_twos>(size_, g, gx, [&](const auto& add) NK_BODY {
        for (int64_t run = 0, low = 0; run < stats * runs_; ++run, low += size_) {
          const Lines lines = maps[run];
          add(low, [&](int64_t i, auto lanes, auto& u, auto& d) NK_BODY {
            term(low + i, lanes, lines, u, d);
          });
        }
      });
    });
    if (planted("sums_are_around_the_rounded_centre")) return;
    for (int64_t k = 0; k < stats; ++k, g += runs_, gx += runs_) {
      const double lo = Split<C>(this->center_of(first + k)).lo;
      for (int64_t m = 0; m < runs_; ++m) gx[m] -= lo * g[m];
    }
  }
  template <class Term>
  NK_INLINE void walk_sums(int64_t runs, const RunMaps<C>& maps, double* g, double* gx,
                           const Term& term) const {
    LaneSums<C> of_g(g), of_gx(gx);
    Lines now;
    V us[2]{}, vs[2]{}, u, d;  // so that additions overlap
    walk<W>(
        runs, size_,
        [&](int64_t run) NK_BODY {
          now = maps[run];
          if (run && run * size_ % W == 0) {
            of_g.add(us[0] + us[1]);
            of_gx.add(vs[0] + vs[1]);
            us[0] = us[1] = vs[0] = vs[1] = V{};
          }
        },
        [&](int64_t i, auto lanes, auto parity) NK_BODY {
          term(i, lanes, now, u, d);
          us[parity] += u;
          vs[parity] = fused(u, d, vs[parity]);
        },
        [&](int64_t i, int64_t n, int64_t run) NK_BODY {
          const Mask<C> is_first = first_lanes<C>(n);
          term(i, Full{}, Lines::joined(is_first, now, maps[run + 1]), u, d);
          const V here = select(is_first, u, V{});
          of_g.add(us[0] + us[1] + here);
          of_gx.add(fused(here, d, vs[0] + vs[1]));
          us[0] = select(is_first, V{}, u);
          vs[0] = us[0] * d;
          us[1] = vs[1] = V{};
        });
    of_g.add(us[0] + us[1]);
    of_gx.add(vs[0] + vs[1]);
    of_g.finish();
    of_gx.finish();
  }
  Slopes weighted_slopes(int64_t first, int64_t stats, const Coefficients& at,
                         const double* g, const double* gx) const {
    double sum_g[kMost] = {}, sum_gx[kMost] = {};
    const bool is_weighted = this->is_weighted();
    int64_t entry = entry_of(first);
    for (int64_t k = 0; k < stats; ++k, g += runs_, gx += runs_) {
      const C* w = runs_ == 1 ? at.weight + k : this->weight_.data() + entry * runs_;
      for (int64_t m = 0; m < runs_; ++m) {
        const double weight = is_weighted ? (double)w[m] : 1;
        sum_g[k] += weight * g[m];
        sum_gx[k] += weight * gx[m];
      }
      if (++entry == call_.P) entry = 0;
    }
    return this->slopes_of(first, stats, sum_g, sum_gx);
  }

  // `is_gated`: dresidual already holds dy·act′.
  void write_gradient(int64_t first, int64_t stats, int64_t together,
                      const Coefficients& at, bool is_gated) const {
    const int64_t base = first * length_, ahead = together * length_;
    const Output output(stages_, e_.dx + base, stats * length_);
    T* const dx = output.data();
    Elements<T> e = this->gated_elements(is_gated);
    e.streams = can_stream(dx);
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      each_vector_of<K>(stats * runs_, at.of_runs, e.streams, dx,
                        [&](int64_t i, auto lanes, const Lines& lines) NK_BODY {
        const int64_t here = base + i;
        this->fetch(e.x + here + ahead, e.dy + here + ahead);
        const auto d = e.template centered<K>(here, lanes, lines.hi);
        auto g = e.template gradient<K>(here, lanes, [&]() NK_BODY {
          return fused(d, lines.a, lines.shift);
        });
        if (NK_RARE(e.dresidual)) e.keep(e.dresidual + here, g, lanes);
        g = fused(g, lines.a, fused(d, lines.b, lines.c));
        if (NK_RARE(e.dsum)) g = g + e.get(e.dsum + here, lanes, V{});
        if constexpr (K == kAny) {
          if (e.mask) g = select(e.valid(here, lanes), g, V{});
        }
        e.put(dx + i, g, lanes);
      });
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
  const bool walks_, stages_;
};

}  // namespace NK_ISA
}  // namespace normkit
