// Root-mean-square norm of rows (arXiv 1910.07467), fp32: one pass over a row while it is in the cache.
#include <cmath>
#include <vector>

#include "../tile.h"

using namespace llmkit;

constexpr int64_t SMALL = 16384;  // floats that are not worth another thread

extern "C" {

// x, y: (rows, size); over: (rows), one over the root of the mean square, or null.
void norm_forward(const float* x, const float* weight, float* y, float* over, int64_t rows, int64_t size, float eps,
                  int threads) {
  const int64_t whole = size / LANES * LANES, left = (size - whole) * sizeof(float);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > SMALL)
  for (int64_t r = 0; r < rows; r++) {
    const float* from = x + r * size;
    vec a{}, b{}, last{}, scale{};
    for (int64_t i = 0; i + LANES < whole; i += 2 * LANES) {
      const vec u = load(from + i), w = load(from + i + LANES);
      a += u * u;
      b += w * w;
    }
    if (whole % (2 * LANES)) { const vec u = load(from + whole - LANES); a += u * u; }
    std::memcpy(&last, from + whole, left);
    std::memcpy(&scale, weight + whole, left);
    const float k = 1.0f / std::sqrt(sum(a + b + last * last) / size + eps);
    if (over) over[r] = k;
    for (int64_t i = 0; i < whole; i += LANES) store(y + r * size + i, load(weight + i) * (load(from + i) * k));
    last = scale * (last * k);
    std::memcpy(y + r * size + whole, &last, left);
  }
}

// dx = over * (g w - xhat mean(g w xhat)), with xhat = x over. dw (threads, size) is summed by the caller, or null.
void norm_backward(const float* x, const float* weight, const float* over, const float* grad, float* dx, float* dw,
                   int64_t rows, int64_t size, int threads) {
  const int64_t share = (rows + threads - 1) / threads;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t part = 0; part < threads; part++)
    for (int64_t r = part * share; r < std::min(rows, (part + 1) * share); r++) {
      const float *from = x + r * size, *g = grad + r * size;
      const float k = over[r];
      vec dot{};
      for (int64_t i = 0; i < size; i += LANES) {
        const vec gx = load(g + i) * load(from + i);
        dot += gx * load(weight + i);
        if (dw) store(dw + part * size + i, load(dw + part * size + i) + gx * k);
      }
      const float mean = sum(dot) * k * k * k / size;
      for (int64_t i = 0; i < size; i += LANES)
        store(dx + r * size + i, load(g + i) * load(weight + i) * k - load(from + i) * mean);
    }
}
}
