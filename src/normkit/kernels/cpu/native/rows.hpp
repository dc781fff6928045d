// Statistics over rows whose learned affine varies along the row: layer norm, RMS norm,
// group norm without positions.
//
// One row after the other, or a few, in the cache; the next are fetched while these are
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
        shares_learned_(call.P == 1 && length_ >= kLongRow &&
                        length_ * kTogether * 2 * sizeof(T) <= (512 << 10)),
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
    if (this->measures_several()) {
      this->forward_several([&](const Place& row) NK_BODY { write(row, 0); });
      return;
    }
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
    const int64_t rows = call_.statistics(), per = rows_per_part(rows);
    const int64_t parts = rows ? (rows + per - 1) / per : 0;
    std::vector<double> learned(wants_learned ? 2 * width_ * parts : 0);
    parallel_for(parts, call_.threads, [&](int64_t part) {
      std::vector<C> some(wants_learned ? 2 * width_ : 0);
      double* all = wants_learned ? &learned[2 * width_ * part] : nullptr;
      const int64_t end = (part + 1) * per < rows ? (part + 1) * per : rows;
      int64_t pending = 0;
      const auto take = [&](int64_t row, auto together) {
        backward_of(row, together, some.data());
        if ((pending += decltype(together)::value) < kFlush) return;
        flush(some, all);
        pending = 0;
      };
      int64_t row = part * per;
      if (shares_learned_) {
        for (; row + kTogether <= end; row += kTogether) take(row, Together{});
      }
      for (; row < end; ++row) take(row, Alone{});
      if (wants_learned) flush(some, all);
      if (e_.streams) finish_streams();
    });
    if (wants_learned) store_learned_sums(learned, parts);
  }

  void apply_grads() const {
    this->each_statistic([&](const Place& row, int64_t) {
      const Slope slope{call_.b[row.stat], call_.c[row.stat]};
      write_gradients<false>(&row, &slope, Alone{}, false, nullptr);
    });
  }

 private:
  using C = compute_t<T>;
  using V = Vec<C>;
  using typename Runs<T>::Place;
  using Runs<T>::call_, Runs<T>::e_, Runs<T>::length_, Runs<T>::blocks_;

  using Together = std::integral_constant<int, 4>;
  using Alone = std::integral_constant<int, 1>;
  static constexpr int64_t kLongRow = 768;
  static constexpr int kTogether = Together::value, W = Lanes<C>::count;

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
    const int64_t ahead = this->ahead_;
    e_.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      this->each_part(row, block, [&](int64_t first, int64_t low, int64_t n) NK_BODY {
        this->streamed(
            e_.y + first, n, [&](int64_t i, auto lanes) NK_BODY {
              __builtin_prefetch(e_.x + first + i + ahead, 0, 2);
              V z = e_.template centered<K>(first + i, lanes, hi) * a + shift;
              z = z * e_.get(w + low + i, lanes) + e_.get(bias + low + i, lanes);
              z = e_.template finish<K>(z, first + i, lanes);
              e_.put(e_.y + first + i, z, lanes);
            });
      });
    });
  }

  // Some neighbouring rows: their sums, then dx. What they add to the learned sums is
  // found on the way: of one row with its own sums, of several with dx.
  template <class Count>
  void backward_of(int64_t first, Count together, C* some) const {
    constexpr int R = Count::value;
    Place rows[R];
    Slope slopes[R];
    const bool learns = call_.dweight || call_.dbias;
    const bool wants_sums = learns || call_.sum_dy || !call_.has(kGiven);
    for (int r = 0; r < R; ++r) {
      const Place row = rows[r] = this->place_of(first + r);
      if (!wants_sums) continue;
      double sums[2];
      if (R == 1 && learns) reduce<true>(row, sums, some);
      else reduce<false>(row, sums, nullptr);
      if (call_.sum_dy) {
        call_.sum_dy[row.stat] = sums[0];
        call_.sum_dyx[row.stat] = sums[1];
      }
      slopes[r] = slope_of(sums[0], sums[1], call_.scale[row.stat], this->count_of(row),
                           call_);
    }
    if (R > 1 && learns) {
      write_gradients<true>(rows, slopes, together, wants_sums, some);
    } else if (e_.dx) {
      write_gradients<false>(rows, slopes, together, wants_sums, nullptr);
    }
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
    sums[0] = sums[1] = 0;
    this->add_to(sums, pair, row);
  }

  // Column by column over the rows, so that what they add to Σg and Σg·(x − center)·scale
  // of an element stays in registers. Rows of 4096: 0.9 of the time of one row alone; rows
  // of 256: 1.2, so they are taken alone.
  template <bool Learns, class Count>
  void write_gradients(const Place* rows, const Slope* slopes, Count, bool is_gated,
                       C* some) const {
    constexpr int R = Count::value;
    Elements<T> e = this->gated_elements(is_gated);
    e.streams = can_stream(rows[0]);
    const int64_t entry = first_entry(rows[0]), ahead = R * length_;
    const C *w = &w_[entry], *bias = &z_[entry];
    C *dbias = some + entry, *dweight = dbias + width_;
    C hi[R], a[R], shift[R], b[R], c[R];
    for (int r = 0; r < R; ++r) {
      const double center = this->center_of(rows[r]);
      const Map<C> map(center, call_.scale[rows[r].stat], 1, 0);
      hi[r] = map.hi;
      a[r] = map.a;
      shift[r] = map.shift;
      b[r] = (C)slopes[r].b;
      c[r] = (C)(slopes[r].c - slopes[r].b * Split<C>(center).lo);
    }
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      each_vector<W>(length_, [&](int64_t j, auto lanes) NK_BODY {
        const V wi = e.get(w + j, lanes);
        V sum_g{}, sum_gx{};
        for (int r = 0; r < R; ++r) {
          const int64_t at = rows[r].base + j;
          __builtin_prefetch(e_.x + at + ahead, 0, 2);
          __builtin_prefetch(e_.dy + at + ahead, 0, 2);
          const V d = e.template centered<K>(at, lanes, splat(hi[r]));
          const V x_hat = d * splat(a[r]) + splat(shift[r]);
          V g = e.template gradient<K>(at, lanes, [&]() NK_BODY {
            return x_hat * wi + e.get(bias + j, lanes);
          });
          if (e.dresidual) e.keep(e.dresidual + at, g, lanes);
          if constexpr (Learns) {
            sum_g += g;
            sum_gx += g * x_hat;
          }
          if (!e.dx) continue;
          if (planted("rows_forget_the_weight")) g = g / wi;
          g = (g * wi) * splat(a[r]) + (d * splat(b[r]) + splat(c[r]));
          if (K == kAny && e.mask) g = select(e.valid(at, lanes), g, V{});
          e.put(e.dx + at, g, lanes);
        }
        if constexpr (Learns) {
          add_at(dbias + j, sum_g, lanes);
          add_at(dweight + j, sum_gx, lanes);
        }
      });
    });
  }
  static NK_INLINE void add_at(C* p, V v, Full) { store(p, load(p) + v); }
  static NK_INLINE void add_at(C* p, V v, First f) {
    store_first(p, f.n, load_first(p, f.n, V{}) + v);
  }
  bool can_stream(const Place& row) const {
    constexpr int64_t vector = W * sizeof(T);
    return e_.streams && e_.dx && length_ * sizeof(T) % vector == 0 &&
           before_aligned(e_.dx + row.base) == 0;
  }

  void store_learned_sums(const std::vector<double>& learned, int64_t parts) const {
    for (int64_t k = 0; k < width_ / fold_; ++k) {
      double dbias = 0, dweight = 0;
      for (int64_t part = parts > 1 && planted("a_part_of_the_rows_is_lost"); part < parts; ++part) {
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
  const bool shares_learned_;
  std::vector<C> w_, z_;
};

}  // namespace NK_ISA
}  // namespace normkit
