// Statistics over runs: the values of one statistic lie in O runs of M·I neighbours,
// and the learned affine is constant along the I neighbours of a sub-run.
//
// Batch norm in NCHW, instance and group norm in NCHW, RMS or layer norm without
// weights. One statistic after the other, so that the second pass over its values finds
// them in the cache; it walks backwards, from what was read last.
#pragma once
#include <vector>

#include "elements.hpp"
#include "pool.hpp"
#include "statistics.hpp"

namespace normkit {
namespace NK_ISA {

template <class T> class Runs {
 public:
  explicit Runs(const Call& call)
      : call_(call),
        e_(call),
        length_(call.M * call.I),
        pieces_(length_ > kBlock ? (length_ + kBlock - 1) / kBlock : 1),
        segments_(length_ > 0 && length_ < kBlock ? kBlock / length_ : 1),
        blocks_((call.O + segments_ - 1) / segments_ * pieces_),
        weight_(call.weight, call.weight_dtype, call.affine_size(), 1),
        bias_(call.bias, call.bias_dtype, call.affine_size(), 0) {}

  void forward() const {
    each_statistic([&](int64_t stat, int64_t threads) {
      if (!call_.has(kGiven)) measure(stat, threads);
      if (!e_.y) return;
      parallel_for(blocks_, threads, [&](int64_t block) {
        if (e_.streams) write<true>(stat, blocks_ - 1 - block);
        else write<false>(stat, blocks_ - 1 - block);
      });
    });
  }

  // Sums over dy, and dx from them; either may be all that is wanted.
  void backward() const {
    const bool wants_sums =
        call_.dweight || call_.dbias || call_.sum_dy || !call_.has(kGiven);
    std::vector<double> sums(wants_sums ? 2 * call_.statistics() * call_.M : 0);
    each_statistic([&](int64_t stat, int64_t threads) {
      Slope slope;
      if (wants_sums) {
        double* of_stat = &sums[2 * stat * call_.M];
        reduce(stat, threads, of_stat);
        double g = 0, gx = 0;
        for (int64_t m = 0; m < call_.M; ++m) {
          double w = call_.sum_dy && !call_.has(kWeighted) ? 1 : weight_[entry(stat, m)];
          g += w * of_stat[2 * m];
          gx += w * of_stat[2 * m + 1];
        }
        if (call_.sum_dy) {
          call_.sum_dy[stat] = g;
          call_.sum_dyx[stat] = gx;
        }
        slope = slope_of(g, gx, call_.scale[stat], count_of(stat), call_);
      }
      if (!e_.dx) return;
      parallel_for(blocks_, threads, [&](int64_t block) {
        block = blocks_ - 1 - block;
        if (e_.streams) write_gradient<true>(stat, block, slope, wants_sums);
        else write_gradient<false>(stat, block, slope, wants_sums);
      });
    });
    if (call_.dweight || call_.dbias) reduce_learned(sums);
  }

  // dx = a·dy·weight + b·(x − center) + c with coefficients from the caller.
  void apply_grads() const {
    each_statistic([&](int64_t stat, int64_t threads) {
      Slope slope{call_.b[stat], call_.c[stat]};
      parallel_for(blocks_, threads, [&](int64_t block) {
        if (e_.streams) write_gradient<true>(stat, block, slope, false);
        else write_gradient<false>(stat, block, slope, false);
      });
    });
  }

 protected:
  using C = compute_t<T>;
  using V = Vec<C>;
  static constexpr int W = Lanes<C>::count;
  static constexpr int64_t kBlock = 32768;

  // Enough statistics for all threads: one task each. Few of them: one after the other,
  // each in parallel. The sums are the same bits either way.
  template <class Task> void each_statistic(const Task& task) const {
    const int64_t n = call_.statistics(), threads = call_.threads;
    if (threads > 1 && n < 2 * threads) {
      for (int64_t stat = 0; stat < n; ++stat) task(stat, threads);
      if (e_.streams) finish_streams();
      return;
    }
    const int64_t values = call_.values();
    const int64_t batch = values < kBlock ? kBlock / (values + 1) + 1 : 1;
    parallel_for((n + batch - 1) / batch, threads, [&](int64_t k) {
      for (int64_t stat = k * batch; stat < n && stat < (k + 1) * batch; ++stat)
        task(stat, 1);
      if (e_.streams) finish_streams();
    });
  }

  // body(first, n): the contiguous parts of a block of a statistic.
  template <bool Backwards = false, class Body>
  NK_INLINE void each_part(int64_t stat, int64_t block, const Body& body) const {
    const int64_t stride = call_.G * length_;
    const int64_t base = (stat / call_.G) * call_.O * stride + (stat % call_.G) * length_;
    const int64_t low = block % pieces_ * kBlock;
    const int64_t n = length_ - low < kBlock ? length_ - low : kBlock;
    const int64_t first = block / pieces_ * segments_;
    const int64_t last = first + segments_ < call_.O ? first + segments_ : call_.O;
    for (int64_t k = first; k < last; ++k) {
      const int64_t o = Backwards ? last - 1 - (k - first) : k;
      body(base + o * stride + low, low, n);
    }
  }
  // body(first, n, m): the same, cut where the learned affine changes.
  template <bool Backwards = false, class Body>
  NK_INLINE void each_sub_run(int64_t stat, int64_t block, const Body& body) const {
    each_part<Backwards>(stat, block, [&](int64_t first, int64_t low, int64_t n) {
      for (int64_t i = low; i < low + n;) {
        const int64_t m = i / call_.I, next = (m + 1) * call_.I;
        const int64_t end = next < low + n ? next : low + n;
        body(first + (i - low), end - i, m);
        i = end;
      }
    });
  }
  NK_INLINE int64_t entry(int64_t stat, int64_t m) const {
    return (stat % call_.G % call_.P) * call_.M + m;
  }
  NK_INLINE int64_t count_of(int64_t stat) const {
    return call_.mask && call_.count ? call_.count[stat] : call_.values();
  }
  NK_INLINE double center_of(int64_t stat) const {
    return call_.has(kCentered) ? call_.center[stat] : 0;
  }
  NK_INLINE Map<C> map_of(int64_t stat, int64_t m) const {
    const int64_t k = entry(stat, m);
    return {center_of(stat), call_.scale[stat], weight_[k], bias_[k]};
  }

  // Near enough to the mean: up to four vectors of values from four places.
  C pilot_of(int64_t stat) const {
    double sum = 0;
    int64_t n = 0, before = -1;
    for (int64_t k = 0; k < 4; ++k) {
      const int64_t block = k * blocks_ / 4;
      if (block == before) continue;
      before = block;
      each_part(stat, block, [&](int64_t first, int64_t, int64_t length) {
        const int64_t places = blocks_ < 4 && call_.O == 1 && length > 16 * W ? 4 : 1;
        for (int64_t p = 0; p < places; ++p) {
          const int64_t at = first + p * (length / places);
          const int64_t some = length < W ? length : W;
          if (n >= 8 * W) return;
          if (e_.mask) {
            for (int64_t i = at; i < at + some; ++i) {
              if (e_.mask[i]) sum += to_double(e_.x[i]), ++n;
            }
          } else {
            Wide<C> wide;
            if (some == W) wide.add(load(e_.x + at));
            else wide.add(load_first(e_.x + at, some, V{}));
            sum += wide.total();
            n += some;
          }
        }
      });
    }
    const C pilot = n ? (C)(sum / (double)n) : 0;
    return std::isfinite(pilot) ? pilot : 0;
  }

  Sums centered_sums(int64_t stat, int64_t block, C pilot) const {
    Sums sums;
    PairSums<C> pair;
    const V p = splat(pilot);
    each_part(stat, block, [&](int64_t first, int64_t, int64_t n) {
      if (e_.mask) {
        pair.add(n, [&](int64_t i, auto lanes, V& u, V& v) {
          u = e_.template centered<kAny>(first + i, lanes, p);
          v = u * u;
        });
        for (int64_t i = 0; i < n; ++i) sums.n += e_.mask[first + i] != 0;
      } else {
        pair.add(n, [&](int64_t i, auto lanes, V& u, V& v) {
          u = e_.template centered<kPlain>(first + i, lanes, p);
          v = u * u;
        });
        sums.n += n;
      }
    });
    pair.total(sums.s, sums.q);
    return sums;
  }

  void measure(int64_t stat, int64_t threads) const {
    C pilot = pilot_of(stat);
    Sums sums;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      sums = Sums{};
      if (threads > 1) {
        std::vector<Sums> parts(blocks_);
        parallel_for(blocks_, threads, [&](int64_t block) {
          parts[block] = centered_sums(stat, block, pilot);
        });
        for (const Sums& part : parts) sums.add(part);
      } else {
        for (int64_t block = 0; block < blocks_; ++block) {
          sums.add(centered_sums(stat, block, pilot));
        }
      }
      if (sums.n == 0 || !is_far(sums, pilot)) break;
      pilot = (C)((double)pilot + sums.s / (double)sums.n);
    }
    const Stat found = normkit::NK_ISA::finish(sums, (double)pilot, call_);
    call_.center[stat] = found.center;
    if (call_.m2) call_.m2[stat] = found.m2;
    if (call_.scale) call_.scale[stat] = found.scale;
    if (call_.count) call_.count[stat] = sums.n;
  }

