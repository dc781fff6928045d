// Statistics over columns: channels_last and 2-D batch norm, per batch item instance and
// group norm in channels_last, and NCHW with few positions.
//
// x of one batch item is a matrix of O rows and D = G·I columns; the columns of one
// statistic are I neighbours. Narrow matrices are read k rows at a time, as E = k·D
// columns, so that vectors are whole and aligned. Tasks are blocks of rows by tiles of
// columns; the blocks depend on the sizes alone and are added in order.
#pragma once
#include <numeric>

#include "per_column.hpp"

namespace normkit {
namespace NK_ISA {

template <class T> class Columns : private Layout<T> {
 public:
  explicit Columns(const Call& call)
      : Layout<T>(call),
        per_item_(call.G * call.I),
        width_(per_item_ * rows_at_once(per_item_, call.O)),
        rows_(width_ ? call.O * per_item_ / width_ : 0),
        rest_(width_ ? call.O * per_item_ % width_ : 0),
        block_(std::min(std::max(rows_ / 16, kLeastRows), kMostRows)),
        blocks_(rows_ > block_ ? (rows_ + block_ - 1) / block_ : 1),
        tiles_((width_ + kTile - 1) / kTile),
        is_own_(call.affine == kPerElement),
        entries_(is_own_ ? per_item_ : call.G),
        takes_some_(width_ * (int64_t)sizeof(T) >= kPage) {}

  void forward() const {
    each_item([&](int64_t item, int64_t threads) {
      if (!call_.has(kGiven)) measure(item, threads);
      if (!e_.y) return;
      const Maps maps(*this, item);
      each_task<Order::kBackwards>(threads, [&](int64_t block, int64_t tile) {
        write(item, block, tile, maps);
      });
    });
  }

  void backward() const {
    const bool wants_sums = this->wants_sums();
    const Scratch<double> sums(wants_sums ? 2 * entries_ * call_.B : 0);
    each_item([&](int64_t item, int64_t threads) {
      const Maps maps(*this, item);
      const Scratch<Slope> slopes(call_.G, Slope{});
      if (wants_sums) {
        double *g = sums.data() + 2 * entries_ * item, *gx = g + entries_;
        reduce(item, threads, maps, g, gx);
        find_slopes(item, g, gx, slopes.data());
      }
      if (!e_.dx) return;
      const SlopeMaps of_columns(*this, item, slopes.data());
      each_task<Order::kBackwards>(threads, [&](int64_t block, int64_t tile) {
        write_gradient(item, block, tile, maps, of_columns, wants_sums);
      });
    });
    if (this->wants_learned()) reduce_learned(sums.data());
  }

  void apply_grads() const {
    each_item([&](int64_t item, int64_t threads) {
      const Maps maps(*this, item);
      const Scratch<Slope> slopes(call_.G);
      for (int64_t g = 0, stat = item * call_.G; g < call_.G; ++g, ++stat) {
        slopes[g] = {call_.b[stat], call_.c[stat]};
      }
      const SlopeMaps of_columns(*this, item, slopes.data());
      each_task<Order::kForwards>(threads, [&](int64_t block, int64_t tile) {
        write_gradient(item, block, tile, maps, of_columns, false);
      });
    });
  }

 private:
  using typename Layout<T>::C;
  using typename Layout<T>::V;
  using Layout<T>::W, Layout<T>::call_, Layout<T>::e_;
  // Rows of a block: at most twice kFlush, of which each column has one value in a row.
  static constexpr int64_t kLeastRows = 32, kMostRows = 2 * kFlush;
  // Rows as wide as a page are read kTogether at once, which loads each column's
  // coefficients once: 0.7 of the time. Narrow ones are not: several rows within a page are
  // no stream that the hardware's prefetch knows. Of 64 channels, 0.8 MB take as long
  // either way, 1.6 to 3.2 MB 1.2 to 1.4 times as long together.
  static constexpr int64_t kTogether = 4, kPage = 4096;
  // Tiles of half a page make each row of a tile a stream of its own: bfloat16 of 2048
  // channels took 1.4 times as long in tiles of 1024 columns.
  static constexpr int64_t kTile = kPage / sizeof(T);

  static int64_t rows_at_once(int64_t columns, int64_t rows) {
    if (columns == 0 || rows == 0) return 1;
    const int64_t step = 32 / std::gcd(columns, (int64_t)32);
    if (step * columns > 4096 || step > rows) return 1;
    int64_t k = step;
    while (k * columns < 256 && k + step <= rows) k += step;
    return k;
  }

  using Zero = std::integral_constant<int64_t, 0>;
  using One = std::integral_constant<int64_t, 1>;

  // body(n, column, stat, entry, S, E): n columns from `column` on, the i-th of them of
  // the statistic stat + i·S and the learned entry + i·E. Steps that are constants let
  // loops run in vectors.
  template <class Body> NK_INLINE void each_run(const Body& body) const {
    if (call_.I == 1 && call_.P == call_.G) return body(call_.G, 0, 0, 0, One{}, One{});
    int64_t in_period = 0;
    for (int64_t g = 0; g < call_.G; ++g, ++in_period) {
      if (in_period == call_.P) in_period = 0;
      if (is_own_) body(call_.I, g * call_.I, g, in_period * call_.I, Zero{}, One{});
      else body(call_.I, g * call_.I, g, in_period, Zero{}, Zero{});
    }
  }
  // The map of each column.
  enum { kHi, kA, kShift };
  struct Maps : PerColumn<T, 3> {
    Maps(const Columns& owner, int64_t item)
        : PerColumn<T, 3>(owner.per_item_, owner.width_) {
      C *const hi = (*this)[kHi], *const a = (*this)[kA], *const shift = (*this)[kShift];
      const int64_t first = item * owner.call_.G;
      const Scratch<double> center(owner.call_.G, 0);
      if (owner.call_.has(kCentered)) {
        std::copy_n(owner.call_.center + first, owner.call_.G, center.data());
      }
      const double *of_center = center.data(), *scale = owner.call_.scale + first;
      const C *w = owner.weight_.data(), *z = owner.bias_.data();
      owner.each_run([&](int64_t n, int64_t column, int64_t stat, int64_t entry, auto S,
                         auto E) NK_BODY {
        for (int64_t i = 0; i < n; ++i) {
          const int64_t g = stat + i * S, k = entry + i * E;
          const Map<C> map(of_center[g], scale[g], w[k], z[k]);
          hi[column + i] = map.hi;
          a[column + i] = map.a;
          shift[column + i] = map.shift;
        }
      });
      this->finish();
    }
  };
  // What dx adds for each column.
  enum { kB, kC };
  struct SlopeMaps : PerColumn<T, 2> {
    SlopeMaps(const Columns& owner, int64_t item, const Slope* slopes)
        : PerColumn<T, 2>(owner.per_item_, owner.width_) {
      C *const b = (*this)[kB], *const c = (*this)[kC];
      for (int64_t g = 0, column = 0; g < owner.call_.G; ++g) {
        const SlopeMap<C> map(slopes[g], owner.center_of(item * owner.call_.G + g));
        for (int64_t i = 0; i < owner.call_.I; ++i, ++column) {
          b[column] = map.b;
          c[column] = map.c;
        }
      }
      this->finish();
    }
  };

  NK_INLINE int64_t item_base(int64_t item) const { return item * call_.O * per_item_; }
  bool can_stream(const T* out, int64_t item) const {
    return e_.streams && width_ * sizeof(T) % kStreamed<T> == 0 &&
           before_aligned(out + item_base(item)) == 0;
  }

  // With AVX2 a streamed store fills half a line, and of rows written together the other
  // half follows after the other rows: 1.3 times the time of one row after the other, 1.1
  // times that of plain stores (float32, 1024 channels, 6.4M values).
  bool writes_some(const Elements<T>& e) const {
    return takes_some_ && (sizeof(vf) == 64 || !e.streams);
  }

  template <class Task> void each_item(const Task& task) const {
    if (call_.B >= 2 * call_.threads) {
      parallel_for(call_.B, call_.threads, [&](int64_t item) { task(item, 1); });
    } else {
      for (int64_t item = 0; item < call_.B; ++item) task(item, call_.threads);
    }
  }
  template <Order order, class Task>
  void each_task(int64_t threads, const Task& task) const {
    parallel_for<order>(blocks_ * tiles_, threads, [&](int64_t k) {
      task(k / tiles_, k % tiles_);
    });
  }

  // body(at, rows, n): groups of rows of a block, kTogether of them if `takes_some`, or one;
  // `at` is the offset of the first row's first column. The last block ends with the
  // incomplete row.
  template <class Body>
  NK_INLINE void each_group(int64_t item, int64_t block, int64_t tile, bool takes_some,
                            const Body& body) const {
    const int64_t low = tile * kTile, n = std::min(width_ - low, kTile);
    const int64_t end = std::min((block + 1) * block_, rows_);
    int64_t row = block * block_;
    const int64_t base = item_base(item) + low;
    for (; takes_some && row + kTogether <= end; row += kTogether) {
      body(base + row * width_, std::integral_constant<int, kTogether>{}, n);
    }
    const bool has_rest = block == blocks_ - 1 && rest_ > low &&
                          !planted("the_incomplete_row_is_dropped");
    for (; row < end + has_rest; ++row) {
      const int64_t some = row < end || rest_ - low > n ? n : rest_ - low;
      body(base + row * width_, std::integral_constant<int, 1>{}, some);
    }
  }

  // Sums of two quantities for each column of each block.
  struct Partials {
    const int64_t width;
    const Scratch<C> u, v;
    Partials(int64_t blocks, int64_t columns)
        : width(columns), u(blocks * columns + W), v(blocks * columns + W) {}
  };
  // term(at, j, lanes, u, d) gives the factors of one vector of column j; Σu and Σu·d.
  template <class Term>
  void sum_block(int64_t item, int64_t block, int64_t tile, const Partials& all,
                 const Term& term) const {
    const int64_t low = tile * kTile, n = std::min(width_ - low, kTile);
    alignas(64) C u[kTile], v[kTile];
    std::fill(u, u + n, C(0));
    std::fill(v, v + n, C(0));
    each_group(item, block, tile, takes_some_, [&](int64_t at, auto together,
                                                   int64_t some) NK_BODY {
      each_vector<W>(some, [&](int64_t j, auto lanes) NK_BODY {
        V su = load(u + j), sv = load(v + j), tu, td;  // padded to whole vectors
        for (int r = 0; r < decltype(together)::value; ++r) {
          term(at + r * width_ + j, low + j, lanes, tu, td);
          su += tu;
          sv = fused(tu, td, sv);
        }
        store(u + j, su);
        store(v + j, sv);
      });
    });
    std::copy_n(u, n, all.u.data() + block * all.width + low);
    std::copy_n(v, n, all.v.data() + block * all.width + low);
  }
  // Σ over the blocks, and over the rows that were read as one.
  void gather(const Partials& all, double* u, double* v) const {
    std::fill(u, u + per_item_, 0);
    std::fill(v, v + per_item_, 0);
    const int lost = blocks_ > 1 && planted("a_block_of_columns_is_lost");
    for (int64_t at = 0; at < (blocks_ - lost) * width_; at += per_item_) {
      const C *some_u = all.u.data() + at, *some_v = all.v.data() + at;
      for (int64_t j = 0; j < per_item_; ++j) {
        u[j] += (double)some_u[j];
        v[j] += (double)some_v[j];
      }
    }
  }

  // Near enough to each mean: of one value in each of up to eight rows.
  void find_pilots(int64_t item, C* pilots) const {
    const int64_t picks = call_.O < 8 ? call_.O : 8, G = call_.G;
    const Scratch<double> sum(G, 0), n(G, 0);
    for (int64_t k = 0; k < picks; ++k) {
      const int64_t at = item_base(item) + k * call_.O / picks * per_item_;
      for (int64_t g = 0; g < G; ++g) {
        if (e_.mask && !e_.mask[at + g * call_.I]) continue;
        sum[g] += to_double(e_.x[at + g * call_.I]);
        n[g] += 1;
      }
    }
    for (int64_t g = 0; g < G; ++g) {
      const C pilot = n[g] != 0 ? (C)(sum[g] / n[g]) : 0;
      pilots[g] = pilot - pilot == 0 ? pilot : 0;
    }
  }

  void measure(int64_t item, int64_t threads) const {
    const int64_t G = call_.G, first = item * G;
    const Scratch<C> pilots(G), per_column(width_);
    const Scratch<double> u(per_item_), v(per_item_), n(G, (double)call_.values());
    const Scratch<double> of_stats(call_.I == 1 ? 0 : 2 * G);
    double *s = call_.I == 1 ? u.data() : of_stats.data();
    double *q = call_.I == 1 ? v.data() : of_stats.data() + G;
    find_pilots(item, pilots.data());
    if (e_.mask) count_columns(item, n.data());
    const Partials all(blocks_, width_);
    for (int attempt = 1;; ++attempt) {
      for (int64_t g = 0; g < G; ++g) {
        std::fill_n(per_column.data() + g * call_.I, call_.I, pilots[g]);
      }
      for (int64_t j = per_item_; j < width_; ++j) per_column[j] = per_column[j - per_item_];
      each_task<Order::kForwards>(threads, [&](int64_t block, int64_t tile) {
        if (e_.mask) sum_centered<kAny>(item, block, tile, per_column.data(), all);
        else sum_centered<kPlain>(item, block, tile, per_column.data(), all);
      });
      gather(all, u.data(), v.data());
      for (int64_t g = 0; call_.I > 1 && g < G; ++g) {
        s[g] = q[g] = 0;
        for (int64_t j = g * call_.I; j < (g + 1) * call_.I; ++j) s[g] += u[j], q[g] += v[j];
      }
      if (attempt == kAttempts || !move_far(s, q, n.data(), G, pilots.data())) break;
    }
    store_statistics(call_, first, G, s, q, n.data(), pilots.data());
  }
  template <int K>
  void sum_centered(int64_t item, int64_t block, int64_t tile, const C* pilots,
                    const Partials& all) const {
    sum_block(item, block, tile, all,
              [&](int64_t at, int64_t j, auto lanes, V& u, V& d) NK_BODY {
                u = d = e_.template centered<K>(at, lanes, e_.get(pilots + j, lanes));
              });
  }
  // How many values of each statistic count; rows add up in bytes, which hold 255.
  void count_columns(int64_t item, double* n) const {
    std::fill(n, n + call_.G, 0);
    const uint8_t* mask = e_.mask + item_base(item);
    const Scratch<uint8_t> scratch(per_item_);
    uint8_t* const valid = scratch.data();
    for (int64_t o = 0; o < call_.O;) {
      std::fill_n(valid, per_item_, 0);
      const int64_t end = std::min<int64_t>(o + 255, call_.O);
      for (; o < end; ++o, mask += per_item_) {
        for (int64_t j = 0; j < per_item_; ++j) valid[j] += mask[j] != 0;
      }
      for (int64_t g = 0, j = 0; g < call_.G; ++g) {
        for (int64_t i = 0; i < call_.I; ++i) n[g] += valid[j++];
      }
    }
  }

  void write(int64_t item, int64_t block, int64_t tile, const Maps& maps) const {
    const int64_t low = tile * kTile;
    Elements<T> e = e_;
    e.streams = can_stream(e_.y, item);
    e.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      each_group(item, block, tile, writes_some(e), [&](int64_t at, auto together,
                                                        int64_t n) NK_BODY {
        constexpr bool in_twos = Elements<T>::template in_twos<K>;
        each_vector<W, in_twos>(n, [&](int64_t j, auto lanes) NK_BODY {
          const auto hi = maps.get(kHi, low + j, lanes), a = maps.get(kA, low + j, lanes),
                     shift = maps.get(kShift, low + j, lanes);
          for (int r = 0; r < decltype(together)::value; ++r) {
            const int64_t here = at + r * width_ + j;
            const auto z = fused(e.template centered<K>(here, lanes, hi), a, shift);
            e.put(e.y + here, e.template finish<K>(z, here, lanes), lanes);
          }
        });
      });
    });
  }

