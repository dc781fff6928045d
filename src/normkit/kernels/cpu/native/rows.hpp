// Statistics over rows whose learned affine varies along the row: layer norm, RMS norm,
// group norm without positions.
//
// One row after the other, in the cache; the next one is fetched while this one is
// written (a row is a page or so, where the hardware's own prefetch stops: 1.4 times as
// fast). Backward sums dweight and dbias of a part of
// the rows in float, flushed to double; the parts depend on the sizes alone and are
// added in order.
#pragma once
#include <vector>

#include "runs.hpp"

namespace normkit {
namespace NK_ISA {

template <class T> class Rows : private Runs<T> {
 public:
  explicit Rows(const Call& call)
      : Runs<T>(call),
        fold_(call.affine == kPerRun ? call.I : 1),
        width_(call.P * length_),
        w_(width_),
        z_(width_) {
    for (int64_t k = 0, j = 0; j < width_; ++k) {
      const C w = (C)this->weight_[k], z = (C)this->bias_[k];
      for (const int64_t end = j + fold_; j < end; ++j) {
        w_[j] = w;
        z_[j] = z;
      }
    }
  }

  void forward() const {
    this->each_statistic([&](const Place& row, int64_t threads) {
      if (!call_.has(kGiven)) this->measure(row, threads);
      if (!e_.y) return;
      parallel_for(blocks_, threads, [&](int64_t block) {
        write(row, blocks_ - 1 - block);
      });
    });
  }

  void backward() const {
    const bool wants_learned = call_.dweight || call_.dbias;
    const bool wants_sums = wants_learned || call_.sum_dy || !call_.has(kGiven);
    const int64_t rows = call_.statistics(), per = rows_per_part(rows);
    const int64_t parts = rows ? (rows + per - 1) / per : 0;
    std::vector<double> learned(wants_learned ? 2 * width_ * parts : 0);
    parallel_for(parts, call_.threads, [&](int64_t part) {
      std::vector<C> some(wants_learned ? 2 * width_ : 0);
      double* all = wants_learned ? &learned[2 * width_ * part] : nullptr;
      int64_t pending = 0;
      for (int64_t k = part * per; k < rows && k < (part + 1) * per; ++k) {
        const Place row = this->place_of(k);
        Slope slope;
        if (wants_sums) {
          double sums[2] = {0, 0};
          if (wants_learned) reduce<true>(row, sums, some.data());
          else reduce<false>(row, sums, nullptr);
          if (call_.sum_dy) {
            call_.sum_dy[row.stat] = sums[0];
            call_.sum_dyx[row.stat] = sums[1];
          }
          slope = slope_of(sums[0], sums[1], call_.scale[row.stat], this->count_of(row),
                           call_);
        }
        if (e_.dx) write_gradients(row, slope, wants_sums);
        if (wants_learned && (++pending == kFlush || k + 1 == rows)) {
          flush(some, all);
          pending = 0;
        }
      }
      if (pending) flush(some, all);
      if (e_.streams) finish_streams();
    });
    if (wants_learned) store_learned_sums(learned, parts);
  }

  void apply_grads() const {
    this->each_statistic([&](const Place& row, int64_t) {
      write_gradients(row, Slope{call_.b[row.stat], call_.c[row.stat]}, false);
    });
  }

 private:
  using C = compute_t<T>;
  using V = Vec<C>;
  using typename Runs<T>::Place;
  using Runs<T>::call_, Runs<T>::e_, Runs<T>::length_, Runs<T>::blocks_;

  // Enough rows for the sums of a part to be small beside what they are sums of.
  int64_t rows_per_part(int64_t rows) const {
    int64_t per = (rows + 31) / 32;
    const int64_t in_cache = 32768 / (length_ + 1);
    if (per < in_cache) per = in_cache;
    return per < 16 ? 16 : per;
  }
  static void flush(std::vector<C>& some, double* all) {
    for (size_t k = 0; k < some.size(); ++k) {
      all[k] += (double)some[k];
      some[k] = 0;
    }
  }
  NK_INLINE int64_t first_entry(const Place& row) const {
    return row.entry / call_.M * length_;
  }

  void write(const Place& row, int64_t block) const {
    const Map<C> map(this->center_of(row), call_.scale[row.stat], 1, 0);
    const V hi = splat(map.hi), a = splat(map.a), shift = splat(map.shift);
    const C *w = &w_[first_entry(row)], *bias = &z_[first_entry(row)];
    e_.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      this->each_part(row, block, [&](int64_t first, int64_t low, int64_t n) NK_BODY {
        this->streamed(
            e_.y + first, n, [&](int64_t i, auto lanes) NK_BODY {
              __builtin_prefetch(e_.x + first + i + length_);
              V z = e_.template centered<K>(first + i, lanes, hi) * a + shift;
              z = z * e_.get(w + low + i, lanes) + e_.get(bias + low + i, lanes);
              z = e_.template finish<K>(z, first + i, lanes);
              e_.put(e_.y + first + i, z, lanes);
            });
      });
    });
  }

