// Per-head RMSNorm and RoPE of queries and keys in one pass: y = rotate(x / rms(x) * weight).
//
// x and y are [tokens, heads, H], weight [H], epsilon []. Pairs (j, j + H/2) of a head turn by the angle whose cosine and
// sine are row `token` of cos and sin, [tokens, H/2], or their only row, [1, H/2]. Fused heads are N of queries, K of keys
// and K of values, one after the other.

#include <cmath>
#include <vector>

#include "ffi.h"
#include "matmul.h"
#include "work.h"

namespace dreamer {
namespace {

constexpr int64_t kTokens = 64;  // that a thread takes at a time

// What is needed of one token's rotation.
struct Angles {
  const float *cos, *sin;

  Angles(const Floats& cos_all, const Floats& sin_all, int64_t token) {
    const int64_t row = cos_all.dimensions()[0] == 1 ? 0 : token * cos_all.dimensions()[1];
    cos = cos_all.typed_data() + row;
    sin = sin_all.typed_data() + row;
  }
};

float inverse_rms(const float* x, int64_t H, float epsilon) {
  return 1 / std::sqrt(dot(x, x, H) / H + epsilon);
}

void head_forward(const float* x, const float* w, Angles angles, int64_t H, float epsilon, float* y) {
  const int64_t half = H / 2;
  const float r = inverse_rms(x, H, epsilon);
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j] * r * w[j], b = x[j + half] * r * w[j + half];
    y[j] = a * angles.cos[j] - b * angles.sin[j];
    y[j + half] = b * angles.cos[j] + a * angles.sin[j];
  }
}

// One head of one token: d_y turned back, times the norm's derivative; adds to d_weight [H]. `d` is scratch, [H].
void head_backward(const float* x, const float* d_y, const float* w, Angles angles, int64_t H, float epsilon, float* d,
                   float* d_x, float* d_weight) {
  const int64_t half = H / 2;
  const float r = inverse_rms(x, H, epsilon);
  for (int64_t j = 0; j < half; ++j) {
    d[j] = d_y[j] * angles.cos[j] + d_y[j + half] * angles.sin[j];
    d[j + half] = d_y[j + half] * angles.cos[j] - d_y[j] * angles.sin[j];
  }
  for (int64_t h = 0; h < H; ++h) d_weight[h] += d[h] * x[h] * r;
  for (int64_t h = 0; h < H; ++h) d[h] *= w[h];
  const float along = dot(d, x, H) * r * r / H;
  for (int64_t h = 0; h < H; ++h) d_x[h] = r * (d[h] - x[h] * along);
}

// Sums of a number of gradients [H], each part's own and at the end all in order: the same from run to run.
class Sums {
 public:
  Sums(int64_t tokens, int64_t count, int64_t H)
      : H_(H), count_(count), of_parts_((tokens + kTokens - 1) / kTokens * count * H) {}

  float* of(int64_t part, int64_t which) { return of_parts_.data() + (part * count_ + which) * H_; }

  void write(int64_t which, FloatResult& d) {
    std::fill_n(d->typed_data(), H_, 0.0f);
    for (size_t at = which * H_; at < of_parts_.size(); at += count_ * H_)
      for (int64_t h = 0; h < H_; ++h) d->typed_data()[h] += of_parts_[at + h];
  }

 private:
  int64_t H_, count_;
  std::vector<float> of_parts_;
};

ffi::Error forward(Threads pool, Floats x, Floats weight, Floats cos, Floats sin, FloatResult y, Epsilon epsilon) {
  const int64_t tokens = x.dimensions()[0], heads = x.dimensions()[1], H = x.dimensions()[2];
  share_out_parts(pool, tokens, kTokens, [&](int64_t t, int64_t) {
    const Angles angles(cos, sin, t);
    for (int64_t n = t * heads; n < (t + 1) * heads; ++n)
      head_forward(x.typed_data() + n * H, weight.typed_data(), angles, H, *epsilon, y->typed_data() + n * H);
  });
  return ffi::Error::Success();
}