  // Σg and Σg·(x − center) of each entry, g before the weight.
  void reduce(int64_t item, int64_t threads, const Maps& maps, double* g,
              double* gx) const {
    const Partials all(blocks_, width_);
    each_task<Order::kForwards>(threads, [&](int64_t block, int64_t tile) {
      e_.with_backward_kind([&](auto tag) {
        constexpr int K = decltype(tag)::kind;
        sum_block(item, block, tile, all,
                  [&](int64_t at, int64_t j, auto lanes, V& u, V& d) NK_BODY {
                    d = e_.template centered<K>(at, lanes, maps.get(kHi, j, lanes));
                    u = e_.template gradient<K>(at, lanes, [&]() NK_BODY {
                      return fused(d, maps.get(kA, j, lanes),
                                   maps.get(kShift, j, lanes));
                    });
                    if (NK_RARE(e_.dresidual)) e_.keep(e_.dresidual + at, u, lanes);
                  });
      });
    });
    const Scratch<double> u(per_item_), v(per_item_);
    gather(all, u.data(), v.data());
    std::fill(g, g + entries_, 0);
    std::fill(gx, gx + entries_, 0);
    each_run([&](int64_t n, int64_t column, int64_t stat, int64_t, auto S, auto E) {
      const int64_t to = is_own_ ? column : stat;
      for (int64_t i = 0; i < n; ++i) {
        const double lo = Split<C>(this->center_of(item * call_.G + stat + i * S)).lo;
        g[to + i * (S | E)] += u[column + i];
        gx[to + i * (S | E)] += v[column + i] - lo * u[column + i];
      }
    });
  }
  void find_slopes(int64_t item, const double* g, const double* gx,
                   Slope* slopes) const {
    const bool is_weighted = this->is_weighted();
    each_run([&](int64_t n, int64_t column, int64_t stat, int64_t entry, auto S, auto E) {
      const int64_t from = is_own_ ? column : stat;
      for (int64_t i = 0; i < (S | E ? n : 1); ++i) {
        const double w = is_weighted ? (double)this->weight_[entry + i * E] : 1;
        slopes[stat + i * S].b += w * gx[from + i * (S | E)];
        slopes[stat + i * S].c += w * g[from + i * (S | E)];
      }
    });
    for (int64_t k = 0, stat = item * call_.G; k < call_.G; ++k, ++stat) {
      const double sum_g = slopes[k].c, sum_gx = slopes[k].b;
      if (call_.sum_dy) {
        call_.sum_dy[stat] = sum_g;
        call_.sum_dyx[stat] = sum_gx;
      }
      slopes[k] = slope_of(sum_g, sum_gx, call_.scale[stat], this->count_of(stat), call_);
    }
  }

