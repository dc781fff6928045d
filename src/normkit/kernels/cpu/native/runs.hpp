// Statistics over runs: the values of one statistic lie in O runs of M·I neighbours,
// and the learned affine is constant along the I neighbours of a sub-run.
//
// Batch norm in NCHW, and spans of instance and group norm that are worth several
// threads. One statistic after the other, so that the second pass over its values finds
// them in the cache; it runs backwards, from the values read last.
#pragma once
#include "layout.hpp"

namespace normkit {
namespace NK_ISA {

template <class T> class Runs : protected Layout<T> {
 public:
  explicit Runs(const Call& call)
      : Layout<T>(call),
        pieces_(length_ > kBlock ? (length_ + kBlock - 1) / kBlock : 1),
        segments_(length_ > 0 && length_ < kBlock ? kBlock / length_ : 1),
        blocks_((call.O + segments_ - 1) / segments_ * pieces_) {}

  void forward() const {
    if (call_.has(kGiven) && call_.M == 1) return write_in_order();
    each_statistic([&](const Place& at, int64_t threads) {
      if (!call_.has(kGiven)) measure(at, threads);
      if (!e_.y) return;
      parallel_backwards(blocks_, threads, [&](int64_t block) { write(at, block); });
    });
  }

  // Sums over dy, and dx from them, or one of the two.
  void backward() const {
    const bool wants_sums = this->wants_sums(), is_weighted = this->is_weighted();
    const Scratch<double> sums(wants_sums ? 2 * call_.statistics() * call_.M : 0, 0);
    each_statistic([&](const Place& at, int64_t threads) {
      Slope slope;
      if (wants_sums) {
        double* of_stat = sums.data() + 2 * at.stat * call_.M;
        reduce(at, threads, of_stat);
        double g = 0, gx = 0;
        for (int64_t m = 0; m < call_.M; ++m) {
          const double w = is_weighted ? (double)weight_[at.entry + m] : 1;
          g += w * of_stat[2 * m];
          gx += w * of_stat[2 * m + 1];
        }
        if (call_.sum_dy) {
          call_.sum_dy[at.stat] = g;
          call_.sum_dyx[at.stat] = gx;
        }
        slope = slope_of(g, gx, call_.scale[at.stat], this->count_of(at.stat), call_);
      }
      if (!e_.dx) return;
      parallel_backwards(blocks_, threads, [&](int64_t block) {
        write_gradient(at, block, slope, wants_sums);
      });
    });
    if (this->wants_learned()) reduce_learned(sums.data());
  }

  // dx = a·dy·weight + b·(x − center) + c with coefficients from the caller.
  void apply_grads() const {
    each_statistic([&](const Place& at, int64_t threads) {
      const Slope slope{call_.b[at.stat], call_.c[at.stat]};
      parallel_for(blocks_, threads, [&](int64_t block) {
        write_gradient(at, block, slope, false);
      });
    });
  }

 protected:
  using typename Layout<T>::C;
  using typename Layout<T>::V;
  using Layout<T>::W, Layout<T>::call_, Layout<T>::e_, Layout<T>::length_;
  using Layout<T>::weight_, Layout<T>::bias_;
  static constexpr int64_t kBlock = 32768;

  // Offsets of a statistic's values and learned entries. Computed once for each: a 64-bit
  // division takes as long as a run of 50 values.
  struct Place {
    int64_t stat, base, entry;
  };
  Place place_of(int64_t stat) const {
    const int64_t item = call_.B == 1 ? 0 : stat / call_.G, g = stat - item * call_.G;
    const int64_t base = (item * call_.O * call_.G + g) * length_;
    const int64_t entry = call_.P == call_.G ? g : call_.P == 1 ? 0 : g % call_.P;
    return {stat, base, entry * call_.M};
  }

  // Enough statistics for all threads: one task each. Few of them: one after the other,
  // each in parallel. The sums are the same bits either way.
  template <class Task> void each_statistic(const Task& task) const {
    const int64_t n = call_.statistics(), threads = call_.threads;
    if (threads > 1 && n < 2 * threads) {
      for (int64_t stat = 0; stat < n; ++stat) task(place_of(stat), threads);
      return;
    }
    const int64_t values = call_.values();
    const int64_t batch = values < kBlock ? kBlock / (values + 1) + 1 : 1;
    parallel_for((n + batch - 1) / batch, threads, [&](int64_t k) {
      for (int64_t stat = k * batch; stat < n && stat < (k + 1) * batch; ++stat)
        task(place_of(stat), 1);
    });
  }

  // body(first, low, n): the contiguous parts of a block, `low` from the run's start.
  template <bool Backwards = false, class Body>
  NK_INLINE void each_part(const Place& at, int64_t block, const Body& body) const {
    const int64_t stride = call_.G * length_;
    const int64_t run = pieces_ == 1 ? block : block / pieces_;
    const int64_t low = (block - run * pieces_) * kBlock;
    const int64_t n = length_ - low < kBlock ? length_ - low : kBlock;
    const int64_t first = run * segments_;
    const int64_t last = first + segments_ < call_.O ? first + segments_ : call_.O;
    for (int64_t k = first; k < last; ++k) {
      const int64_t o = Backwards ? last - 1 - (k - first) : k;
      body(at.base + o * stride + low, low, n);
    }
  }
  // body(first, n, m): the same, cut where the learned affine changes.
  template <bool Backwards = false, class Body>
  NK_INLINE void each_sub_run(const Place& at, int64_t block, const Body& body) const {
    each_part<Backwards>(at, block, [&](int64_t first, int64_t low, int64_t n) NK_BODY {
      for (int64_t i = low; i < low + n;) {
        const int64_t m = call_.M == 1 ? 0 : i / call_.I, next = (m + 1) * call_.I;
        const int64_t end = next < low + n ? next : low + n;
        body(first + (i - low), end - i, m);
        i = end;
      }
    });
  }
  NK_INLINE Map<C> map_of(const Place& at, int64_t m) const {
    const int64_t k = at.entry + m;
    return {this->center_of(at.stat), call_.scale[at.stat], weight_[k], bias_[k]};
  }

  // Near enough to the mean: up to four vectors of values from four places.
  C pilot_of(const Place& at) const {
    double sum = 0;
    int64_t n = 0, before = -1;
    for (int64_t k = 0; k < 4; ++k) {
      const int64_t block = k * blocks_ / 4;
      if (block == before) continue;
      before = block;
      each_part(at, block, [&](int64_t first, int64_t, int64_t length) NK_BODY {
        const int64_t places = blocks_ < 4 && call_.O == 1 && length > 16 * W ? 4 : 1;
        for (int64_t p = 0; p < places; ++p) {
          const int64_t here = first + p * (length / places);
          const int64_t some = length < W ? length : W;
          if (n >= 8 * W) return;
          V v = some == W ? load(e_.x + here) : load_first(e_.x + here, some, V{});
          if (e_.mask) v = select(load_mask<C>(e_.mask + here, some), v, V{});
          Wide<C> wide;
          wide.add(v);
          sum += wide.total();
          n += e_.mask ? count_valid(e_.mask + here, some) : some;
        }
      });
    }
    const C pilot = n ? (C)(sum / (double)n) : 0;
    return std::isfinite(pilot) ? pilot : 0;
  }

  Sums centered_sums(const Place& at, int64_t block, C pilot) const {
    Sums sums;
    PairSums<C> pair;
    const V p = splat(pilot);
    each_part(at, block, [&](int64_t first, int64_t, int64_t n) NK_BODY {
      if (e_.mask) {
        pair.add(n, [&](int64_t i, auto lanes, V& u, V& d) NK_BODY {
          u = d = e_.template centered<kAny>(first + i, lanes, p);
        });
        sums.n += count_valid(e_.mask + first, n);
      } else {
        constexpr bool in_twos = Elements<T>::template in_twos<kPlain>;
        pair.template add<in_twos>(n, [&](int64_t i, auto lanes, auto& u, auto& d) NK_BODY {
          u = d = e_.template centered<kPlain>(first + i, lanes, p);
        });
        sums.n += n;
      }
    });
    pair.total(sums.s, sums.q);
    return sums;
  }

  void measure(const Place& at, int64_t threads) const {
    C pilot = pilot_of(at);
    Sums sums;
    const Scratch<Sums> parts(threads > 1 ? blocks_ : 0);
    for (int attempt = 1;; ++attempt) {
      sums = Sums{};
      if (threads > 1) {
        parallel_for(blocks_, threads, [&](int64_t block) {
          parts[block] = centered_sums(at, block, pilot);
        });
        for (int64_t block = 0; block < blocks_; ++block) sums.add(parts[block]);
      } else {
        for (int64_t block = 0; block < blocks_; ++block) {
          sums.add(centered_sums(at, block, pilot));
        }
      }
      if (attempt == kAttempts || !is_far(sums.s, sums.q, (double)sums.n, pilot)) break;
      pilot = (C)((double)pilot + sums.s / (double)sums.n);
    }
    const Stat found = finish(sums.s, sums.q, (double)sums.n, (double)pilot, call_.eps,
                              call_.has(kCentered));
    call_.center[at.stat] = found.center;
    if (call_.m2) call_.m2[at.stat] = found.m2;
    if (call_.scale) call_.scale[at.stat] = found.scale;
    if (call_.count) call_.count[at.stat] = sums.n;
  }

  void write(const Place& at, int64_t block) const {
    e_.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      Map<C> map = map_of(at, 0);
      each_sub_run<true>(at, block, [&](int64_t first, int64_t n, int64_t m) NK_BODY {
        if (call_.M > 1) map = map_of(at, m);
        write_run<K>(map, first, n);
      });
    });
  }
  template <int K>
  NK_INLINE void write_run(const Map<C>& map, int64_t first, int64_t n) const {
    const V hi = splat(map.hi), a = splat(map.a), shift = splat(map.shift);
    constexpr bool in_twos = Elements<T>::template in_twos<K>;
    this->template streamed<in_twos>(
        e_.streams, e_.y + first, n, [&](int64_t i, auto lanes) NK_BODY {
          const auto z = fused(e_.template centered<K>(first + i, lanes, hi), a, shift);
          e_.put(e_.y + first + i, e_.template finish<K>(z, first + i, lanes), lanes);
        });
  }
  // Given statistics: no value is read twice, so the runs are taken as they lie in memory.
  void write_in_order() const {
    const int64_t n = call_.statistics(), runs = n * call_.O, G = call_.G;
    const Scratch<Map<C>> maps(n);
    for (int64_t stat = 0; stat < n; ++stat) maps[stat] = map_of(place_of(stat), 0);
    const int64_t tasks = (runs + segments_ - 1) / segments_ * pieces_;
    e_.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      parallel_for(tasks, call_.threads, [&](int64_t task) {
        const int64_t first = task / pieces_ * segments_, low = task % pieces_ * kBlock;
        const int64_t last = std::min(runs, first + segments_);
        const int64_t length = std::min(kBlock, length_ - low);
        int64_t g = first % G, item = first / (G * call_.O);
        if (planted("every_chunk_of_runs_begins_anew")) g = 0;
        for (int64_t run = first; run < last; ++run) {
          write_run<K>(maps[item * G + g], run * length_ + low, length);
          if (++g == G) g = 0, item = (run + 1) / (G * call_.O);
        }
      });
    });
  }

  // Σg and Σg·(x − center) of each sub-run of a statistic, g before the weight.
  void reduce(const Place& at, int64_t threads, double* sums) const {
    if (threads > 1 && call_.M == 1) {
      const Scratch<double> parts(2 * blocks_, 0);
      parallel_for(blocks_, threads, [&](int64_t block) {
        reduce_block(at, block, parts.data() + 2 * block);
      });
      for (int64_t k = 0; k < 2 * blocks_; ++k) sums[k & 1] += parts[k];
      return;
    }
    for (int64_t block = 0; block < blocks_; ++block) reduce_block(at, block, sums);
  }
  void reduce_block(const Place& at, int64_t block, double* sums) const {
    e_.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      PairSums<C> pair;
      Map<C> map = map_of(at, 0);
      int64_t current = 0;
      each_sub_run(at, block, [&](int64_t first, int64_t n, int64_t m) NK_BODY {
        if (m != current) {
          add_to(sums + 2 * current, pair, at);
          pair = PairSums<C>{};
          map = map_of(at, m);
          current = m;
        }
        add_products<K>(pair, map, first, n);
      });
      add_to(sums + 2 * current, pair, at);
    });
  }
  template <int K>
  NK_INLINE void add_products(PairSums<C>& pair, const Map<C>& map, int64_t first,
                              int64_t n) const {
    const V hi = splat(map.hi), a = splat(map.a), shift = splat(map.shift);
    T* kept = e_.dresidual;
    constexpr bool in_twos = Elements<T>::template in_twos<K>;
    pair.template add<in_twos>(n, [&](int64_t i, auto lanes, auto& u, auto& d) NK_BODY {
      d = e_.template centered<K>(first + i, lanes, hi);
      u = e_.template gradient<K>(first + i, lanes,
                                  [&]() NK_BODY { return fused(d, a, shift); });
      if (NK_RARE(kept)) e_.keep(kept + first + i, u, lanes);
    });
  }
  NK_INLINE void add_to(double* sums, PairSums<C>& pair, const Place& at) const {
    double g, gd;
    pair.total(g, gd);
    sums[0] += g;
    const bool is_sloppy = planted("sums_are_around_the_rounded_centre");
    sums[1] += gd - (is_sloppy ? 0 : Split<C>(this->center_of(at.stat)).lo) * g;
  }

  void write_gradient(const Place& at, int64_t block, Slope slope, bool is_gated) const {
    const Elements<T> e = this->gated_elements(is_gated);
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      Map<C> map = map_of(at, 0);
      const SlopeMap<C> slopes(slope, this->center_of(at.stat));
      const V b = splat(slopes.b), c = splat(slopes.c);
      each_sub_run<true>(at, block, [&](int64_t first, int64_t n, int64_t m) NK_BODY {
        if (call_.M > 1) map = map_of(at, m);
        const V hi = splat(map.hi), a = splat(map.a), shift = splat(map.shift);
        constexpr bool in_twos = Elements<T>::template in_twos<K>;
        this->template streamed<in_twos>(
            e.streams, e.dx + first, n, [&](int64_t i, auto lanes) NK_BODY {
              const auto d = e.template centered<K>(first + i, lanes, hi);
              auto g = e.template gradient<K>(first + i, lanes, [&]() NK_BODY {
                return fused(d, a, shift);
              });
              if (NK_RARE(e.dresidual)) e.keep(e.dresidual + first + i, g, lanes);
              g = fused(g, a, fused(d, b, c));
              if constexpr (K == kAny) {
                if (e.mask) g = select(e.valid(first + i, lanes), g, V{});
              }
              e.put(e.dx + first + i, g, lanes);
            });
      });
    });
  }

  // dweight = Σ scale·Σg(x − center), dbias = ΣΣg, over all statistics of an entry.
  void reduce_learned(const double* sums) const {
    const int64_t M = call_.M, entries = call_.P * M;
    const Scratch<double> dweight(entries, 0), dbias(entries, 0);
    int64_t first = 0;  // counted up: a division for each statistic would take longer
    for (int64_t stat = 0; stat < call_.statistics(); ++stat, first += M) {
      if (first == entries) first = 0;
      const double scale = call_.scale[stat];
      for (int64_t m = 0; m < M; ++m) {
        dbias[first + m] += sums[2 * (stat * M + m)];
        dweight[first + m] += scale * sums[2 * (stat * M + m) + 1];
      }
    }
    store_learned(call_.dweight, call_.weight_dtype, entries, dweight.data());
    store_learned(call_.dbias, call_.bias_dtype, entries, dbias.data());
  }

  const int64_t pieces_, segments_, blocks_;
};

}  // namespace NK_ISA
}  // namespace normkit
