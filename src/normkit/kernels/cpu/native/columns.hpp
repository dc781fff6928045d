// Statistics over columns: channels_last and 2-D batch norm, per batch item instance and
// group norm in channels_last, and NCHW with few positions.
//
// x of one batch item is a matrix of O rows and D = G·I columns; the columns of one
// statistic are I neighbours. Narrow matrices are read k rows at a time, as E = k·D
// columns, so that vectors are whole and aligned. Tasks are blocks of rows by tiles of
// columns; several rows are read together to load each column's coefficients once.
#pragma once
#include <numeric>
#include <vector>

#include "elements.hpp"
#include "pool.hpp"
#include "statistics.hpp"

namespace normkit {
namespace NK_ISA {

template <class T> class Columns {
 public:
  explicit Columns(const Call& call)
      : call_(call),
        e_(call),
        per_item_(call.G * call.I),
        width_(per_item_ * rows_at_once(per_item_, call.O)),
        rows_(width_ ? call.O * per_item_ / width_ : 0),
        rest_(width_ ? call.O * per_item_ % width_ : 0),
        blocks_(rows_ > kRows ? (rows_ + kRows - 1) / kRows : 1),
        tiles_((width_ + kTile - 1) / kTile),
        entries_(call.affine == kPerElement ? per_item_ : call.G),
        weight_(call.weight, call.weight_dtype, call.affine_size(), 1),
        bias_(call.bias, call.bias_dtype, call.affine_size(), 0) {}

  void forward() const {
    each_item([&](int64_t item, int64_t threads) {
      if (!call_.has(kGiven)) measure(item, threads);
      if (!e_.y) return;
      const Coefficients at(*this, item);
      each_task(threads, true, [&](int64_t block, int64_t tile) {
        if (can_stream(e_.y, item)) write<true>(item, block, tile, at);
        else write<false>(item, block, tile, at);
      });
    });
  }

  void backward() const {
    const bool wants_sums =
        call_.dweight || call_.dbias || call_.sum_dy || !call_.has(kGiven);
    std::vector<double> sums(wants_sums ? 2 * entries_ * call_.B : 0);
    each_item([&](int64_t item, int64_t threads) {
      Coefficients at(*this, item);
      std::vector<Slope> slopes(call_.G);
      if (wants_sums) {
        double* of_item = &sums[2 * entries_ * item];
        reduce(item, threads, at, of_item);
        slopes = slopes_of(item, of_item);
      }
      if (!e_.dx) return;
      at.set_slopes(*this, item, slopes);
      each_task(threads, true, [&](int64_t block, int64_t tile) {
        if (can_stream(e_.dx, item)) {
          write_gradient<true>(item, block, tile, at, wants_sums);
        } else {
          write_gradient<false>(item, block, tile, at, wants_sums);
        }
      });
    });
    if (call_.dweight || call_.dbias) reduce_learned(sums);
  }

  void apply_grads() const {
    each_item([&](int64_t item, int64_t threads) {
      Coefficients at(*this, item);
      std::vector<Slope> slopes(call_.G);
      for (int64_t g = 0; g < call_.G; ++g) {
        slopes[g] = {call_.b[item * call_.G + g], call_.c[item * call_.G + g]};
      }
      at.set_slopes(*this, item, slopes);
      each_task(threads, true, [&](int64_t block, int64_t tile) {
        if (can_stream(e_.dx, item)) {
          write_gradient<true>(item, block, tile, at, false);
        } else {
          write_gradient<false>(item, block, tile, at, false);
        }
      });
    });
  }

 private:
  using C = compute_t<T>;
  using V = Vec<C>;
  static constexpr int W = Lanes<C>::count;
  static constexpr int64_t kRows = 128, kTile = 1024, kTogether = 4;

  static int64_t rows_at_once(int64_t columns, int64_t rows) {
    if (columns == 0 || rows == 0) return 1;
    const int64_t step = 32 / std::gcd(columns, (int64_t)32);
    if (step * columns > 4096 || step > rows) return 1;
    int64_t k = step;
    while (k * columns < 256 && k + step <= rows) k += step;
    return k;
  }

  struct Coefficients {
    std::vector<C> hi, a, shift, b, c;
    Coefficients(const Columns& owner, int64_t item)
        : hi(owner.width_), a(owner.width_), shift(owner.width_) {
      for (int64_t j = 0; j < owner.per_item_; ++j) {
        const int64_t stat = item * owner.call_.G + j / owner.call_.I;
        const int64_t k = owner.affine_entry(j);
        const Map<C> map(owner.center_of(stat), owner.call_.scale[stat],
                         owner.weight_[k], owner.bias_[k]);
        for (int64_t e = j; e < owner.width_; e += owner.per_item_) {
          hi[e] = map.hi;
          a[e] = map.a;
          shift[e] = map.shift;
        }
      }
    }
    void set_slopes(const Columns& owner, int64_t item,
                    const std::vector<Slope>& slopes) {
      b.resize(owner.width_);
      c.resize(owner.width_);
      for (int64_t j = 0; j < owner.per_item_; ++j) {
        const int64_t g = j / owner.call_.I;
        const double lo = Split<C>(owner.center_of(item * owner.call_.G + g)).lo;
        for (int64_t e = j; e < owner.width_; e += owner.per_item_) {
          b[e] = (C)slopes[g].b;
          c[e] = (C)(slopes[g].c - slopes[g].b * lo);
        }
      }
    }
  };

  NK_INLINE int64_t affine_entry(int64_t column) const {
    const int64_t g = column / call_.I % call_.P;
    return call_.affine == kPerElement ? g * call_.I + column % call_.I : g;
  }
  NK_INLINE double center_of(int64_t stat) const {
    return call_.has(kCentered) ? call_.center[stat] : 0;
  }
  NK_INLINE int64_t item_base(int64_t item) const { return item * call_.O * per_item_; }
  bool can_stream(const T* out, int64_t item) const {
    constexpr int64_t vector = W * sizeof(T);
    return e_.streams && width_ * sizeof(T) % vector == 0 &&
           before_aligned(out + item_base(item)) == 0;
  }

  template <class Task> void each_item(const Task& task) const {
    if (call_.B >= 2 * call_.threads) {
      parallel_for(call_.B, call_.threads, [&](int64_t item) { task(item, 1); });
    } else {
      for (int64_t item = 0; item < call_.B; ++item) task(item, call_.threads);
    }
  }
  template <class Task>
  void each_task(int64_t threads, bool backwards, const Task& task) const {
    const int64_t n = blocks_ * tiles_;
    parallel_for(n, threads, [&](int64_t k) {
      if (backwards) k = n - 1 - k;
      task(k / tiles_, k % tiles_);
      if (e_.streams) finish_streams();
    });
  }

  // body(at, rows): groups of rows of a block, kTogether of them or one; `at` is the
  // offset of the first row's first column. The last block ends with the incomplete row.
  template <class Body>
  NK_INLINE void each_group(int64_t item, int64_t block, int64_t tile,
                            const Body& body) const {
    const int64_t low = tile * kTile;
    const int64_t n = width_ - low < kTile ? width_ - low : kTile;
    const int64_t end = (block + 1) * kRows < rows_ ? (block + 1) * kRows : rows_;
    int64_t row = block * kRows;
    const int64_t base = item_base(item) + low;
    for (; row + kTogether <= end; row += kTogether) {
      body(base + row * width_, std::integral_constant<int, kTogether>{}, n);
    }
    const bool has_rest = block == blocks_ - 1 && rest_ > low;
    for (; row < end + has_rest; ++row) {
      const int64_t some = row < end || rest_ - low > n ? n : rest_ - low;
      body(base + row * width_, std::integral_constant<int, 1>{}, some);
    }
  }

  // Sums of two quantities for each column, of float in blocks and of double over them.
  struct Partials {
    int64_t width;
    std::vector<double> u, v;
    Partials(int64_t blocks, int64_t columns)
        : width(columns), u(blocks * columns), v(blocks * columns) {}
  };
  template <class Term>
  void sum_block(int64_t item, int64_t block, int64_t tile, Partials& all,
                 const Term& term) const {
    alignas(64) C u[kTile] = {}, v[kTile] = {};
    const int64_t low = tile * kTile;
    const int64_t n = width_ - low < kTile ? width_ - low : kTile;
    each_group(item, block, tile, [&](int64_t at, auto together, int64_t some) {
      each_vector<W>(some, [&](int64_t j, auto lanes) {
        V su{}, sv{}, tu, tv;
        for (int r = 0; r < decltype(together)::value; ++r) {
          term(at + r * width_ + j, low + j, lanes, tu, tv);
          su += tu;
          sv += tv;
        }
        store(u + j, load(u + j) + su);  // u and v are padded to whole vectors
        store(v + j, load(v + j) + sv);
      });
    });
    double* du = &all.u[block * all.width + low];
    double* dv = &all.v[block * all.width + low];
    for (int64_t j = 0; j < n; ++j) {
      du[j] = (double)u[j];
      dv[j] = (double)v[j];
    }
  }

  void pilots_of(int64_t item, std::vector<C>& pilots) const {
    const int64_t picks = call_.O < 8 ? call_.O : 8;
    for (int64_t g = 0; g < call_.G; ++g) {
      double sum = 0;
      int64_t n = 0;
      for (int64_t k = 0; k < picks; ++k) {
        const int64_t row = k * call_.O / picks;
        const int64_t at = item_base(item) + row * per_item_ + g * call_.I;
        if (e_.mask && !e_.mask[at]) continue;
        sum += to_double(e_.x[at]);
        ++n;
      }
      const C pilot = n ? (C)(sum / (double)n) : 0;
      pilots[g] = std::isfinite(pilot) ? pilot : 0;
    }
  }

  void measure(int64_t item, int64_t threads) const {
    std::vector<C> pilots(call_.G), per_column(width_);
    std::vector<Sums> sums(call_.G);
    pilots_of(item, pilots);
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      for (int64_t j = 0; j < width_; ++j) {
        per_column[j] = pilots[j % per_item_ / call_.I];
      }
      Partials all(blocks_, width_);
      each_task(threads, false, [&](int64_t block, int64_t tile) {
        auto term = [&](int64_t at, int64_t j, auto lanes, V& u, V& v, auto kind) {
          const V p = e_.get(&per_column[j], lanes);
          u = e_.template centered<decltype(kind)::kind>(at, lanes, p);
          v = u * u;
        };
        if (e_.mask) {
          sum_block(item, block, tile, all,
                    [&](int64_t at, int64_t j, auto lanes, V& u, V& v) {
                      term(at, j, lanes, u, v, KindTag<kAny>{});
                    });
        } else {
          sum_block(item, block, tile, all,
                    [&](int64_t at, int64_t j, auto lanes, V& u, V& v) {
                      term(at, j, lanes, u, v, KindTag<kPlain>{});
                    });
        }
      });
      for (int64_t g = 0; g < call_.G; ++g) sums[g] = Sums{0, 0, call_.O * call_.I};
      for (int64_t block = 0; block < blocks_; ++block) {
        for (int64_t j = 0; j < width_; ++j) {
          Sums& of_stat = sums[j % per_item_ / call_.I];
          of_stat.s += all.u[block * width_ + j];
          of_stat.q += all.v[block * width_ + j];
        }
      }
      if (e_.mask) count_valid(item, sums);
      bool is_done = true;
      for (int64_t g = 0; g < call_.G; ++g) {
        if (sums[g].n == 0 || !is_far(sums[g], pilots[g])) continue;
        if (attempt + 1 == kAttempts) continue;
        pilots[g] = (C)((double)pilots[g] + sums[g].s / (double)sums[g].n);
        is_done = false;
      }
      if (is_done) break;
    }
    for (int64_t g = 0; g < call_.G; ++g) {
      const int64_t stat = item * call_.G + g;
      const Stat found = normkit::NK_ISA::finish(sums[g], (double)pilots[g], call_);
      call_.center[stat] = found.center;
      if (call_.m2) call_.m2[stat] = found.m2;
      if (call_.scale) call_.scale[stat] = found.scale;
      if (call_.count) call_.count[stat] = sums[g].n;
    }
  }
  void count_valid(int64_t item, std::vector<Sums>& sums) const {
    std::vector<int32_t> valid(per_item_);
    const uint8_t* mask = e_.mask + item_base(item);
    for (int64_t o = 0; o < call_.O; ++o) {
      for (int64_t j = 0; j < per_item_; ++j) valid[j] += mask[o * per_item_ + j] != 0;
    }
    for (Sums& of_stat : sums) of_stat.n = 0;
    for (int64_t j = 0; j < per_item_; ++j) sums[j / call_.I].n += valid[j];
  }

