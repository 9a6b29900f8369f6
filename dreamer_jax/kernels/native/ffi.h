// How kernels are called: XLA reads a kernel's arguments, results and attributes off the types of its parameters.

#pragma once

#include "xla/ffi/api/ffi.h"

namespace dreamer {

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using FloatResult = ffi::Result<Floats>;
using IntResult = ffi::Result<Ints>;

inline constexpr char kEpsilon[] = "epsilon";
using Epsilon = ffi::Attr<float, kEpsilon>;

// The threads that XLA lends.
struct Threads : ffi::ThreadPool {
  Threads(ffi::ThreadPool pool) : ffi::ThreadPool(pool) {}
};

}  // namespace dreamer

template <>
struct xla::ffi::CtxBinding<dreamer::Threads> {
  using Ctx = xla::ffi::ThreadPool;
};

// The kernel dreamer::function, by the name that library.py registers.
#define DREAMER_KERNEL(name, function) XLA_FFI_DEFINE_HANDLER_SYMBOL(name, dreamer::function)
