// Spans whose learned affine varies along them: layer norm, RMS norm, group norm without
// positions.
//
// Rows that a mask hides as a whole are set to 0 and left out; the others run as without a
// mask. Byte by byte the mask would be read in the general loop, at twice the time.
//
// Backward sums dweight and dbias of a part of the rows in float, flushed to double; the
// parts depend on the sizes alone and are added in order.
#pragma once
#include "spans.hpp"

namespace normkit {
namespace NK_ISA {

template <class T> class Rows : private Spans<T> {
 public:
  // `shown`: a byte for each row, 0 where it is hidden; null shows all of them.
  explicit Rows(const Call& call, const uint8_t* shown = nullptr)
      : Spans<T>(call),
        shown_(shown),
        fold_(call.affine == kPerRun ? call.I : 1),
        width_(call.P * length_),
        unfolded_(fold_ > 1 ? 2 * width_ : 0),
        w_(fold_ > 1 ? unfolded_.data() : this->weight_.data()),
        z_(fold_ > 1 ? unfolded_.data() + width_ : this->bias_.data()) {
    for (int64_t k = 0; fold_ > 1 && k < width_; ++k) {
      unfolded_[k] = this->weight_[k / fold_];
      unfolded_[width_ + k] = this->bias_[k / fold_];
    }
  }

  void forward() const {
    this->each_batch(this->together(1), [&](int64_t first, int64_t rows) {
      each_shown(first, rows, [&](int64_t from, int64_t n) {
        this->add_residual(from, n);
        if (!call_.has(kGiven)) this->measure(from, n);
        if (e_.y) write(from, n);
      });
    });
  }

  void backward() const {
    const bool learns = this->wants_learned();
    const int64_t rows = call_.statistics(), per = rows_per_part(rows);
    const int64_t parts = rows ? (rows + per - 1) / per : 0, together = rows_together();
    const Scratch<double> learned(learns ? 2 * width_ * parts : 0, 0);
    parallel_for(parts, call_.threads, [&](int64_t part) {
      const Scratch<C> some(learns ? 2 * width_ : 0, 0);
      double* all = learned.data() + 2 * width_ * part;
      const int64_t end = std::min(rows, (part + 1) * per);
      int64_t pending = 0;
      for (int64_t first = part * per; first < end; first += together) {
        const int64_t n = std::min(together, end - first);
        each_shown(first, n, [&](int64_t from, int64_t shown) {
          pending += backward_of(from, shown, some.data());
        });
        if (!learns || (pending < kFlush - kMost && first + n < end)) continue;
        for (int64_t k = 0; k < 2 * width_; ++k) all[k] += (double)some[k];
        if (first + n < end) std::fill(some.data(), some.data() + 2 * width_, C(0));
        pending = 0;
      }
    });
    if (learns) store_learned_sums(learned.data(), parts);
  }

  void apply_grads() const {
    this->each_batch(rows_together(), [&](int64_t first, int64_t rows) {
      const Maps maps = this->maps_of_x_hat(first, rows);
      const Slopes slopes = this->given_slopes(first, rows);
      write_gradients<false>(first, rows, maps, slopes, false, nullptr);
    });
  }

 private:
  using typename Spans<T>::C;
  using typename Spans<T>::V;
  using typename Spans<T>::Maps;
  using typename Spans<T>::Slopes;
  using Spans<T>::W, Spans<T>::kMost;
  using Spans<T>::call_, Spans<T>::e_, Spans<T>::length_, Spans<T>::is_large_;
  using Together = std::integral_constant<int, 4>;
  using Alone = std::integral_constant<int, 1>;

  // Rows whose x and dy stay in the first cache, and as many as share the learned sums
  // where they stay in the second.
  int64_t rows_together() const {
    const int64_t n = this->together(2);
    const bool fit = length_ * (int64_t)sizeof(T) <= (64 << 10);
    return n >= Together::value ? n - n % Together::value : fit ? Together::value : n;
  }
  // Enough rows that the sums of a part are small against their terms.
  int64_t rows_per_part(int64_t rows) const {
    const int64_t in_cache = 32768 / (length_ + 1);
    return std::max({(rows + 31) / 32, std::min<int64_t>((rows + 7) / 8, kFlush), in_cache,
                     (int64_t)16});
  }
  NK_INLINE int64_t first_entry(int64_t row) const {
    return call_.P == 1 ? 0 : row % call_.P * length_;
  }

  // task(from, n) for every stretch of rows that are not hidden.
  template <class Task>
  void each_shown(int64_t first, int64_t rows, const Task& task) const {
    if (!shown_ || planted("hidden_rows_are_normalized")) return task(first, rows);
    const int64_t end = first + rows;
    while (first < end) {
      const int64_t from = first;
      while (first < end && shown_[first]) ++first;
      if (from < first) task(from, first - from);
      for (; first < end && !shown_[first]; ++first) hide(first);
    }
  }
  void hide(int64_t row) const {
    for (T* output : {e_.y, e_.dx, e_.dresidual}) {
      if (output) std::fill_n(output + row * length_, length_, T{});
    }
    if (e_.dy) return;  // the statistics are read there
    call_.center[row] = call_.scale[row] = 0;
    if (call_.m2) call_.m2[row] = 0;
    if (call_.count) call_.count[row] = 0;
  }

  void write(int64_t first, int64_t rows) const {
    const Maps maps = this->maps_of_x_hat(first, rows);
    const int64_t ahead = rows * length_;
    e_.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      for (int64_t k = 0; k < rows; ++k) {
        const int64_t at = (first + k) * length_;
        const C *w = w_ + first_entry(first + k), *z = z_ + first_entry(first + k);
        const V hi = splat(maps.hi[k]), a = splat(maps.a[k]), shift = splat(maps.shift[k]);
        constexpr bool in_twos = Elements<T>::template in_twos<K>;
        this->template streamed<in_twos>(
            e_.streams, e_.y + at, length_, [&](int64_t i, auto lanes) NK_BODY {
              this->fetch(e_.x + at + i + ahead, nullptr);
              auto v = fused(e_.template centered<K>(at + i, lanes, hi), a, shift);
              v = fused(v, e_.get(w + i, lanes), e_.get(z + i, lanes));
              e_.put(e_.y + at + i, e_.template finish<K>(v, at + i, lanes), lanes);
            });
      }
    });
  }

