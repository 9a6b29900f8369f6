// Causal attention within the documents of packed rows, in memory linear in their length (flash attention).
//
// q and out are [B, T, N, H], k and v [B, T, K, H]; query head n reads key/value head n / (N / K). Token t sees the tokens
// from start[b, t], the first of its document, to itself. lse [B, N, T] is the log of the sum of exponentials.

#include <cmath>
#include <vector>

#include "ffi.h"
#include "matmul.h"
#include "work.h"

namespace dreamer {
namespace {

constexpr int64_t kQueries = 60;  // whole tiles: 60 is divisible by 6 and 12
constexpr int64_t kKeys = 64;
constexpr int64_t kRows = 64;     // queries, filled up to whole vectors
constexpr float kHidden = -1e30f;

struct Shape {
  int64_t B, T, N, K, H, q_row, kv_row;
  float scale;

  Shape(const Floats& q, const Floats& k)
      : B(q.dimensions()[0]), T(q.dimensions()[1]), N(q.dimensions()[2]), K(k.dimensions()[2]), H(q.dimensions()[3]),
        q_row(N * H), kv_row(K * H), scale(1 / std::sqrt(float(H))) {}

  int64_t query(int64_t b, int64_t t, int64_t n) const { return ((b * T + t) * N + n) * H; }
  int64_t key(int64_t b, int64_t t, int64_t n) const { return ((b * T + t) * K + n / (N / K)) * H; }
};

// A block of queries and a block of keys. Where they meet the diagonal, strips of queries see fewer and fewer of the keys.
struct Block {
  int64_t t, queries, key, keys;