  void write_gradient(int64_t item, int64_t block, int64_t tile, const Maps& maps,
                      const SlopeMaps& slopes, bool is_gated) const {
    Elements<T> e = this->gated_elements(is_gated);
    e.streams = can_stream(e_.dx, item);
    const int64_t low = tile * kTile;
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      each_group(item, block, tile, writes_some(e), [&](int64_t at, auto together,
                                                        int64_t n) NK_BODY {
        constexpr bool in_twos = Elements<T>::template in_twos<K>;
        each_vector<W, in_twos>(n, [&](int64_t j, auto lanes) NK_BODY {
          const auto hi = maps.get(kHi, low + j, lanes), a = maps.get(kA, low + j, lanes),
                     b = slopes.get(kB, low + j, lanes), c = slopes.get(kC, low + j, lanes);
          auto shift = hi;  // not used by kPlain
          if constexpr (K != kPlain) shift = maps.get(kShift, low + j, lanes);
          for (int r = 0; r < decltype(together)::value; ++r) {
            const int64_t here = at + r * width_ + j;
            const auto d = e.template centered<K>(here, lanes, hi);
            auto g = e.template gradient<K>(here, lanes,
                                            [&]() NK_BODY { return fused(d, a, shift); });
            if (NK_RARE(e.dresidual)) e.keep(e.dresidual + here, g, lanes);
            g = fused(g, a, fused(d, b, c));
            if constexpr (K == kAny) {
              if (e.mask) g = select(e.valid(here, lanes), g, V{});
            }
            e.put(e.dx + here, g, lanes);
          }
        });
      });
    });
  }

  void reduce_learned(const double* sums) const {
    const int64_t entries = call_.affine_size();
    const Scratch<double> dweight(entries, 0), dbias(entries, 0);
    double *to_weight = dweight.data(), *to_bias = dbias.data();
    for (int64_t item = 0; item < call_.B; ++item) {
      const double *g = sums + 2 * entries_ * item, *gx = g + entries_;
      const double* scale = call_.scale + item * call_.G;
      each_run([&](int64_t n, int64_t column, int64_t stat, int64_t entry, auto S, auto E) {
        const int64_t from = is_own_ ? column : stat;
        for (int64_t i = 0; i < (S | E ? n : 1); ++i) {
          to_bias[entry + i * E] += g[from + i * (S | E)];
          to_weight[entry + i * E] += scale[stat + i * S] * gx[from + i * (S | E)];
        }
      });
    }
    store_learned(call_.dweight, call_.weight_dtype, entries, to_weight);
    store_learned(call_.dbias, call_.bias_dtype, entries, to_bias);
  }

  const int64_t per_item_, width_, rows_, rest_, block_, blocks_, tiles_;
  const bool is_own_;
  const int64_t entries_;
  const bool takes_some_;
};

}  // namespace NK_ISA
}  // namespace normkit