  // The sums of some rows, then dx and their terms of the learned sums; returns the number
  // of additions.
  int64_t backward_of(int64_t first, int64_t rows, C* some) const {
    const bool learns = this->wants_learned(), wants_sums = this->wants_sums();
    const Maps maps = this->maps_of_x_hat(first, rows);
    Slopes slopes;
    if (wants_sums) {
      double g[kMost] = {}, gx[kMost] = {};
      reduce(first, rows, maps, g, gx);
      slopes = this->slopes_of(first, rows, g, gx);
    }
    if (learns) return write_gradients<true>(first, rows, maps, slopes, wants_sums, some);
    if (!e_.dx) return 0;
    return write_gradients<false>(first, rows, maps, slopes, wants_sums, nullptr);
  }

  // Σg·w and Σg·w·(x − center) of each row.
  void reduce(int64_t first, int64_t rows, const Maps& maps, double* g, double* gx) const {
    const bool is_weighted = this->is_weighted();
    T* kept = e_.dresidual;
    e_.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      constexpr bool in_twos = Elements<T>::template in_twos<K>;
      this->template sum_runs<in_twos>(length_, g, gx, [&](const auto& add) NK_BODY {
        for (int64_t k = 0; k < rows; ++k) {
          const int64_t at = (first + k) * length_;
          const C *w = w_ + first_entry(first + k), *z = z_ + first_entry(first + k);
          const V hi = splat(maps.hi[k]), a = splat(maps.a[k]), shift = splat(maps.shift[k]);
          add(at, [&](int64_t i, auto lanes, auto& u, auto& d) NK_BODY {
            this->fetch(e_.dx + at + i);
            d = e_.template centered<K>(at + i, lanes, hi);
            const auto wi = e_.get(w + i, lanes);
            u = e_.template gradient<K>(at + i, lanes, [&]() NK_BODY {
              return fused(fused(d, a, shift), wi, e_.get(z + i, lanes));
            });
            if (NK_RARE(kept)) e_.keep(kept + at + i, u, lanes);
            if (is_weighted) u = u * wi;
          });
        }
      });
    });
    if (planted("sums_are_around_the_rounded_centre")) return;
    for (int64_t k = 0; k < rows; ++k) {
      gx[k] -= Split<C>(this->center_of(first + k)).lo * g[k];
    }
  }

  template <bool Learns>
  int64_t write_gradients(int64_t first, int64_t rows, const Maps& maps,
                          const Slopes& slopes, bool is_gated, C* some) const {
    Elements<T> e = this->gated_elements(is_gated);
    e.streams = can_stream();
    int64_t k = 0, additions = 0;
    if (call_.P == 1 && (!is_large_ || length_ * (int64_t)sizeof(T) >= 4096)) {
      for (; k + Together::value <= rows; k += Together::value, ++additions) {
        write_some<Learns>(e, first, k, rows, maps, slopes, some, Together{});
      }
    }
    for (; k < rows; ++k, ++additions) {
      write_some<Learns>(e, first, k, rows, maps, slopes, some, Alone{});
    }
    return additions;
  }
  // Column by column over R rows, so that their terms of Σg and Σg·(x − center)·scale of
  // an element stay in registers.
  template <bool Learns, class Count>
  void write_some(const Elements<T>& e, int64_t first, int64_t k, int64_t rows,
                  const Maps& maps, const Slopes& slopes, C* some, Count) const {
    constexpr int R = Count::value;
    const int64_t base = (first + k) * length_, entry = first_entry(first + k);
    const int64_t ahead = rows * length_;
    const C *w = w_ + entry, *z = z_ + entry;
    C *dbias = some + entry, *dweight = dbias + width_;
    V hi[R], a[R], shift[R], b[R], c[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      hi[r] = splat(maps.hi[k + r]);
      a[r] = splat(maps.a[k + r]);
      shift[r] = splat(maps.shift[k + r]);
      b[r] = splat(slopes.b[k + r]);
      c[r] = splat(slopes.c[k + r]);
    }
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      constexpr bool in_twos = Elements<T>::template in_twos<K>;
      each_vector<W, in_twos>(length_, [&](int64_t j, auto lanes) NK_BODY {
        const auto wi = e.get(w + j, lanes);
        std::decay_t<decltype(wi)> sum_g{}, sum_gx{};
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int64_t at = base + r * length_ + j;
          this->fetch(e.x + at + ahead, e.dy + at + ahead);
          const auto d = e.template centered<K>(at, lanes, hi[r]);
          const auto x_hat = fused(d, a[r], shift[r]);
          auto g = e.template gradient<K>(at, lanes, [&]() NK_BODY {
            return fused(x_hat, wi, e.get(z + j, lanes));
          });
          if (NK_RARE(e.dresidual)) e.keep(e.dresidual + at, g, lanes);
          if constexpr (Learns) {
            sum_g = sum_g + g;
            sum_gx = fused(g, x_hat, sum_gx);
          }
          if (NK_RARE(!e.dx)) continue;
          if (planted("rows_forget_the_weight")) g = g / wi;
          g = fused(g * wi, a[r], fused(d, b[r], c[r]));
          if (NK_RARE(e.dsum)) g = g + e.get(e.dsum + at, lanes, V{});
          if constexpr (K == kAny) {
            if (e.mask) g = select(e.valid(at, lanes), g, V{});
          }
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
  static NK_INLINE void add_at(C* p, Two v, Both) { store_two(p, load_two(p) + v); }
  static NK_INLINE void add_at(C* p, V v, First f) {
    store_first(p, f.n, load_first(p, f.n, V{}) + v);
  }
  // Whether every row of dx begins where a vector can be written past the caches.
  // Not with AVX2, whose vectors fill half a line: 8.1 ns a value, by plain stores 2.0 (layer
  // norm of 8192 rows of 4096, an EPYC). Runs and groups are faster with it there, too.
  bool can_stream() const {
    return sizeof(vf) == 64 && e_.streams && length_ * sizeof(T) % kStreamed<T> == 0 &&
           before_aligned(e_.dx) == 0;
  }

  void store_learned_sums(const double* learned, int64_t parts) const {
    const Scratch<double> all(2 * width_, 0);
    for (int64_t part = parts > 1 && planted("a_part_of_the_rows_is_lost"); part < parts;
         ++part, learned += 2 * width_) {
      for (int64_t k = 0; k < 2 * width_; ++k) all[k] += learned[k];
    }
    const int64_t entries = width_ / fold_;
    for (int64_t k = 0; fold_ > 1 && k < 2 * entries; ++k) {
      double sum = 0;
      for (int64_t j = k * fold_; j < (k + 1) * fold_; ++j) sum += all[j];
      all[k] = sum;
    }
    store_learned(call_.dbias, call_.bias_dtype, entries, all.data());
    store_learned(call_.dweight, call_.weight_dtype, entries, all.data() + entries);
  }

  const uint8_t* const shown_;
  const int64_t fold_, width_;
  const Scratch<C> unfolded_;
  const C *const w_, *const z_;
};

}  // namespace NK_ISA
}  // namespace normkit
