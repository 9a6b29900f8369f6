// Causal attention within the documents of packed rows, in memory linear in their length (flash attention).
//
// q and out are [B, T, N, H], k and v [B, T, K, H]; query head n reads key/value head n / (N / K). Token t sees the tokens
// from start[b, t], the first of its document, to itself. lse [B, N, T] is the log of the sum of exponentials.

#include <cmath>
#include <vector>

#include "matmul.h"
#include "work.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Indices = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<Floats>;

namespace dreamer {
namespace {

constexpr int64_t kQueries = 60;  // whole tiles: 60 is divisible by 6 and 12
constexpr int64_t kKeys = 64;
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

// Products of a block of queries with a block of keys, `hidden` where a query does not see the key: [queries, kKeys].
void scores(const Shape& s, const float* q, const float* k, const int32_t* start, int64_t t, int64_t queries, int64_t key,
            float* out, float* panel) {
  const int64_t keys = std::min(kKeys, s.T - key);
  matmul(queries, keys, s.H, rows(q, s.q_row), transposed(k, s.kv_row), out, kKeys, panel);
  for (int64_t r = 0; r < queries; ++r) {
    const int64_t low = std::clamp<int64_t>(start[t + r] - key, 0, kKeys);
    const int64_t high = std::clamp<int64_t>(t + r + 1 - key, low, kKeys);
    std::fill(out + r * kKeys, out + r * kKeys + low, kHidden);
    std::fill(out + r * kKeys + high, out + (r + 1) * kKeys, kHidden);
  }
}

int64_t first_block(const int32_t* start, int64_t t, int64_t queries) {
  return *std::min_element(start + t, start + t + queries) / kKeys * kKeys;
}

// One key block's step of the running softmax of a row: its scores become weights, and what was summed up shrinks.
void soften(const Shape& s, float* row, float* out, float& high, float& total) {
  Vec most = load(row);
  for (int64_t j = kLanes; j < kKeys; j += kLanes) most = load(row + j) > most ? load(row + j) : most;
  float new_high = high;
  for (int i = 0; i < kLanes; ++i) new_high = std::max(new_high, s.scale * most[i]);
  const bool number = std::none_of(row, row + kKeys, [](float x) { return std::isnan(x); });
  if (number && new_high <= s.scale * kHidden) return std::fill(row, row + kKeys, 0.0f);  // it saw nothing so far
  const float shrink = exp(Vec{} + (high - new_high))[0];
  Vec added{};
  for (int64_t j = 0; j < kKeys; j += kLanes) {
    const Vec p = exp(s.scale * load(row + j) - new_high);
    store(row + j, p);
    added += p;
  }
  for (int64_t h = 0; h < s.H; ++h) out[h] *= shrink;
  total = total * shrink + sum(added);
  high = new_high;
}

ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Indices start, Result out, Result lse) {
  const Shape s(q, k);
  const int64_t blocks = (s.T + kQueries - 1) / kQueries;
  share_out(pool, s.B * s.N * blocks, [&](int64_t i) {
    const int64_t b = i / (s.N * blocks), n = i / blocks % s.N;
    const int64_t t = (blocks - 1 - i % blocks) * kQueries;  // the longest come first
    const int64_t queries = std::min(kQueries, s.T - t);
    const int32_t* starts = start.typed_data() + b * s.T;
    float *p = scratch<0>(kQueries * kKeys), *panel = scratch<1>(std::max(s.H, kKeys) * kPanel);
    float high[kQueries], total[kQueries] = {};
    std::fill(high, high + kQueries, s.scale * kHidden);
    float* rows_out = out->typed_data() + s.query(b, t, n);
    for (int64_t r = 0; r < queries; ++r) std::fill(rows_out + r * s.q_row, rows_out + r * s.q_row + s.H, 0.0f);
    for (int64_t key = first_block(starts, t, queries); key < t + queries; key += kKeys) {
      const int64_t keys = std::min(kKeys, s.T - key);
      scores(s, q.typed_data() + s.query(b, t, n), k.typed_data() + s.key(b, key, n), starts, t, queries, key, p, panel);
      for (int64_t r = 0; r < queries; ++r) soften(s, p + r * kKeys, rows_out + r * s.q_row, high[r], total[r]);
      matmul(queries, s.H, keys, rows(p, kKeys), rows(v.typed_data() + s.key(b, key, n), s.kv_row), rows_out, s.q_row,
             panel, true);
    }
    for (int64_t r = 0; r < queries; ++r) {
      for (int64_t h = 0; h < s.H; ++h) rows_out[r * s.q_row + h] /= total[r];
      lse->typed_data()[(b * s.N + n) * s.T + t + r] = high[r] + std::log(total[r]);
    }
  });
  return ffi::Error::Success();
}

// Probabilities from scores, and the scores' gradients from those of the probabilities, in place.
void score_gradients(const Shape& s, float* p, float* d_p, float lse, float delta) {
  for (int64_t j = 0; j < kKeys; j += kLanes) {
    const Vec probability = exp(s.scale * load(p + j) - lse);
    store(p + j, probability);
    store(d_p + j, probability * (load(d_p + j) - delta) * s.scale);
  }
}

// The gradients for one key/value head: those of its query heads add up, so that one thread has them all.
void head_backward(const Shape& s, int64_t b, int64_t head, const float* q, const float* k, const float* v,
                   const int32_t* start, const float* out, const float* lse, const float* d_out, float* d_q, float* d_k,
                   float* d_v) {
  float *p = scratch<0>(kQueries * kKeys), *d_p = scratch<2>(kQueries * kKeys);
  float* panel = scratch<1>(std::max(s.H, kKeys) * kPanel);
  const int64_t group = s.N / s.K;
  for (float* d : {d_k, d_v})
    for (int64_t t = 0; t < s.T; ++t) std::fill_n(d + s.key(b, t, head * group), s.H, 0.0f);
  for (int64_t n = head * group; n < (head + 1) * group; ++n)
    for (int64_t t = 0; t < s.T; t += kQueries) {
      const int64_t queries = std::min(kQueries, s.T - t), at = s.query(b, t, n);
      float delta[kQueries];
      for (int64_t r = 0; r < queries; ++r) {
        const float *o = out + at + r * s.q_row, *d = d_out + at + r * s.q_row;
        delta[r] = 0;
        for (int64_t h = 0; h < s.H; ++h) delta[r] += o[h] * d[h];
      }
      const int64_t first = first_block(start, t, queries);
      for (int64_t key = first; key < t + queries; key += kKeys) {
        const int64_t keys = std::min(kKeys, s.T - key), from = s.key(b, key, n);
        scores(s, q + at, k + from, start, t, queries, key, p, panel);
        matmul(queries, keys, s.H, rows(d_out + at, s.q_row), transposed(v + from, s.kv_row), d_p, kKeys, panel);
        for (int64_t r = 0; r < queries; ++r)
          score_gradients(s, p + r * kKeys, d_p + r * kKeys, lse[(b * s.N + n) * s.T + t + r], delta[r]);
        matmul(keys, s.H, queries, transposed(p, kKeys), rows(d_out + at, s.q_row), d_v + from, s.kv_row, panel, true);
        matmul(keys, s.H, queries, transposed(d_p, kKeys), rows(q + at, s.q_row), d_k + from, s.kv_row, panel, true);
        matmul(queries, s.H, keys, rows(d_p, kKeys), rows(k + from, s.kv_row), d_q + at, s.q_row, panel, key > first);
      }
    }
}

ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Indices start, Floats out, Floats lse,
                    Floats d_out, Result d_q, Result d_k, Result d_v) {
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
ffi::Error over_cache(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Indices depth, Indices lengths,
                      Result out) {
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(attend_forward, dreamer::forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Indices>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attend_backward, dreamer::backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Indices>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attend_cache, dreamer::over_cache,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Indices>()
                                  .Arg<Indices>()
                                  .Ret<Floats>());
