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
        write(item, block, tile, at);
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
        write_gradient(item, block, tile, at, wants_sums);
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
        write_gradient(item, block, tile, at, false);
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
      const int64_t first = item * owner.call_.G;
      owner.each_column([&](int64_t e, int64_t g, int64_t k) {
        const Map<C> map(owner.center_of(first + g), owner.call_.scale[first + g],
                         owner.weight_[k], owner.bias_[k]);
        hi[e] = map.hi;
        a[e] = map.a;
        shift[e] = map.shift;
      });
      repeat(owner, hi);
      repeat(owner, a);
      repeat(owner, shift);
    }
    void set_slopes(const Columns& owner, int64_t item,
                    const std::vector<Slope>& slopes) {
      b.resize(owner.width_);
      c.resize(owner.width_);
      owner.each_column([&](int64_t e, int64_t g, int64_t) {
        const double lo = Split<C>(owner.center_of(item * owner.call_.G + g)).lo;
        b[e] = (C)slopes[g].b;
        c[e] = (C)(slopes[g].c - slopes[g].b * lo);
      });
      repeat(owner, b);
      repeat(owner, c);
    }
    static void repeat(const Columns& owner, std::vector<C>& v) {
      for (int64_t e = owner.per_item_; e < owner.width_; ++e) {
        v[e] = v[e - owner.per_item_];
      }
    }
  };

  // Sums of two quantities for each column, of float in blocks and of double over them.
  struct Partials {
    int64_t width;
    std::vector<double> u, v;
    Partials(int64_t blocks, int64_t columns)
        : width(columns), u(blocks * columns), v(blocks * columns) {}
  };
  // body(column, statistic, learned entry) for the columns of one row, without the
  // divisions that would find the two from the column.
  template <class Body> NK_INLINE void each_column(const Body& body) const {
    if (call_.I == 1 && call_.P == call_.G) {
      for (int64_t g = 0; g < call_.G; ++g) body(g, g, g);
      return;
    }
    const bool is_own = call_.affine == kPerElement;
    int64_t column = 0, in_period = 0;
    for (int64_t g = 0; g < call_.G; ++g, ++in_period) {
      if (in_period == call_.P) in_period = 0;
      for (int64_t i = 0; i < call_.I; ++i, ++column) {
        body(column, g, is_own ? in_period * call_.I + i : in_period);
      }
    }
  }
  // Sums of the k rows that were read as one, and over the blocks.
  void gather(const Partials& all, std::vector<double>& u,
              std::vector<double>& v) const {
    u.assign(per_item_, 0);
    v.assign(per_item_, 0);
    const int lost = blocks_ > 1 && planted("a_block_of_columns_is_lost");
    for (int64_t at = 0; at < (blocks_ - lost) * width_; at += per_item_) {
      for (int64_t j = 0; j < per_item_; ++j) {
        u[j] += all.u[at + j];
        v[j] += all.v[at + j];
      }
    }
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
    const bool has_rest = block == blocks_ - 1 && rest_ > low &&
                          !planted("the_incomplete_row_is_dropped");
    for (; row < end + has_rest; ++row) {
      const int64_t some = row < end || rest_ - low > n ? n : rest_ - low;
      body(base + row * width_, std::integral_constant<int, 1>{}, some);
    }
  }

  template <class Term>
  void sum_block(int64_t item, int64_t block, int64_t tile, Partials& all,
                 const Term& term) const {
    alignas(64) C u[kTile] = {}, v[kTile] = {};
    const int64_t low = tile * kTile;
    const int64_t n = width_ - low < kTile ? width_ - low : kTile;
    each_group(item, block, tile, [&](int64_t at, auto together, int64_t some) NK_BODY {
      each_vector<W>(some, [&](int64_t j, auto lanes) NK_BODY {
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
    std::vector<double> sum(call_.G), n(call_.G);
    for (int64_t k = 0; k < picks; ++k) {
      const int64_t at = item_base(item) + k * call_.O / picks * per_item_;
      for (int64_t g = 0; g < call_.G; ++g) {
        if (e_.mask && !e_.mask[at + g * call_.I]) continue;
        sum[g] += to_double(e_.x[at + g * call_.I]);
        n[g] += 1;
      }
    }
    for (int64_t g = 0; g < call_.G; ++g) {
      const C pilot = n[g] ? (C)(sum[g] / n[g]) : 0;
      pilots[g] = std::isfinite(pilot) ? pilot : 0;
    }
  }

  void measure(int64_t item, int64_t threads) const {
    const int64_t G = call_.G, first = item * G;
    std::vector<C> pilots(G), per_column(width_);
    std::vector<double> u, v, s(G), q(G), n(G, (double)(call_.O * call_.I));
    pilots_of(item, pilots);
    if (e_.mask) count_valid(item, n);
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      each_column([&](int64_t j, int64_t g, int64_t) { per_column[j] = pilots[g]; });
      Coefficients::repeat(*this, per_column);
      Partials all(blocks_, width_);
      each_task(threads, false, [&](int64_t block, int64_t tile) {
        if (e_.mask) sum_centered<kAny>(item, block, tile, per_column, all);
        else sum_centered<kPlain>(item, block, tile, per_column, all);
      });
      gather(all, u, v);
      if (call_.I == 1) {
        s.swap(u);
        q.swap(v);
      } else {
        s.assign(G, 0);
        q.assign(G, 0);
        each_column([&](int64_t j, int64_t g, int64_t) {
          s[g] += u[j];
          q[g] += v[j];
        });
      }
      int64_t far = 0;
      for (int64_t g = 0; g < G; ++g) far += is_far(s[g], q[g], n[g], pilots[g]);
      if (!far || attempt + 1 == kAttempts) break;
      for (int64_t g = 0; g < G; ++g) {
        if (is_far(s[g], q[g], n[g], pilots[g])) {
          pilots[g] = (C)((double)pilots[g] + s[g] / n[g]);
        }
      }
    }
    std::vector<Stat> found(G);
    for (int64_t g = 0; g < G; ++g) {
      found[g] = finish(s[g], q[g], n[g], (double)pilots[g], call_.eps,
                        call_.has(kCentered));
    }
    for (int64_t g = 0; g < G; ++g) {
      call_.center[first + g] = found[g].center;
      if (call_.m2) call_.m2[first + g] = found[g].m2;
      if (call_.scale) call_.scale[first + g] = found[g].scale;
      if (call_.count) call_.count[first + g] = (int64_t)n[g];
    }
  }
  template <int K>
  void sum_centered(int64_t item, int64_t block, int64_t tile,
                    const std::vector<C>& pilots, Partials& all) const {
    sum_block(item, block, tile, all,
              [&](int64_t at, int64_t j, auto lanes, V& u, V& v) NK_BODY {
                e_.template fetch<K>(at);
                u = e_.template centered<K>(at, lanes, e_.get(&pilots[j], lanes));
                v = u * u;
              });
  }
  void count_valid(int64_t item, std::vector<double>& n) const {
    std::vector<int32_t> valid(per_item_);
    const uint8_t* mask = e_.mask + item_base(item);
    for (int64_t o = 0; o < call_.O; ++o) {
      for (int64_t j = 0; j < per_item_; ++j) valid[j] += mask[o * per_item_ + j] != 0;
    }
    n.assign(call_.G, 0);
    each_column([&](int64_t j, int64_t g, int64_t) { n[g] += valid[j]; });
  }

  void write(int64_t item, int64_t block, int64_t tile, const Coefficients& co) const {
    const int64_t low = tile * kTile;
    Elements<T> e = e_;
    e.streams = can_stream(e_.y, item);
    e.with_forward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      each_group(item, block, tile, [&](int64_t at, auto together, int64_t n) NK_BODY {
        each_vector<W>(n, [&](int64_t j, auto lanes) NK_BODY {
          const V hi = e.get(&co.hi[low + j], lanes), a = e.get(&co.a[low + j], lanes),
                  shift = e.get(&co.shift[low + j], lanes);
          for (int r = 0; r < decltype(together)::value; ++r) {
            const int64_t here = at + r * width_ + j;
            e.template fetch<K>(here);
            V z = e.template centered<K>(here, lanes, hi) * a + shift;
            z = e.template finish<K>(z, here, lanes);
            e.put(e.y + here, z, lanes);
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
                  [&](int64_t at, int64_t j, auto lanes, V& u, V& v) NK_BODY {
                    e_.template fetch_gradient<K>(at);
                    const V hi = e_.get(&co.hi[j], lanes);
                    const V d = e_.template centered<K>(at, lanes, hi);
                    u = e_.template gradient<K>(at, lanes, [&]() NK_BODY {
                      return d * e_.get(&co.a[j], lanes) + e_.get(&co.shift[j], lanes);
                    });
                    if (e_.dresidual) {
                      e_.keep(e_.dresidual + at, u, lanes);
                    }
                    v = u * d;
                  });
      });
    });
    std::vector<double> u, v;
    gather(all, u, v);
    const bool is_own = entries_ == per_item_;
    each_column([&](int64_t j, int64_t g, int64_t) {
      double* of_entry = sums + 2 * (is_own ? j : g);
      of_entry[0] += u[j];
      of_entry[1] += v[j] - Split<C>(center_of(item * call_.G + g)).lo * u[j];
    });
  }

  std::vector<Slope> slopes_of(int64_t item, const double* sums) const {
    const bool is_weighted = !call_.sum_dy || call_.has(kWeighted);
    std::vector<Slope> slopes(call_.G);
    std::vector<double> sum_gs(call_.G), sum_gxs(call_.G);
    const int64_t step = entries_ == per_item_ ? 1 : call_.I;
    each_column([&](int64_t j, int64_t g, int64_t k) {
      if (step > 1 && j != g * step) return;
      const double w = is_weighted ? weight_[k] : 1;
      const double* of_entry = sums + 2 * (step > 1 ? g : j);
      sum_gs[g] += w * of_entry[0];
      sum_gxs[g] += w * of_entry[1];
    });
    for (int64_t g = 0; g < call_.G; ++g) {
      const int64_t stat = item * call_.G + g;
      const double sum_g = sum_gs[g], sum_gx = sum_gxs[g];
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

  void write_gradient(int64_t item, int64_t block, int64_t tile, const Coefficients& co,
                      bool is_gated) const {
    Elements<T> e = e_;
    e.streams = can_stream(e_.dx, item);
    if (is_gated && e.dresidual) {
      e.dy = e.dresidual;
      e.dresidual = nullptr;
      e.activation = kNone;
    }
    const int64_t low = tile * kTile;
    e.with_backward_kind([&](auto tag) {
      constexpr int K = decltype(tag)::kind;
      each_group(item, block, tile, [&](int64_t at, auto together, int64_t n) NK_BODY {
        each_vector<W>(n, [&](int64_t j, auto lanes) NK_BODY {
          const V hi = e.get(&co.hi[low + j], lanes), a = e.get(&co.a[low + j], lanes),
                  b = e.get(&co.b[low + j], lanes), c = e.get(&co.c[low + j], lanes);
          V shift{};
          if constexpr (K != kPlain) shift = e.get(&co.shift[low + j], lanes);
          for (int r = 0; r < decltype(together)::value; ++r) {
            const int64_t here = at + r * width_ + j;
            e.template fetch_gradient<K>(here);
            const V d = e.template centered<K>(here, lanes, hi);
            V g = e.template gradient<K>(here, lanes, [&]() NK_BODY { return d * a + shift; });
            if (e.dresidual) e.keep(e.dresidual + here, g, lanes);
            g = g * a + (d * b + c);
            if (K == kAny && e.mask) g = select(e.valid(here, lanes), g, V{});
            e.put(e.dx + here, g, lanes);
          }
        });
      });
    });
  }

  void reduce_learned(const std::vector<double>& sums) const {
    const int64_t entries = call_.affine_size();
    const bool is_own = entries_ == per_item_;
    std::vector<double> dweight(entries), dbias(entries);
    for (int64_t item = 0; item < call_.B; ++item) {
      const double* of_item = &sums[2 * entries_ * item];
      each_column([&](int64_t j, int64_t g, int64_t k) {
        if (!is_own && j != g * call_.I) return;
        const double* of_entry = of_item + 2 * (is_own ? j : g);
        dbias[k] += of_entry[0];
        dweight[k] += call_.scale[item * call_.G + g] * of_entry[1];
      });
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
