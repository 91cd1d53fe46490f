// Causal attention of segments that lie apart in one row, fp32 (FlashAttention-2, arXiv 2307.08691). A segment may have
// a parent: then its queries see all of its ancestors too, and the segments of one root are a tree.
//
// A task is one head of one tree, so that no two tasks add to one key's gradient; 64 queries at a time meet at most 512
// keys at a time, so that scores stay in the cache. Keys and values are turned once a task, so that every product runs
// along whole vectors. Sums have one order, whatever the number of threads.
#include <omp.h>

#include <cmath>

#include "../tile.h"

using namespace llmkit;

namespace {

constexpr long QUERIES = 64, KEYS = 64, CHUNK = 512, WIDE = CHUNK + LANES;  // rows apart by no power of two
constexpr float NONE = -1e30f;

struct Heads {
  float* at;
  long head, token;
  float* of(long h, long t) const { return at + h * head + t * token; }
};

// What a row of the table says: tokens [begin, end), the parent's row or -1, how many tokens its ancestors have, and the
// place of its turned keys among those of its tree.
struct Segment {
  int64_t begin, end, parent, before, turned;
  long length() const { return end - begin; }
};

struct Shape {
  long heads, groups, size, value, window;
  float scale;
  // The first key of a segment that the window leaves to a query, which lies `query` tokens after the segment's begin.
  long first(long query) const { return window ? std::max(0L, query - window + 1) : 0; }
};

// Floats that x (length x size) takes when it is turned.
long turned_size(long length, long size) { return (length + KEYS - 1) / KEYS * KEYS * size; }

// x (length x size) -> blocks of 64 rows, each turned: (size x 64), the last one filled with zeros.
void turn(const float* x, long step, long length, long size, float* out) {
  std::fill(out, out + turned_size(length, size), 0.0f);
  for (long k = 0; k < length; k++) {
    float* column = out + (k / KEYS) * size * KEYS + k % KEYS;
    for (long d = 0; d < size; d++) column[d * KEYS] = x[k * step + d];
  }
}

// scores (n x keys [from, to)) = rows x turned keys.
void meet(long n, const float* rows_, long step, long size, const float* turned, long from, long to, float* out) {
  for (long k = from; k < to; k += KEYS)
    product(n, KEYS, size, rows_, step, 1, turned + (k / KEYS) * size * KEYS, KEYS, out + (k - from), WIDE,
            false);
}

// Puts `nothing` where query `at + i` does not see key `from + k`; columns up to the next multiple of 64 are covered.
// Both are counted from the begin of the keys' segment.
void hide(const Shape& s, long n, long at, long from, long to, float nothing, float* out) {
  const long end = from + (to - from + KEYS - 1) / KEYS * KEYS;
  for (long i = 0; i < n; i++) {
    const long last = std::min(to, at + i + 1);
    float* row = out + i * WIDE;
    for (long k = from; k < std::min(end, s.first(at + i)); k++) row[k - from] = nothing;
    for (long k = std::max(from, last); k < end; k++) row[k - from] = nothing;
  }
}

void scaled(const Shape& s, const Heads& q, long h, long at, long n, float* out) {
  for (long i = 0; i < n; i++) {
    const float* from = q.of(h, at + i);
    for (long d = 0; d < s.size; d++) out[i * s.size + d] = from[d] * s.scale;
  }
}

// What one thread works in: cut from memory that the caller took, since nothing may fail in here.
struct Room {
  float *kt, *vt, *q, *s, *g;
  static long floats(long longest, long size, long value) {
    return turned_size(longest, size) + turned_size(longest, value) + QUERIES * (size + 2 * WIDE);
  }
  Room(float* at, long longest, long size, long value)
      : kt(at), vt(kt + turned_size(longest, size)), q(vt + turned_size(longest, value)), s(q + QUERIES * size),
        g(s + QUERIES * WIDE) {}
};

void forward(const Shape& s, const Heads& q, const Heads& k, const Heads& v, const Heads& out, float* lse, long h,
             const Segment* table, long segment, const Room& room) {
  const long kv = h / s.groups, begin = table[segment].begin, length = table[segment].length();
  for (long at = 0; at < length; at += QUERIES) {
    const long n = std::min(QUERIES, length - at);
    float high[QUERIES], mass[QUERIES];
    std::fill(high, high + n, NONE);
    std::fill(mass, mass + n, 0.0f);
    scaled(s, q, h, begin + at, n, room.q);
    bool started = false;
    for (long of = segment; of >= 0; of = table[of].parent) {
      const Segment& keys = table[of];
      const long here = at + table[segment].before - keys.before, end = std::min<long>(keys.length(), here + n);
      for (long from = s.first(here) / KEYS * KEYS; from < end; from += CHUNK) {
        const long to = std::min(from + CHUNK, end), wide = (to - from + KEYS - 1) / KEYS * KEYS;
        meet(n, room.q, s.size, s.size, room.kt + keys.turned * s.size, from, to, room.s);
        hide(s, n, here, from, to, NONE, room.s);
        for (long i = 0; i < n; i++) {
          float* row = room.s + i * WIDE;
          vec m = all(high[i]);
          for (long c = 0; c < wide; c += LANES) { const vec x = load(row + c); m = x > m ? x : m; }
          const float now = most(m), base = now <= NONE ? 0.0f : now;
          vec total{};
          for (long c = 0; c < wide; c += LANES) { const vec x = exp(load(row + c) - base); store(row + c, x); total += x; }
          const float shrink = started ? std::exp(high[i] - base) : 0.0f;
          mass[i] = mass[i] * shrink + sum(total);
          high[i] = now;
          if (started && shrink != 1.0f) {
            float* o = out.of(h, begin + at + i);
            for (long d = 0; d < s.value; d++) o[d] *= shrink;
          }
        }
        product(n, s.value, to - from, room.s, WIDE, 1, v.of(kv, keys.begin + from), v.token, out.of(h, begin + at),
                out.token, started);
        started = true;
      }
    }
    for (long i = 0; i < n; i++) {
      float* o = out.of(h, begin + at + i);
      const float over = 1.0f / mass[i];
      for (long d = 0; d < s.value; d++) o[d] *= over;
      lse[begin + at + i] = high[i] + std::log(mass[i]);
    }
  }
}

void backward(const Shape& s, const Heads& q, const Heads& k, const Heads& v, const Heads& out, const float* lse,
              const Heads& grad, const Heads& dq, float* dk, float* dv, long h, const Segment* table, long segment,
              const Room& room) {
  const long kv = h / s.groups, begin = table[segment].begin, length = table[segment].length();
  for (long at = 0; at < length; at += QUERIES) {
    const long n = std::min(QUERIES, length - at);
    scaled(s, q, h, begin + at, n, room.q);
    float delta[QUERIES];
    for (long i = 0; i < n; i++) {
      const float *o = out.of(h, begin + at + i), *g = grad.of(h, begin + at + i);
      vec total{};
      for (long d = 0; d < s.value; d += LANES) total += load(o + d) * load(g + d);
      delta[i] = sum(total);
    }
    bool started = false;
    for (long of = segment; of >= 0; of = table[of].parent) {
      const Segment& over = table[of];
      const long here = at + table[segment].before - over.before, end = std::min<long>(over.length(), here + n);
      for (long from = s.first(here) / KEYS * KEYS; from < end; from += CHUNK) {
        const long to = std::min(from + CHUNK, end), wide = (to - from + KEYS - 1) / KEYS * KEYS;
        meet(n, room.q, s.size, s.size, room.kt + over.turned * s.size, from, to, room.s);
        hide(s, n, here, from, to, NONE, room.s);
        meet(n, grad.of(h, begin + at), grad.token, s.value, room.vt + over.turned * s.value, from, to, room.g);
        for (long i = 0; i < n; i++) {
          float *row = room.s + i * WIDE, *by = room.g + i * WIDE;
          const float known = lse[begin + at + i];
          for (long c = 0; c < wide; c += LANES) {
            const vec p = exp(load(row + c) - known);
            store(row + c, p);
            store(by + c, p * (load(by + c) - delta[i]));
          }
        }
        const long keys = to - from;
        product(keys, s.value, n, room.s, 1, WIDE, grad.of(h, begin + at), grad.token,
                dv + (over.begin + from) * s.value, s.value, true);
        product(keys, s.size, n, room.g, 1, WIDE, room.q, s.size, dk + (over.begin + from) * s.size, s.size, true);
        product(n, s.size, keys, room.g, WIDE, 1, k.of(kv, over.begin + from), k.token, dq.of(h, begin + at), dq.token,
                started);
        started = true;
      }
    }
    for (long i = 0; i < n; i++) {
      float* o = dq.of(h, begin + at + i);
      for (long d = 0; d < s.size; d++) o[d] *= s.scale;
    }
  }
}

}  // namespace

