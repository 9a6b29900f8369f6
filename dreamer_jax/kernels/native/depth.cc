// Attention of each token over its own depths: those before `depth` from a cache, and its own at `depth`.
//
// q and out are [B, T, N, H], k and v [B, T, K, H]; query head n reads key/value head n / (N / K). cached_k and cached_v are
// [L, B, T, K, H]; their rows from `depth` on are not looked at. Probabilities are [B, T, N, L], zero after `depth`.

#include <cmath>

#include "ffi.h"
#include "matmul.h"
#include "work.h"

namespace dreamer {
namespace {

constexpr int64_t kTokens = 32;  // that a thread takes at a time

struct Shape {
  int64_t tokens, N, K, H, L, depth, group;
  float scale;

  Shape(const Floats& q, const Floats& cache, const Ints& depth)
      : tokens(q.dimensions()[0] * q.dimensions()[1]), N(q.dimensions()[2]), K(cache.dimensions()[3]),
        H(q.dimensions()[3]), L(cache.dimensions()[0]), depth(depth.typed_data()[0]), group(N / K), scale(1 / std::sqrt(float(H))) {}

  int64_t query(int64_t t, int64_t n) const { return (t * N + n) * H; }
  int64_t key(int64_t t, int64_t n) const { return (t * K + n / group) * H; }
  int64_t cached(int64_t l, int64_t t, int64_t n) const { return l * tokens * K * H + key(t, n); }
};

// visit(t, n) for every query.
template <class Visit>
void for_queries(Threads& pool, const Shape& s, const Visit& visit) {
  share_out_parts(pool, s.tokens, kTokens, [&](int64_t t, int64_t) {
    for (int64_t n = 0; n < s.N; ++n) visit(t, n);
  });
}

void add(float factor, const float* x, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * x[i];
}

// Products of one vector with the key (or value) of each depth so far; p [L].
void products(const Shape& s, int64_t t, int64_t n, const float* x, const float* own, const float* cache, float* p) {
  for (int64_t l = 0; l < s.depth; ++l) p[l] = dot(x, cache + s.cached(l, t, n), s.H);
  p[s.depth] = dot(x, own + s.key(t, n), s.H);
}

void softmax(const Shape& s, float* p) {
  const float most = *std::max_element(p, p + s.depth + 1);
  float total = 0;
  for (int64_t l = 0; l <= s.depth; ++l) total += p[l] = std::exp(s.scale * (p[l] - most));
  for (int64_t l = 0; l <= s.depth; ++l) p[l] /= total;
}

// Sum over depths of weights times keys (or values).
void mix(const Shape& s, int64_t t, int64_t n, const float* weights, const float* own, const float* cache, float* to) {
  std::fill_n(to, s.H, 0.0f);
  add(weights[s.depth], own + s.key(t, n), s.H, to);
  for (int64_t l = 0; l < s.depth; ++l) add(weights[l], cache + s.cached(l, t, n), s.H, to);
}

// k and v are results, too, in their own memory: so that they reach the cache only after it has been read.
ffi::Error forward(Threads pool, Floats q, Floats k, Floats v, Floats cached_k, Floats cached_v, Ints depth,
                   FloatResult out, FloatResult probabilities, FloatResult, FloatResult) {
  const Shape s(q, cached_k, depth);
  for_queries(pool, s, [&](int64_t t, int64_t n) {
    float* p = probabilities->typed_data() + (t * s.N + n) * s.L;
    products(s, t, n, q.typed_data() + s.query(t, n), k.typed_data(), cached_k.typed_data(), p);
    softmax(s, p);
    std::fill(p + s.depth + 1, p + s.L, 0.0f);
    mix(s, t, n, p, v.typed_data(), cached_v.typed_data(), out->typed_data() + s.query(t, n));
  });
  return ffi::Error::Success();
}

// The gradients, from those of out and of the probabilities; those of k, v and the cache are added to what their results
// hold.
ffi::Error backward(Threads pool, Floats q, Floats k, Floats v, Floats cached_k, Floats cached_v, Ints depth,
                    Floats d_out, Floats d_probabilities, Floats, Floats, Floats, Floats, FloatResult d_q,
                    FloatResult d_k, FloatResult d_v, FloatResult d_cached_k, FloatResult d_cached_v) {
  const Shape s(q, cached_k, depth);
  for_queries(pool, s, [&](int64_t t, int64_t n) {
    float *p = scratch<0>(s.L), *d_p = scratch<1>(s.L);
    const float *query = q.typed_data() + s.query(t, n), *d_row = d_out.typed_data() + s.query(t, n);
    const float* d_given = d_probabilities.typed_data() + (t * s.N + n) * s.L;
    products(s, t, n, query, k.typed_data(), cached_k.typed_data(), p);
    softmax(s, p);
    products(s, t, n, d_row, v.typed_data(), cached_v.typed_data(), d_p);
    add(1, d_given, s.depth + 1, d_p);
    const float along = dot(p, d_p, s.depth + 1);
    for (int64_t l = 0; l <= s.depth; ++l) d_p[l] = s.scale * p[l] * (d_p[l] - along);  // of the scores
    mix(s, t, n, d_p, k.typed_data(), cached_k.typed_data(), d_q->typed_data() + s.query(t, n));
    add(d_p[s.depth], query, s.H, d_k->typed_data() + s.key(t, n));
    add(p[s.depth], d_row, s.H, d_v->typed_data() + s.key(t, n));
    for (int64_t l = 0; l < s.depth; ++l) {
      add(d_p[l], query, s.H, d_cached_k->typed_data() + s.cached(l, t, n));
      add(p[l], d_row, s.H, d_cached_v->typed_data() + s.cached(l, t, n));
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dreamer

DREAMER_KERNEL(depth_forward, forward);
DREAMER_KERNEL(depth_backward, backward);