  // visit(first, count, seen) for strips of queries: none of them sees more than the first `seen` keys.
  template <class Visit>
  void strips(const Visit& visit) const {
    const int64_t strip = key + keys <= t + 1 ? queries : 2 * kTile;
    for (int64_t r = 0; r < queries; r += strip) {
      const int64_t count = std::min(strip, queries - r), whole = (t + r + count - key + kPanel - 1) / kPanel * kPanel;
      visit(r, count, std::clamp<int64_t>(whole, 0, keys));
    }
  }
};

// Products of queries with keys, `hidden` where a query does not see the key: [queries, kKeys].
void scores(const Shape& s, const Block& block, const float* q, Packed keys, const int32_t* start, float* out) {
  block.strips([&](int64_t r, int64_t count, int64_t seen) {
    matmul(count, rows(q + r * s.q_row, s.q_row), keys.columns(seen), out + r * kKeys, kKeys);
  });
  for (int64_t r = 0; r < block.queries; ++r) {
    const int64_t low = std::clamp<int64_t>(start[block.t + r] - block.key, 0, kKeys);
    const int64_t high = std::clamp<int64_t>(block.t + r + 1 - block.key, low, kKeys);
    std::fill(out + r * kKeys, out + r * kKeys + low, kHidden);
    std::fill(out + r * kKeys + high, out + (r + 1) * kKeys, kHidden);
  }
}

int64_t first_block(const int32_t* start, int64_t t, int64_t queries) {
  return *std::min_element(start + t, start + t + queries) / kKeys * kKeys;
}

// The running softmax of a block of queries of one head.
struct Softmax {
  float high[kRows], total[kRows];
};

// One key block's step: scores become weights, and what was summed up shrinks. Row by row, but in phases, so that a
// processor works at many rows at a time.
void soften(const Shape& s, Softmax& state, int64_t queries, float* p, float* out) {
  float high[kRows], shrink[kRows];
  for (int64_t r = 0; r < queries; ++r) {
    const float* row = p + r * kKeys;
    Vec most = load(row);
    for (int64_t j = kLanes; j < kKeys; j += kLanes) most = load(row + j) > most ? load(row + j) : most;
    high[r] = std::max(state.high[r], s.scale * largest(most));
  }
  std::fill(high + queries, high + kRows, 0.0f);
  for (int64_t r = 0; r < kRows; r += kLanes) store(shrink + r, exp(load(state.high + r) - load(high + r)));
  for (int64_t r = 0; r < queries; ++r) {
    float* row = p + r * kKeys;
    if (high[r] <= s.scale * kHidden && std::none_of(row, row + kKeys, [](float x) { return std::isnan(x); })) {
      std::fill(row, row + kKeys, 0.0f);  // it saw nothing so far
      continue;
    }
    Vec added{};
    for (int64_t j = 0; j < kKeys; j += kLanes) {
      const Vec weight = exp(s.scale * load(row + j) - high[r]);
      store(row + j, weight);
      added += weight;
    }
    state.total[r] = state.total[r] * shrink[r] + sum(added);
    for (int64_t h = 0; h < s.H; ++h) out[r * s.q_row + h] *= shrink[r];
  }
  std::copy(high, high + kRows, state.high);
}

// A block of queries of all heads that share a key/value head.
void queries_forward(const Shape& s, int64_t b, int64_t head, int64_t t, const float* q, const float* k, const float* v,
                     const int32_t* start, float* out, float* lse) {
  const int64_t queries = std::min(kQueries, s.T - t), group = s.N / s.K;
  float *p = scratch<0>(kQueries * kKeys), *k_panels = scratch<1>(packed_size(s.H, kKeys)),
        *v_panels = scratch<2>(packed_size(kKeys, s.H));
  std::vector<Softmax> states(group);
  for (int64_t g = 0; g < group; ++g) {
    std::fill_n(states[g].high, kRows, s.scale * kHidden);
    std::fill_n(states[g].total, kRows, 0.0f);
    float* rows_out = out + s.query(b, t, head * group + g);
    for (int64_t r = 0; r < queries; ++r) std::fill_n(rows_out + r * s.q_row, s.H, 0.0f);
  }
  for (int64_t key = first_block(start, t, queries); key < t + queries; key += kKeys) {
    const Block block{t, queries, key, std::min(kKeys, s.T - key)};
    const int64_t from = s.key(b, key, head * group);
    const Packed k_block = packed(transposed(k + from, s.kv_row), s.H, block.keys, k_panels);
    const Packed v_block = packed(rows(v + from, s.kv_row), block.keys, s.H, v_panels);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t at = s.query(b, t, head * group + g);
      scores(s, block, q + at, k_block, start, p);
      soften(s, states[g], queries, p, out + at);
      block.strips([&](int64_t r, int64_t count, int64_t seen) {
        matmul(count, rows(p + r * kKeys, kKeys), v_block.rows(0, seen), out + at + r * s.q_row, s.q_row, true);
      });
    }
  }
  for (int64_t g = 0; g < group; ++g)
    for (int64_t r = 0; r < queries; ++r) {
      const int64_t n = head * group + g, at = s.query(b, t + r, n);
      for (int64_t h = 0; h < s.H; ++h) out[at + h] /= states[g].total[r];
      lse[(b * s.N + n) * s.T + t + r] = states[g].high[r] + std::log(states[g].total[r]);
    }
}

ffi::Error forward(Threads pool, Floats q, Floats k, Floats v, Ints start, FloatResult out, FloatResult lse) {
  const Shape s(q, k);
  const int64_t blocks = (s.T + kQueries - 1) / kQueries;
  share_out(pool, s.B * s.K * blocks, [&](int64_t i) {
    const int64_t b = i / (s.K * blocks), head = i / blocks % s.K;
    const int64_t t = (blocks - 1 - i % blocks) * kQueries;  // the longest come first
    queries_forward(s, b, head, t, q.typed_data(), k.typed_data(), v.typed_data(), start.typed_data() + b * s.T,
                    out->typed_data(), lse->typed_data());
  });
  return ffi::Error::Success();
}

// Probabilities from scores, and the scores' gradients from those of the probabilities, in place; zeros after `seen`.
void score_gradients(const Shape& s, float* p, float* d_p, int64_t seen, float lse, float delta) {
  int64_t j = 0;
  for (; j < seen; j += kLanes) {
    const Vec probability = exp(s.scale * load(p + j) - lse);
    store(p + j, probability);
    store(d_p + j, probability * (load(d_p + j) - delta) * s.scale);
  }
  for (float* row : {p, d_p}) std::fill(row + std::min(j, kKeys), row + kKeys, 0.0f);
}

// The gradients for one key/value head: those of its query heads add up, so that one thread has them all.
void head_backward(const Shape& s, int64_t b, int64_t head, const float* q, const float* k, const float* v,
                   const int32_t* start, const float* out, const float* lse, const float* d_out, float* d_q, float* d_k,
                   float* d_v) {
  const int64_t group = s.N / s.K, first_head = head * group, panel = packed_size(s.H, kKeys);
  float *p = scratch<0>(2 * kQueries * kKeys), *d_p = p + kQueries * kKeys;
  float *k_panels = scratch<1>(2 * panel + packed_size(kKeys, s.H)), *v_panels = k_panels + panel;
  float *q_panels = scratch<2>(2 * packed_size(kQueries, s.H)), *d_panels = q_panels + packed_size(kQueries, s.H);
  float* delta = scratch<3>(group * s.T);
  for (int64_t g = 0; g < group; ++g)
    for (int64_t t = 0; t < s.T; ++t)
      delta[g * s.T + t] = dot(out + s.query(b, t, first_head + g), d_out + s.query(b, t, first_head + g), s.H);
  for (int64_t key = 0; key < s.T; key += kKeys) {
    const int64_t keys = std::min(kKeys, s.T - key), from = s.key(b, key, first_head);
    const Packed k_across = packed(transposed(k + from, s.kv_row), s.H, keys, k_panels);
    const Packed v_across = packed(transposed(v + from, s.kv_row), s.H, keys, v_panels);
    const Packed k_rows = packed(rows(k + from, s.kv_row), keys, s.H, v_panels + panel);
    for (float* d : {d_k, d_v})
      for (int64_t r = 0; r < keys; ++r) std::fill_n(d + from + r * s.kv_row, s.H, 0.0f);
    for (int64_t t = key / kQueries * kQueries; t < s.T; t += kQueries) {
      const Block block{t, std::min(kQueries, s.T - t), key, keys};
      const int64_t first = first_block(start, t, block.queries);
      if (key < first) continue;
      for (int64_t g = 0; g < group; ++g) {
        const int64_t at = s.query(b, t, first_head + g);
        const float* lses = lse + (b * s.N + first_head + g) * s.T + t;
        scores(s, block, q + at, k_across, start, p);
        block.strips([&](int64_t r, int64_t count, int64_t seen) {
          matmul(count, rows(d_out + at + r * s.q_row, s.q_row), v_across.columns(seen), d_p + r * kKeys, kKeys);
          for (int64_t i = r; i < r + count; ++i)
            score_gradients(s, p + i * kKeys, d_p + i * kKeys, seen, lses[i], delta[g * s.T + t + i]);
          matmul(count, rows(d_p + r * kKeys, kKeys), k_rows.rows(0, seen), d_q + at + r * s.q_row, s.q_row, key > first);
        });
        const Packed q_rows = packed(rows(q + at, s.q_row), block.queries, s.H, q_panels);
        const Packed d_rows = packed(rows(d_out + at, s.q_row), block.queries, s.H, d_panels);
        // Queries before a key do not see it: strips of keys, from the first query that sees one of them.
        const int64_t strip = key + keys <= t + 1 ? keys : 2 * kTile;
        for (int64_t m = 0; m < keys; m += strip) {
          const int64_t r = std::max<int64_t>(0, key + m - t), seeing = block.queries - r, count = std::min(strip, keys - m);
          if (seeing <= 0) break;
          const int64_t into = from + m * s.kv_row, in = r * kKeys + m;
          matmul(count, transposed(p + in, kKeys), d_rows.rows(r, seeing), d_v + into, s.kv_row, true);
          matmul(count, transposed(d_p + in, kKeys), q_rows.rows(r, seeing), d_k + into, s.kv_row, true);
        }
      }
    }
  }
}

ffi::Error backward(Threads pool, Floats q, Floats k, Floats v, Ints start, Floats out, Floats lse,
                    Floats d_out, FloatResult d_q, FloatResult d_k, FloatResult d_v) {
  const Shape s(q, k);
  share_out(pool, s.B * s.K, [&](int64_t i) {
    head_backward(s, i / s.K, i % s.K, q.typed_data(), k.typed_data(), v.typed_data(),
                  start.typed_data() + i / s.K * s.T, out.typed_data(), lse.typed_data(), d_out.typed_data(),
                  d_q->typed_data(), d_k->typed_data(), d_v->typed_data());
  });
  return ffi::Error::Success();
}

// The exponentials of scale * (x - its largest), in place; `count` is whole vectors. Returns their sum.
float soften_all(float* x, int64_t count, float scale) {
  float most = kHidden;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, x[i]);
  Vec total{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec p = exp(scale * (load(x + i) - most));
    store(x + i, p);
    total += p;
  }
  return sum(total);
}