extern "C" {

// Floats of room for each thread.
int64_t attention_room(int64_t longest, int64_t size, int64_t value) { return Room::floats(longest, size, value); }

// q, out: (heads, tokens, size); k, v: (heads / groups, tokens, size), each with the distances of heads and of tokens.
// table: a row of five for each segment, those of a tree together and parents first; trees: (count), each the first row
// after it. lse: (heads, tokens). rooms: (threads, attention_room); `longest`: the most turned keys of a tree.
void attention_forward(float* q, float* k, float* v, float* out, const int64_t* strides, float* lse,
                       const int64_t* table, const int64_t* trees, float* rooms, int64_t longest, int64_t count,
                       int64_t tokens, int64_t heads, int64_t groups, int64_t size, int64_t value, int64_t window,
                       float scale, int threads) {
  const Shape s{heads, groups, size, value, window, scale};
  const Heads hq{q, strides[0], strides[1]}, hk{k, strides[2], strides[3]}, hv{v, strides[4], strides[5]},
      ho{out, value, heads * value};
  const Segment* segments = reinterpret_cast<const Segment*>(table);
#pragma omp parallel num_threads(threads)
  {
    const Room room(rooms + omp_get_thread_num() * Room::floats(longest, size, value), longest, size, value);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < count * heads; task++) {
      const int64_t h = task % heads, tree = task / heads;
      for (int64_t i = tree ? trees[tree - 1] : 0; i < trees[tree]; i++) {
        const Segment& one = segments[i];
        turn(hk.of(h / groups, one.begin), hk.token, one.length(), size, room.kt + one.turned * size);
        forward(s, hq, hk, hv, ho, lse + h * tokens, h, segments, i, room);
      }
    }
  }
}

