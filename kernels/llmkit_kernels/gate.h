// The gate of a gated MLP, and vectors that are not full.
#pragma once
#include "tile.h"

namespace llmkit {

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }
static inline vec silu(vec x) { return x * sigmoid(x); }

// The first n of a vector; the others are 0.
static inline vec some(const float* p, int64_t n) {
  if (n == LANES) return load(p);
  vec v{};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}

static inline void put(float* p, vec v, int64_t n) {
  if (n == LANES)
    store(p, v);
  else
    std::memcpy(p, &v, n * sizeof(float));
}

}  // namespace llmkit