// The newest token of each sequence over the first `lengths` rows of its cache at one depth:
// q, out [B, 1, N, H], k, v [L, B, K, S, H], depth [], lengths [B]
ffi::Error over_cache(Threads pool, Floats q, Floats k, Floats v, Ints depth, Ints lengths,
                      FloatResult out) {
  const auto size = k.dimensions();
  const int64_t B = size[1], K = size[2], S = size[3], H = size[4], G = q.dimensions()[2] / K;
  const float scale = 1 / std::sqrt(float(H));
  share_out(pool, B * K, [&](int64_t i) {
    const int64_t at = (depth.typed_data()[0] * B * K + i) * S * H, seen = std::clamp<int64_t>(lengths.typed_data()[i / K], 0, S);
    const float *keys = k.typed_data() + at, *values = v.typed_data() + at;
    const int64_t width = (seen + kLanes - 1) / kLanes * kLanes;
    float* p = scratch<0>(width);
    for (int64_t head = i * G; head < (i + 1) * G; ++head) {
      const float* query = q.typed_data() + head * H;
      for (int64_t s = 0; s < seen; ++s) p[s] = dot(query, keys + s * H, H);
      std::fill(p + seen, p + width, kHidden);
      const float total = soften_all(p, width, scale);
      float* o = out->typed_data() + head * H;
      matmul_thin(1, H, seen, rows(p, width), values, H, o, H, false);
      for (int64_t h = 0; h < H; ++h) o[h] /= seen ? total : 1;  // nothing seen gives zeros
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dreamer

DREAMER_KERNEL(attend_forward, forward);
DREAMER_KERNEL(attend_backward, backward);
DREAMER_KERNEL(attend_cache, over_cache);
