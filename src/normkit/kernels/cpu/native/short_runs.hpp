// Statistics over short runs: batch norm in NCHW on few positions (14 × 14, 7 × 7).
//
// Run by run, vectors would be cut at every end of a run, and both neighbours of a cut
// would write to the same cache line. So the runs of neighbouring
// statistics are taken together as a tile of columns, their coefficients repeated along
// each run: vectors are whole, and a tile stays in the cache for its second pass while
// the next one is fetched.
#pragma once
#include <numeric>

#include "runs.hpp"

namespace normkit {
namespace NK_ISA {

template <class T> class ShortRuns : private Runs<T> {
 public:
  explicit ShortRuns(const Call& call)
      : Runs<T>(call),
        together_(stats_together(call)),
        tiles_(together_ ? (call.G + together_ - 1) / together_ : 0),
        parts_(call.O > kRows ? (call.O + kRows - 1) / kRows : 1) {}

  void forward() const {
    each_tile([&](const Tile& tile, int64_t threads) {
      if (!call_.has(kGiven)) measure(tile, threads);
      if (!e_.y) return;
      Coefficients at(*this, tile);
      parallel_backwards(parts_, threads, [&](int64_t part) {
        write(tile, part, at);
      });
    });
  }

  void backward() const {
    const bool wants_sums = this->wants_sums();
    const Scratch<double> sums(wants_sums ? 2 * call_.statistics() : 0, 0);
    each_tile([&](const Tile& tile, int64_t threads) {
      Coefficients at(*this, tile);
      Slope slopes[kMost];
      if (wants_sums) {
        double* of_tile = sums.data() + 2 * tile.stat;
        reduce(tile, threads, at, of_tile);
        find_slopes(tile, of_tile, slopes);
      }
      if (!e_.dx) return;
      at.set_slopes(*this, tile, slopes);
      parallel_backwards(parts_, threads, [&](int64_t part) {
        write_gradient(tile, part, at, wants_sums);
      });
    });
    if (this->wants_learned()) this->reduce_learned(sums.data());
  }

  void apply_grads() const {
    each_tile([&](const Tile& tile, int64_t threads) {
      Coefficients at(*this, tile);
      Slope slopes[kMost];
      for (int64_t k = 0; k < tile.stats; ++k) {
        slopes[k] = {call_.b[tile.stat + k], call_.c[tile.stat + k]};
      }
      at.set_slopes(*this, tile, slopes);
      parallel_for(parts_, threads, [&](int64_t part) {
        write_gradient(tile, part, at, false);
      });
    });
  }

 private:
  using typename Runs<T>::C;
  using typename Runs<T>::V;
  using typename Runs<T>::Place;
  using Runs<T>::W, Runs<T>::call_, Runs<T>::e_, Runs<T>::length_;
  // Columns and statistics of a tile, rows that are summed in float.
  static constexpr int64_t kTile = 1024, kMost = 128, kRows = 128, kTogether = 2;
  // Tiles of up to this size are fetched while the one before them is written.
  static constexpr int64_t kAhead = 512 << 10;

  struct Tile {
    int64_t stat, stats;     // the first statistic, and how many
    int64_t base, columns;   // where its first row begins, and how long each is
    int64_t ahead;           // from here to the next tile; 0 where it is not fetched
  };

  // Where tiles begin on whole vectors, their outputs can go past the caches.
  static int64_t stats_together(const Call& call) {
    if (call.I == 0) return 0;
    int64_t n = kTile / call.I;
    const int64_t whole = W / std::gcd(call.I, (int64_t)W);
    if (n > whole) n -= n % whole;
    n = n < kMost ? n : kMost;
    return n < call.G ? n : call.G;
  }

  template <class Task> void each_tile(const Task& task) const {
    const int64_t n = call_.B * tiles_, threads = call_.threads;
    const auto numbered = [&](int64_t k, int64_t of_tile) {
      const int64_t item = k / tiles_, g = (k - item * tiles_) * together_;
      const int64_t stats = call_.G - g < together_ ? call_.G - g : together_;
      const int64_t columns = stats * length_;
      const int64_t bytes = call_.O * columns * (int64_t)sizeof(T);
      const bool fetches = bytes <= kAhead && k + 1 < n;
      task(Tile{item * call_.G + g, stats, (item * call_.O * call_.G + g) * length_,
                columns, fetches ? columns : 0},
           of_tile);
    };
    if (threads > 1 && n < 2 * threads) {
      for (int64_t k = 0; k < n; ++k) numbered(k, threads);
    } else {
      parallel_for(n, threads, [&](int64_t k) { numbered(k, 1); });
    }
  }
  // body(k, statistic, learned entry), with one division for the tile.
  template <class Body> NK_INLINE void each_stat(const Tile& tile, const Body& body) const {
    int64_t entry = planted("every_tile_begins_anew") ? 0 : this->place_of(tile.stat).entry;
    const int64_t step = call_.P == 1 ? 0 : 1;
    for (int64_t k = 0; k < tile.stats; ++k, entry += step) {
      if (entry == call_.P) entry = 0;
      body(k, tile.stat + k, entry);
    }
  }
  // A row of the tile begins here.
  NK_INLINE int64_t row_at(const Tile& tile, int64_t o) const {
    return tile.base + o * call_.G * length_;
  }
  NK_INLINE int64_t end_of(int64_t part) const {
    return (part + 1) * kRows < call_.O ? (part + 1) * kRows : call_.O;
  }
  // The k-th run of a row of columns; a vector may run over into the next one, which is
  // filled after it.
  NK_INLINE void fill(C* columns, int64_t k, C value) const {
    const V v = splat(value);
    for (int64_t j = 0; j < length_; j += W) store(columns + k * length_ + j, v);
  }

  struct Coefficients {
    C hi[kTile + W], a[kTile + W], shift[kTile + W], b[kTile + W], c[kTile + W];
    Coefficients(const ShortRuns& owner, const Tile& tile) {
      owner.each_stat(tile, [&](int64_t k, int64_t stat, int64_t entry) NK_BODY {
        const Map<C> map(owner.center_of(stat), owner.call_.scale[stat],
                         owner.weight_[entry], owner.bias_[entry]);
        owner.fill(hi, k, map.hi);
        owner.fill(a, k, map.a);
        owner.fill(shift, k, map.shift);
      });
    }
    void set_slopes(const ShortRuns& owner, const Tile& tile, const Slope* slopes) {
      for (int64_t k = 0; k < tile.stats; ++k) {
        const SlopeMap<C> map(slopes[k], owner.center_of(tile.stat + k));
        owner.fill(b, k, map.b);
        owner.fill(c, k, map.c);
      }
    }
  };

  // term(at, j, lanes, u, d) gives the factors of one vector; Σu and Σu·d over the rows of
  // a part and the columns of each statistic go to take(k, u, v).
  template <class Term, class Take>
  NK_INLINE void sum_part(const Tile& tile, int64_t part, const Term& term,
                          const Take& take) const {
    alignas(64) C u[kTile + W], v[kTile + W];
    for (int64_t j = 0; j < tile.columns; j += W) {
      store(u + j, V{});
      store(v + j, V{});
    }
    const auto rows = [&](int64_t o, auto together) NK_BODY {
      const int64_t at = row_at(tile, o), stride = call_.G * length_;
      each_vector<W>(tile.columns, [&](int64_t j, auto lanes) NK_BODY {
        V su = load(u + j), sv = load(v + j), tu, td;
        for (int r = 0; r < decltype(together)::value; ++r) {
          term(at + r * stride + j, j, lanes, tu, td);
          su += tu;
          sv = fused(tu, td, sv);
        }
        store(u + j, su);
        store(v + j, sv);
      });
    };
    int64_t o = part * kRows;
    const int64_t end = end_of(part);
    for (; o + kTogether <= end; o += kTogether) {
      rows(o, std::integral_constant<int, kTogether>{});
    }
    for (; o < end; ++o) rows(o, std::integral_constant<int, 1>{});
    for (int64_t k = 0; k < tile.stats; ++k) {
      Wide<C> wide_u, wide_v;
      each_vector<W>(length_, [&](int64_t j, auto lanes) NK_BODY {
        wide_u.add(e_.get(u + k * length_ + j, lanes));
        wide_v.add(e_.get(v + k * length_ + j, lanes));
      });
      take(k, wide_u.total(), wide_v.total());
    }
  }

  // Near enough to each mean: the mean of a vector of values from each of up to four rows.
  void find_pilots(const Tile& tile, C* pilots) const {
    const int64_t picks = call_.O < 4 ? call_.O : 4, some = length_ < W ? length_ : W;
    for (int64_t k = 0; k < tile.stats; ++k) {
      int64_t n = picks * some;
      V vectors{};
      for (int64_t p = 0; p < picks; ++p) {
        const int64_t at = row_at(tile, p * call_.O / picks) + k * length_;
        V v = some == W ? load(e_.x + at) : load_first(e_.x + at, some, V{});
        if (e_.mask) {
          v = select(load_mask<C>(e_.mask + at, some), v, V{});
          n -= some - count_valid(e_.mask + at, some);
        }
        vectors += v;
      }
      Wide<C> wide;
      wide.add(vectors);
      const C pilot = n ? (C)(wide.total() / (double)n) : 0;
      pilots[k] = std::isfinite(pilot) ? pilot : 0;
    }
  }

  using TileSums = StatSums<kMost>;

  void sum_centered(const Tile& tile, int64_t part, const C* pilots,
                    TileSums& sums) const {
    const auto take = [&](int64_t k, double s, double q) NK_BODY {
      sums.s[k] += s;
      sums.q[k] += q;
    };
    if (e_.mask) {
      sum_part(tile, part, [&](int64_t at, int64_t j, auto lanes, V& u, V& d) NK_BODY {
        u = d = e_.template centered<kAny>(at, lanes, e_.get(pilots + j, lanes));
      }, take);
      for (int64_t o = part * kRows; o < end_of(part); ++o) {
        const uint8_t* mask = e_.mask + row_at(tile, o);
        for (int64_t k = 0; k < tile.stats; ++k, mask += length_) {
          sums.n[k] += (double)count_valid(mask, length_);
        }
      }
    } else {
      sum_part(tile, part, [&](int64_t at, int64_t j, auto lanes, V& u, V& d) NK_BODY {
        u = d = e_.template centered<kPlain>(at, lanes, e_.get(pilots + j, lanes));
      }, take);
      const double n = (double)((end_of(part) - part * kRows) * length_);
      for (int64_t k = 0; k < tile.stats; ++k) sums.n[k] += n;
    }
  }

  void measure(const Tile& tile, int64_t threads) const {
    C pilots[kMost], columns[kTile + W];
    TileSums sums;
    find_pilots(tile, pilots);
    const Scratch<TileSums> of_parts(parts_ > 1 ? parts_ : 0);
    for (int attempt = 1;; ++attempt) {
      for (int64_t k = 0; k < tile.stats; ++k) fill(columns, k, pilots[k]);
      sums.clear(tile.stats);
      if (parts_ == 1) {
        sum_centered(tile, 0, columns, sums);
      } else {
        parallel_for(parts_, threads, [&](int64_t part) {
          of_parts[part].clear(tile.stats);
          sum_centered(tile, part, columns, of_parts[part]);
        });
        if (planted("a_part_of_short_runs_is_lost")) of_parts[0].clear(tile.stats);
        for (int64_t part = 0; part < parts_; ++part) sums.add(of_parts[part], tile.stats);
      }
      if (attempt == kAttempts || !move_far(sums.s, sums.q, sums.n, tile.stats, pilots)) break;
    }
    store_statistics(call_, tile.stat, tile.stats, sums.s, sums.q, sums.n, pilots);
  }

  void write(const Tile& tile, int64_t part, const Coefficients& co) const {
    e_.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      for (int64_t o = end_of(part) - 1; o >= part * kRows; --o) {
        const int64_t at = row_at(tile, o);
        constexpr bool in_twos = Elements<T>::template in_twos<K>;
        this->template streamed<in_twos>(
            e_.streams, e_.y + at, tile.columns, [&](int64_t j, auto lanes) NK_BODY {
              __builtin_prefetch(e_.x + at + j + tile.ahead, 0, 2);
              const auto hi = e_.get(co.hi + j, lanes), a = e_.get(co.a + j, lanes);
              const auto d = e_.template centered<K>(at + j, lanes, hi);
              const auto z = fused(d, a, e_.get(co.shift + j, lanes));
              e_.put(e_.y + at + j, e_.template finish<K>(z, at + j, lanes), lanes);
            });
      }
    });
  }

