// How a kernel's work is shared out over threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "ffi.h"

namespace dreamer {

// Call unit(i) for every i in [0, count): on this thread, helped by those of XLA's threads that are idle. Returns when all
// are done. Helpers that come late find nothing left, so that nobody waits for a thread that has not begun.
template <class Unit>
void share_out(Threads& pool, int64_t count, const Unit& unit) {
  struct Job {
    const Unit* unit;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
  };
  auto job = std::make_shared<Job>();
  job->unit = &unit;
  job->count = count;
  auto work = [job] {
    for (int64_t i; (i = job->next.fetch_add(1)) < job->count; job->done.fetch_add(1)) (*job->unit)(i);
  };
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  while (job->done.load() < count) std::this_thread::yield();
}

// visit(i, part) for every i in [0, count); `size` of them at a time, a part, belong to one thread.
template <class Visit>
void share_out_parts(Threads& pool, int64_t count, int64_t size, const Visit& visit) {
  share_out(pool, (count + size - 1) / size, [&](int64_t part) {
    for (int64_t i = part * size; i < std::min((part + 1) * size, count); ++i) visit(i, part);
  });
}

// Scratch memory of this thread, kept between calls: `Use` tells apart what is needed at the same time.
template <int Use>
float* scratch(int64_t size) {
  thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < size) memory.resize(size);
  return memory.data();
}

}  // namespace dreamer