  template <bool Streams>
  void write(int64_t item, int64_t block, int64_t tile, const Coefficients& co) const {
    const int64_t low = tile * kTile;
    e_.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      each_group(item, block, tile, [&](int64_t at, auto together, int64_t n) {
        each_vector<W>(n, [&](int64_t j, auto lanes) {
          const V hi = e_.get(&co.hi[low + j], lanes), a = e_.get(&co.a[low + j], lanes),
                  shift = e_.get(&co.shift[low + j], lanes);
          for (int r = 0; r < decltype(together)::value; ++r) {
            const int64_t here = at + r * width_ + j;
            V z = e_.template centered<K>(here, lanes, hi) * a + shift;
            z = e_.template finish<K>(z, here, lanes);
            e_.template put<MayStream<K, Streams>::value>(e_.y + here, z, lanes);
          }
        });
      });
    });
  }

  void reduce(int64_t item, int64_t threads, const Coefficients& co,
              double* sums) const {
    Partials all(blocks_, width_);
    each_task(threads, false, [&](int64_t block, int64_t tile) {
      e_.with_backward_kind([&](auto tag) {
        constexpr int K = decltype(tag)::kind;
        sum_block(item, block, tile, all,
                  [&](int64_t at, int64_t j, auto lanes, V& u, V& v) {
                    const V hi = e_.get(&co.hi[j], lanes);
                    const V d = e_.template centered<K>(at, lanes, hi);
                    u = e_.template gradient<K>(at, lanes, [&] {
                      return d * e_.get(&co.a[j], lanes) + e_.get(&co.shift[j], lanes);
                    });
                    if (e_.dresidual) {
                      e_.template put<false>(e_.dresidual + at, u, lanes);
                    }
                    v = u * d;
                  });
      });
    });
    const int64_t fold = per_item_ / (entries_ ? entries_ : 1);
    for (int64_t block = 0; block < blocks_; ++block) {
      for (int64_t j = 0; j < width_; ++j) {
        double* of_entry = sums + 2 * (j % per_item_ / fold);
        of_entry[0] += all.u[block * width_ + j];
        of_entry[1] += all.v[block * width_ + j];
      }
    }
    for (int64_t k = 0; k < entries_; ++k) {
      const int64_t stat = item * call_.G + k * fold / call_.I;
      sums[2 * k + 1] -= Split<C>(center_of(stat)).lo * sums[2 * k];
    }
  }

  std::vector<Slope> slopes_of(int64_t item, const double* sums) const {
    const int64_t per_stat = entries_ / (call_.G ? call_.G : 1);
    const bool is_weighted = !call_.sum_dy || call_.has(kWeighted);
    std::vector<Slope> slopes(call_.G);
    for (int64_t g = 0; g < call_.G; ++g) {
      const int64_t stat = item * call_.G + g;
      double sum_g = 0, sum_gx = 0;
      for (int64_t k = g * per_stat; k < (g + 1) * per_stat; ++k) {
        const int64_t column = k * (per_item_ / entries_);
        const double w = is_weighted ? weight_[affine_entry(column)] : 1;
        sum_g += w * sums[2 * k];
        sum_gx += w * sums[2 * k + 1];
      }
      if (call_.sum_dy) {
        call_.sum_dy[stat] = sum_g;
        call_.sum_dyx[stat] = sum_gx;
      }
      const int64_t count =
          call_.mask && call_.count ? call_.count[stat] : call_.values();
      slopes[g] = slope_of(sum_g, sum_gx, call_.scale[stat], count, call_);
    }
    return slopes;
  }

  template <bool Streams>
  void write_gradient(int64_t item, int64_t block, int64_t tile, const Coefficients& co,
                      bool is_gated) const {
    Elements<T> e = e_;
    if (is_gated && e.dresidual) {
      e.dy = e.dresidual;
      e.dresidual = nullptr;
      e.activation = kNone;
    }
    const int64_t low = tile * kTile;
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      each_group(item, block, tile, [&](int64_t at, auto together, int64_t n) {
        each_vector<W>(n, [&](int64_t j, auto lanes) {
          const V hi = e.get(&co.hi[low + j], lanes), a = e.get(&co.a[low + j], lanes),
                  b = e.get(&co.b[low + j], lanes), c = e.get(&co.c[low + j], lanes);
          V shift{};
          if constexpr (K != kPlain) shift = e.get(&co.shift[low + j], lanes);
          for (int r = 0; r < decltype(together)::value; ++r) {
            const int64_t here = at + r * width_ + j;
            const V d = e.template centered<K>(here, lanes, hi);
            V g = e.template gradient<K>(here, lanes, [&] { return d * a + shift; });
            if (e.dresidual) e.template put<false>(e.dresidual + here, g, lanes);
            g = g * a + (d * b + c);
            if (K == kAny && e.mask) g = select(e.valid(here, lanes), g, V{});
            e.template put<MayStream<K, Streams>::value>(e.dx + here, g, lanes);
          }
        });
      });
    });
  }

  void reduce_learned(const std::vector<double>& sums) const {
    const int64_t entries = call_.affine_size();
    const int64_t fold = per_item_ / (entries_ ? entries_ : 1);
    std::vector<double> dweight(entries), dbias(entries);
    for (int64_t item = 0; item < call_.B; ++item) {
      for (int64_t k = 0; k < entries_; ++k) {
        const int64_t stat = item * call_.G + k * fold / call_.I;
        const int64_t entry = affine_entry(k * fold);
        dbias[entry] += sums[2 * (item * entries_ + k)];
        dweight[entry] += call_.scale[stat] * sums[2 * (item * entries_ + k) + 1];
      }
    }
    for (int64_t k = 0; k < entries; ++k) {
      if (call_.dweight) store_learned(call_.dweight, call_.weight_dtype, k, dweight[k]);
      if (call_.dbias) store_learned(call_.dbias, call_.bias_dtype, k, dbias[k]);
    }
  }

  const Call& call_;
  const Elements<T> e_;
  const int64_t per_item_, width_, rows_, rest_, blocks_, tiles_, entries_;
  const Learned weight_, bias_;
};

}  // namespace NK_ISA
}  // namespace normkit