  template <bool Streams> void write(int64_t stat, int64_t block) const {
    e_.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      Map<C> map = map_of(stat, 0);
      each_sub_run<true>(stat, block, [&](int64_t first, int64_t n, int64_t m) {
        if (call_.M > 1) map = map_of(stat, m);
        const V hi = splat(map.hi), a = splat(map.a), shift = splat(map.shift);
        streamed<MayStream<K, Streams>::value>(e_.y + first, n, [&](int64_t i, auto lanes, auto streams) {
          V z = e_.template centered<K>(first + i, lanes, hi) * a + shift;
          z = e_.template finish<K>(z, first + i, lanes);
          e_.template put<decltype(streams)::value>(e_.y + first + i, z, lanes);
        });
      });
    });
  }

  // Σg and Σg·(x − center) of each sub-run of a statistic, g before the weight.
  void reduce(int64_t stat, int64_t threads, double* sums) const {
    if (threads > 1 && call_.M == 1) {
      std::vector<double> parts(2 * blocks_);
      parallel_for(blocks_, threads,
                   [&](int64_t block) { reduce_block(stat, block, &parts[2 * block]); });
      for (int64_t k = 0; k < 2 * blocks_; ++k) sums[k & 1] += parts[k];
      return;
    }
    for (int64_t block = 0; block < blocks_; ++block) reduce_block(stat, block, sums);
  }
  void reduce_block(int64_t stat, int64_t block, double* sums) const {
    e_.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      PairSums<C> pair;
      Map<C> map = map_of(stat, 0);
      int64_t current = 0;
      each_sub_run(stat, block, [&](int64_t first, int64_t n, int64_t m) {
        if (m != current) {
          add_to(sums + 2 * current, pair, stat);
          pair = PairSums<C>{};
          map = map_of(stat, m);
          current = m;
        }
        add_products<K>(pair, map, first, n);
      });
      add_to(sums + 2 * current, pair, stat);
    });
  }
  template <int K>
  NK_INLINE void add_products(PairSums<C>& pair, const Map<C>& map, int64_t first,
                              int64_t n) const {
    const V hi = splat(map.hi), a = splat(map.a), shift = splat(map.shift);
    T* kept = e_.dresidual;
    pair.add(n, [&](int64_t i, auto lanes, V& u, V& v) {
      const V d = e_.template centered<K>(first + i, lanes, hi);
      u = e_.template gradient<K>(first + i, lanes, [&] { return d * a + shift; });
      if (kept) e_.template put<false>(kept + first + i, u, lanes);
      v = u * d;
    });
  }
  NK_INLINE void add_to(double* sums, PairSums<C>& pair, int64_t stat) const {
    double g, gd;
    pair.total(g, gd);
    sums[0] += g;
    sums[1] += gd - Split<C>(center_of(stat)).lo * g;
  }

  // `is_gated`: dresidual already holds dy·act′.
  template <bool Streams>
  void write_gradient(int64_t stat, int64_t block, Slope slope, bool is_gated) const {
    Elements<T> e = e_;
    if (is_gated && e.dresidual) {
      e.dy = e.dresidual;
      e.dresidual = nullptr;
      e.activation = kNone;
    }
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      Map<C> map = map_of(stat, 0);
      const Split<C> split(center_of(stat));
      const V b = splat((C)slope.b), c = splat((C)(slope.c - slope.b * split.lo));
      each_sub_run<true>(stat, block, [&](int64_t first, int64_t n, int64_t m) {
        if (call_.M > 1) map = map_of(stat, m);
        const V hi = splat(map.hi), a = splat(map.a), shift = splat(map.shift);
        streamed<MayStream<K, Streams>::value>(e.dx + first, n, [&](int64_t i, auto lanes, auto streams) {
          const V d = e.template centered<K>(first + i, lanes, hi);
          V g = e.template gradient<K>(first + i, lanes, [&] { return d * a + shift; });
          if (e.dresidual) {
            e.template put<false>(e.dresidual + first + i, g, lanes);
          }
          g = g * a + (d * b + c);
          if (K == kAny && e.mask) g = select(e.valid(first + i, lanes), g, V{});
          e.template put<decltype(streams)::value>(e.dx + first + i, g, lanes);
        });
      });
    });
  }

  // body(i, lanes, streams) over [0, n); with Streams, whole aligned vectors say so.
  template <bool Streams, class Body>
  static NK_INLINE void streamed(const T* out, int64_t n, const Body& body) {
    int64_t i = 0, some = Streams ? before_aligned(out) : 0;
    if (some > n) some = n;
    for (;;) {
      if (some) body(i, First{some}, std::false_type{});
      for (i += some; i + W <= n; i += W) body(i, Full{}, std::bool_constant<Streams>{});
      some = n - i;
      if (!some) return;
    }
  }

  // dweight = Σ scale·Σg(x − center), dbias = ΣΣg, over all statistics of an entry.
  void reduce_learned(const std::vector<double>& sums) const {
    const int64_t M = call_.M, entries = call_.P * M;
    std::vector<double> dweight(entries), dbias(entries);
    for (int64_t stat = 0; stat < call_.statistics(); ++stat) {
      const int64_t first = entry(stat, 0);
      const double scale = call_.scale[stat];
      for (int64_t m = 0; m < M; ++m) {
        dbias[first + m] += sums[2 * (stat * M + m)];
        dweight[first + m] += scale * sums[2 * (stat * M + m) + 1];
      }
    }
    for (int64_t k = 0; k < entries; ++k) {
      if (call_.dweight) store_learned(call_.dweight, call_.weight_dtype, k, dweight[k]);
      if (call_.dbias) store_learned(call_.dbias, call_.bias_dtype, k, dbias[k]);
    }
  }

  const Call& call_;
  const Elements<T> e_;
  const int64_t length_, pieces_, segments_, blocks_;
  const Learned weight_, bias_;
};

}  // namespace NK_ISA
}  // namespace normkit