  // Σg·w and Σg·w·(x − center) of a row; Σg and Σg·(x − center)·scale of each element.
  template <bool Learns> void reduce(const Place& row, double* sums, C* some) const {
    const Map<C> map(this->center_of(row), call_.scale[row.stat], 1, 0);
    const V hi = splat(map.hi), a = splat(map.a), shift = splat(map.shift);
    const C *w = &w_[first_entry(row)], *bias = &z_[first_entry(row)];
    C *dbias = some + first_entry(row), *dweight = dbias + width_;
    const bool is_weighted = !call_.sum_dy || call_.has(kWeighted);
    T* kept = e_.dresidual;
    PairSums<C> pair;
    e_.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      for (int64_t block = 0; block < blocks_; ++block) {
        this->each_part(row, block, [&](int64_t first, int64_t low, int64_t n) NK_BODY {
          pair.add(n, [&](int64_t i, auto lanes, V& u, V& v) NK_BODY {
            const V d = e_.template centered<K>(first + i, lanes, hi);
            const V x_hat = d * a + shift, wi = e_.get(w + low + i, lanes);
            u = e_.template gradient<K>(first + i, lanes, [&]() NK_BODY {
              return x_hat * wi + e_.get(bias + low + i, lanes);
            });
            if (kept) e_.keep(kept + first + i, u, lanes);
            if constexpr (Learns) {
              add_at(dbias + low + i, u, lanes);
              add_at(dweight + low + i, u * x_hat, lanes);
            }
            if (is_weighted) u = u * wi;
            v = u * d;
          });
        });
      }
    });
    this->add_to(sums, pair, row);
  }
  static NK_INLINE void add_at(C* p, V v, Full) { store(p, load(p) + v); }
  static NK_INLINE void add_at(C* p, V v, First f) {
    store_first(p, f.n, load_first(p, f.n, V{}) + v);
  }

  void write_gradients(const Place& row, Slope slope, bool is_gated) const {
    for (int64_t block = blocks_ - 1; block >= 0; --block) {
      write_gradient(row, block, slope, is_gated);
    }
  }
  void write_gradient(const Place& row, int64_t block, Slope slope, bool is_gated) const {
    Elements<T> e = e_;
    if (is_gated && e.dresidual) {
      e.dy = e.dresidual;
      e.dresidual = nullptr;
      e.activation = kNone;
    }
    const double center = this->center_of(row);
    const Map<C> map(center, call_.scale[row.stat], 1, 0);
    const V hi = splat(map.hi), a = splat(map.a), shift = splat(map.shift);
    const V b = splat((C)slope.b);
    const V c = splat((C)(slope.c - slope.b * Split<C>(center).lo));
    const C *w = &w_[first_entry(row)], *bias = &z_[first_entry(row)];
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      this->each_part(row, block, [&](int64_t first, int64_t low, int64_t n) NK_BODY {
        this->streamed(
            e.dx + first, n, [&](int64_t i, auto lanes) NK_BODY {
              __builtin_prefetch(e_.x + first + i + length_);
              __builtin_prefetch(e_.dy + first + i + length_);
              const V d = e.template centered<K>(first + i, lanes, hi);
              const V wi = e.get(w + low + i, lanes);
              V g = e.template gradient<K>(first + i, lanes, [&]() NK_BODY {
                return (d * a + shift) * wi + e.get(bias + low + i, lanes);
              });
              if (e.dresidual) {
                e.keep(e.dresidual + first + i, g, lanes);
              }
              g = (g * wi) * a + (d * b + c);
              if (K == kAny && e.mask) g = select(e.valid(first + i, lanes), g, V{});
              e.put(e.dx + first + i, g, lanes);
            });
      });
    });
  }

  void store_learned_sums(const std::vector<double>& learned, int64_t parts) const {
    for (int64_t k = 0; k < width_ / fold_; ++k) {
      double dbias = 0, dweight = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const double* of_part = &learned[2 * width_ * part];
        for (int64_t j = k * fold_; j < (k + 1) * fold_; ++j) {
          dbias += of_part[j];
          dweight += of_part[width_ + j];
        }
      }
      if (call_.dweight) store_learned(call_.dweight, call_.weight_dtype, k, dweight);
      if (call_.dbias) store_learned(call_.dbias, call_.bias_dtype, k, dbias);
    }
  }

  const int64_t fold_, width_;
  std::vector<C> w_, z_;
};

}  // namespace NK_ISA
}  // namespace normkit