ffi::Error backward(Threads pool, Floats x, Floats weight, Floats cos, Floats sin, Floats d_y, FloatResult d_x,
                    FloatResult d_weight, Epsilon epsilon) {
  const int64_t tokens = x.dimensions()[0], heads = x.dimensions()[1], H = x.dimensions()[2];
  Sums sums(tokens, 1, H);
  share_out_parts(pool, tokens, kTokens, [&](int64_t t, int64_t part) {
    const Angles angles(cos, sin, t);
    for (int64_t n = t * heads; n < (t + 1) * heads; ++n)
      head_backward(x.typed_data() + n * H, d_y.typed_data() + n * H, weight.typed_data(), angles, H, *epsilon,
                    scratch<0>(H), d_x->typed_data() + n * H, sums.of(part, 0));
  });
  sums.write(0, d_weight);
  return ffi::Error::Success();
}

// Fused heads [tokens, N + 2 K, H] taken apart, queries and keys normalised and rotated:
// q [tokens, N, H], k and v [tokens, K, H]
ffi::Error fused_forward(Threads pool, Floats fused, Floats q_weight, Floats k_weight, Floats cos, Floats sin,
                         FloatResult q, FloatResult k, FloatResult v, Epsilon epsilon) {
  const int64_t tokens = q->dimensions()[0], N = q->dimensions()[1], K = k->dimensions()[1], H = q->dimensions()[2];
  share_out_parts(pool, tokens, kTokens, [&](int64_t t, int64_t) {
    const Angles angles(cos, sin, t);
    const float* in = fused.typed_data() + t * (N + 2 * K) * H;
    for (int64_t n = 0; n < N; ++n, in += H)
      head_forward(in, q_weight.typed_data(), angles, H, *epsilon, q->typed_data() + (t * N + n) * H);
    for (int64_t n = 0; n < K; ++n, in += H)
      head_forward(in, k_weight.typed_data(), angles, H, *epsilon, k->typed_data() + (t * K + n) * H);
    std::copy_n(in, K * H, v->typed_data() + t * K * H);
  });
  return ffi::Error::Success();
}

ffi::Error fused_backward(Threads pool, Floats fused, Floats q_weight, Floats k_weight, Floats cos, Floats sin,
                          Floats d_q, Floats d_k, Floats d_v, FloatResult d_fused, FloatResult d_q_weight,
                          FloatResult d_k_weight, Epsilon epsilon) {
  const int64_t tokens = d_q.dimensions()[0], N = d_q.dimensions()[1], K = d_k.dimensions()[1], H = d_q.dimensions()[2];
  Sums sums(tokens, 2, H);
  share_out_parts(pool, tokens, kTokens, [&](int64_t t, int64_t part) {
    const Angles angles(cos, sin, t);
    const float* in = fused.typed_data() + t * (N + 2 * K) * H;
    float *d_in = d_fused->typed_data() + t * (N + 2 * K) * H, *d = scratch<0>(H);
    for (int64_t n = 0; n < N; ++n, in += H, d_in += H)
      head_backward(in, d_q.typed_data() + (t * N + n) * H, q_weight.typed_data(), angles, H, *epsilon, d, d_in,
                    sums.of(part, 0));
    for (int64_t n = 0; n < K; ++n, in += H, d_in += H)
      head_backward(in, d_k.typed_data() + (t * K + n) * H, k_weight.typed_data(), angles, H, *epsilon, d, d_in,
                    sums.of(part, 1));
    std::copy_n(d_v.typed_data() + t * K * H, K * H, d_in);
  });
  sums.write(0, d_q_weight);
  sums.write(1, d_k_weight);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dreamer

DREAMER_KERNEL(heads_forward, forward);
DREAMER_KERNEL(heads_backward, backward);
DREAMER_KERNEL(fused_heads_forward, fused_forward);
DREAMER_KERNEL(fused_heads_backward, fused_backward);
