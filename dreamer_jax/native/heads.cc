// Per-head RMSNorm and RoPE of queries and keys in one pass: y = rotate(x / rms(x) * weight).
//
// x and y are [tokens, heads, H], weight [H], epsilon []. Pairs (j, j + H/2) of a head turn by the angle whose cosine and
// sine are row `token` of cos and sin, [tokens, H/2], or their only row, [1, H/2].

#include <cmath>
#include <vector>

#include "matmul.h"
#include "work.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Floats>;

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

ffi::Error forward(ffi::ThreadPool pool, Floats x, Floats weight, Floats cos, Floats sin, Result y, float epsilon) {
  const int64_t tokens = x.dimensions()[0], heads = x.dimensions()[1], H = x.dimensions()[2], half = H / 2;
  const float* w = weight.typed_data();
  share_out(pool, (tokens + kTokens - 1) / kTokens, [&](int64_t i) {
    for (int64_t t = i * kTokens; t < std::min((i + 1) * kTokens, tokens); ++t) {
      const Angles angles(cos, sin, t);
      for (int64_t n = t * heads; n < (t + 1) * heads; ++n) {
        const float* in = x.typed_data() + n * H;
        float* out = y->typed_data() + n * H;
        const float r = inverse_rms(in, H, epsilon);
        for (int64_t j = 0; j < half; ++j) {
          const float a = in[j] * r * w[j], b = in[j + half] * r * w[j + half];
          out[j] = a * angles.cos[j] - b * angles.sin[j];
          out[j + half] = b * angles.cos[j] + a * angles.sin[j];
        }
      }
    }
  });
  return ffi::Error::Success();
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

ffi::Error backward(ffi::ThreadPool pool, Floats x, Floats weight, Floats cos, Floats sin, Floats d_y, Result d_x,
                    Result d_weight, float epsilon) {
  const int64_t tokens = x.dimensions()[0], heads = x.dimensions()[1], H = x.dimensions()[2];
  const int64_t parts = (tokens + kTokens - 1) / kTokens;
  std::vector<float> partial(parts * H);  // summed in order at the end: the same from run to run
  share_out(pool, parts, [&](int64_t i) {
    float* d = scratch<0>(H);
    for (int64_t t = i * kTokens; t < std::min((i + 1) * kTokens, tokens); ++t)
      for (int64_t n = t * heads; n < (t + 1) * heads; ++n)
        head_backward(x.typed_data() + n * H, d_y.typed_data() + n * H, weight.typed_data(), Angles(cos, sin, t), H,
                      epsilon, d, d_x->typed_data() + n * H, partial.data() + i * H);
  });
  std::fill_n(d_weight->typed_data(), H, 0.0f);
  for (int64_t i = 0; i < parts; ++i)
    for (int64_t h = 0; h < H; ++h) d_weight->typed_data()[h] += partial[i * H + h];
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dreamer

XLA_FFI_DEFINE_HANDLER_SYMBOL(heads_forward, dreamer::forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<float>("epsilon"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(heads_backward, dreamer::backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<float>("epsilon"));