  // Σg and Σg·(x − center) of each statistic, g before the weight.
  void reduce(const Tile& tile, int64_t threads, const Coefficients& co,
              double* sums) const {
    const int64_t n = 2 * tile.stats;
    const Scratch<double> parts(parts_ > 1 ? n * parts_ : 0, 0);
    parallel_for(parts_, threads, [&](int64_t part) {
      double* of_part = parts_ > 1 ? parts.data() + n * part : sums;
      e_.with_backward_kind([&](auto tag) {
        constexpr int K = decltype(tag)::kind;
        sum_part(
            tile, part,
            [&](int64_t at, int64_t j, auto lanes, V& u, V& d) NK_BODY {
              const V hi = e_.get(co.hi + j, lanes);
              d = e_.template centered<K>(at, lanes, hi);
              u = e_.template gradient<K>(at, lanes, [&]() NK_BODY {
                return fused(d, e_.get(co.a + j, lanes), e_.get(co.shift + j, lanes));
              });
              if (NK_RARE(e_.dresidual)) e_.keep(e_.dresidual + at, u, lanes);
            },
            [&](int64_t k, double g, double gd) NK_BODY {
              of_part[2 * k] += g;
              of_part[2 * k + 1] += gd;
            });
      });
    });
    for (int64_t part = 0; parts_ > 1 && part < parts_; ++part) {
      for (int64_t k = 0; k < n; ++k) sums[k] += parts[n * part + k];
    }
    for (int64_t k = 0; k < tile.stats; ++k) {
      if (planted("sums_are_around_the_rounded_centre")) break;
      sums[2 * k + 1] -= Split<C>(this->center_of(tile.stat + k)).lo * sums[2 * k];
    }
  }
  void find_slopes(const Tile& tile, const double* sums, Slope* slopes) const {
    const bool is_weighted = !call_.sum_dy || call_.has(kWeighted);
    each_stat(tile, [&](int64_t k, int64_t stat, int64_t entry) {
      const double w = is_weighted ? this->weight_[entry] : 1;
      const double g = w * sums[2 * k], gx = w * sums[2 * k + 1];
      if (call_.sum_dy) {
        call_.sum_dy[stat] = g;
        call_.sum_dyx[stat] = gx;
      }
      slopes[k] = slope_of(g, gx, call_.scale[stat], this->count_of(stat), call_);
    });
  }