// grad as out; dq (tokens, heads, size); dk, dv (tokens, heads / groups, size); by_key, by_value (heads, tokens, size).
// What lies outside of every segment is written to none of dq, by_key and by_value.
void attention_backward(float* q, float* k, float* v, float* out, const int64_t* strides, float* lse, float* grad,
                        float* dq, float* dk, float* dv, float* by_key, float* by_value, const int64_t* table,
                        const int64_t* trees, float* rooms, int64_t longest, int64_t count, int64_t tokens,
                        int64_t heads, int64_t groups, int64_t size, int64_t value, int64_t window, float scale,
                        int threads) {
  const Shape s{heads, groups, size, value, window, scale};
  const Heads hq{q, strides[0], strides[1]}, hk{k, strides[2], strides[3]}, hv{v, strides[4], strides[5]},
      ho{out, value, heads * value}, hg{grad, value, heads * value}, gq{dq, size, heads * size};
  const Segment* segments = reinterpret_cast<const Segment*>(table);
#pragma omp parallel num_threads(threads)
  {
    const Room room(rooms + omp_get_thread_num() * Room::floats(longest, size, value), longest, size, value);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < count * heads; task++) {
      const int64_t h = task % heads, kv = h / groups, tree = task / heads;
      float *of_keys = by_key + h * tokens * size, *of_values = by_value + h * tokens * value;
      for (int64_t i = tree ? trees[tree - 1] : 0; i < trees[tree]; i++) {
        const Segment& one = segments[i];
        turn(hk.of(kv, one.begin), hk.token, one.length(), size, room.kt + one.turned * size);
        turn(hv.of(kv, one.begin), hv.token, one.length(), value, room.vt + one.turned * value);
        std::fill(of_keys + one.begin * size, of_keys + one.end * size, 0.0f);
        std::fill(of_values + one.begin * value, of_values + one.end * value, 0.0f);
        backward(s, hq, hk, hv, ho, lse + h * tokens, hg, gq, of_keys, of_values, h, segments, i, room);
      }
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t j = 0; j < heads / groups; j++) {
        float *to_k = dk + (t * (heads / groups) + j) * size, *to_v = dv + (t * (heads / groups) + j) * value;
        for (int64_t d = 0; d < size; d++) to_k[d] = 0;
        for (int64_t d = 0; d < value; d++) to_v[d] = 0;
        for (int64_t h = j * groups; h < (j + 1) * groups; h++) {
          for (int64_t d = 0; d < size; d++) to_k[d] += by_key[(h * tokens + t) * size + d];
          for (int64_t d = 0; d < value; d++) to_v[d] += by_value[(h * tokens + t) * value + d];
        }
      }
  }
}
}