  // `is_gated`: dresidual already holds dy·act′.
  void write_gradient(const Tile& tile, int64_t part, const Coefficients& co,
                      bool is_gated) const {
    const Elements<T> e = this->gated_elements(is_gated);
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      for (int64_t o = end_of(part) - 1; o >= part * kRows; --o) {
        const int64_t at = row_at(tile, o);
        constexpr bool in_twos = Elements<T>::template in_twos<K>;
        this->template streamed<in_twos>(
            e.streams, e.dx + at, tile.columns, [&](int64_t j, auto lanes) NK_BODY {
              __builtin_prefetch(e_.x + at + j + tile.ahead, 0, 2);
              __builtin_prefetch(e_.dy + at + j + tile.ahead, 0, 2);
              const auto hi = e.get(co.hi + j, lanes), a = e.get(co.a + j, lanes);
              const auto d = e.template centered<K>(at + j, lanes, hi);
              auto g = e.template gradient<K>(at + j, lanes, [&]() NK_BODY {
                return fused(d, a, e.get(co.shift + j, lanes));
              });
              if (NK_RARE(e.dresidual)) e.keep(e.dresidual + at + j, g, lanes);
              g = fused(g, a, fused(d, e.get(co.b + j, lanes), e.get(co.c + j, lanes)));
              if constexpr (K == kAny) {
                if (e.mask) g = select(e.valid(at + j, lanes), g, V{});
              }
              e.put(e.dx + at + j, g, lanes);
            });
      }
    });
  }

  const int64_t together_, tiles_, parts_;
};

}  // namespace NK_ISA
}  // namespace normkit
