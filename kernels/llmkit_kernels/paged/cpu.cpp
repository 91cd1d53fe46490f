// Attention of ragged spans over keys and values that lie in blocks (PagedAttention, arXiv 2309.06180), sums in fp32.
//
// A task is one key-value head of some queries of one span: keys and values are read once for all query heads of the
// group. Sums have one order: over chunks of keys that are counted from the first of the sequence, each with a softmax
// of its own, which are merged in turn (FlashAttention, arXiv 2205.14135). So a query's result is the same to the bit
// whatever is computed beside it, in how many pieces its sequence came, and on how many threads.
#include <omp.h>

#include <optional>

#include "products.h"
#include "softened.h"

using namespace llmkit;

namespace {

template <class T>
struct Cache {
  T *keys, *values;  // (blocks, heads, size, wide), (blocks, heads, wide, columns)
  float *by_key, *by_value;  // (blocks, heads, wide): what whole numbers are multiples of
  const T* key(const Shape& s, long block, long g) const { return keys + (block * s.held() + g) * s.size * s.wide(); }
  const T* of_value(const Shape& s, long block, long g) const {
    return values + (block * s.held() + g) * s.wide() * s.columns();
  }
};

struct Heads {
  const void* at;
  long head, token;
  template <class T> const T* of(long h, long t) const { return static_cast<const T*>(at) + h * head + t * token; }
};

// Tokens [start, end) after `past` others; its blocks are at `table`; `tree` is its place in the masks, -1 for a chain.
struct Span { int64_t start, end, past, table, tree; };

struct Step {
  const Span* spans;
  const int64_t *table, *slots;
  const uint64_t* seen;    // of a token of a tree: bit j for token j of its span
  const int64_t* depths;   // and how many of those come before it
  const float *cos, *sin;  // by which queries and keys of each token are turned (tokens, size), or null
};

// Pairs (d, d + size / 2) turned by their angles (RoPE, arXiv 2104.09864). Every product and sum is rounded by itself, as
// torch does it, so that it is the same to the bit where a family's own code turned them.
__attribute__((noinline, optimize("fp-contract=off"))) void turn(const float* x, const float* cos, const float* sin,
                                                                 long size, float* to) {
  const long half = size / 2;
  for (long d = 0; d < half; d++) to[d] = x[d] * cos[d] - x[d + half] * sin[d];
  for (long d = half; d < size; d++) to[d] = x[d] * cos[d] + x[d - half] * sin[d];
}

// ---- what is written

// A key as it is to be kept: turned into `room`, if it is turned at all, which those of 16 bits are before.
inline const float* turned(const float* key, long t, const Shape& s, const Step& step, float* room) {
  if (!step.cos) return key;
  turn(key, step.cos + t * s.size, step.sin + t * s.size, s.size, room);
  return room;
}
template <class In>
const In* turned(const In* key, long, const Shape&, const Step&, float*) { return key; }

template <class In, class T>
void write(const Shape& s, const Heads& k, const Heads& v, const Step& step, const Cache<T>& cache, long tokens,
           float* room) {
#pragma omp for collapse(2) schedule(static)
  for (long g = 0; g < s.held(); g++)
    for (long t = 0; t < tokens; t++) {
      const long slot = step.slots[t];
      if (slot < 0) continue;
      const long at = slot / s.block * s.held() + g, in = slot % s.block;
      const In* key = turned(k.of<In>(g, t), t, s, step, room);
      put(key, s.size, cache.keys + at * s.size * s.wide() + in, s.wide(), cache.by_key + at * s.wide() + in);
      put(v.of<In>(g, t), s.value, cache.values + (at * s.wide() + in) * s.columns(), 1,
          cache.by_value + at * s.wide() + in);
    }
}

// Lanes of the blocks that tokens of a tree may lie in, of one query.
static inline long tree_pitch(const Shape& s) { return ((DRAFTS + s.block - 1) / s.block + 1) * s.wide() + LANES; }

// What one thread works in: cut from memory that the caller took, since nothing may fail in here.
struct Room {
  float *q, *scores, *part, *out, *by;
  Mass *mass, *chunk;
  float *wide, *tree;
  static long widened(const Shape& s) { return s.blocks() * s.wide() * (s.size + s.columns()); }
  static long rows(const Shape& s) { return s.queries * s.groups; }
  static long floats(const Shape& s) {
    return rows(s) * (s.size + s.pitch() + 2 * s.columns() + 4 + tree_pitch(s)) + 2 * s.pitch() + widened(s);
  }
  Room(float* at, const Shape& s)
      : q(at), scores(q + rows(s) * s.size), part(scores + rows(s) * s.pitch()), out(part + rows(s) * s.columns()),
        by(out + rows(s) * s.columns()), mass(reinterpret_cast<Mass*>(by + 2 * s.pitch())),
        chunk(mass + rows(s)), wide(reinterpret_cast<float*>(chunk + rows(s))), tree(wide + widened(s)) {}
};

// Puts NONE where the query at `place` does not see a key, in blocks [low, top) of a chunk that begins with key `from`.
void hide(const Shape& s, long place, long from, long low, long top, float* row) {
  const long first = s.first(place), end = place + 1, wide = s.wide();
  for (long b = low; b < top; b++) {
    const long at = from + b * s.block;
    float* lanes = row + b * wide;
    std::fill(lanes, lanes + std::min(std::max(first - at, 0L), wide), NONE);
    std::fill(lanes + std::max(std::min(end - at, s.block), 0L), lanes + wide, NONE);
  }
}

// A tree of drafts. Its keys and values lie in the order in which they were drafted: all queries meet all of these keys at
// once, and each takes the scores of its own path, one after the other as they would lie if nothing else had been drafted.
// So its sums are those of a chain.
template <class T>
struct Tree {
  const Shape& s;
  const Step& step;
  const Span& span;
  const Cache<T>& cache;
  const long g, block, first;  // the block of the sequence from which on a path is one of its own, and its first key
  float* scores;
  Tree(const Shape& s_, const Step& step_, const Span& span_, const Cache<T>& cache_, long g_, float* room)
      : s(s_), step(step_), span(span_), cache(cache_), g(g_), block(span_.past / s_.block), first(block * s_.block),
        scores(room) {}

  // What every query makes of the keys of those blocks.
  void meet(long rows, const float* q) const {
    const T* strips[PIECES];
    const long blocks = (span.past + span.end - span.start - 1) / s.block - block + 1, each = s.wide() / LANES;
    for (long b = 0; b < blocks * each; b++)
      strips[b] = cache.key(s, step.table[span.table + block + b / each], g) + b % each * LANES;
    all_scores(rows, q, strips, blocks * each, s, tree_pitch(s), scores);
  }
  // The scores of row `r` at the places [from, to) of the path of a query come to stand at `row`, block by block.
  void take(long query, long r, long from, long to, long chunk, float* row) const {
    walk(query, from, to, [&](long place, long slot, long lane) {
      const float score = scores[r * tree_pitch(s) + lane];
      row[at(place, chunk)] = std::is_same<T, int8_t>::value ? score * cache.by_key[factor(slot)] : score;
    });
  }
  void times(long query, long from, long to, long chunk, float* row) const {
    walk(query, from, to, [&](long place, long slot, long) { row[at(place, chunk)] *= cache.by_value[factor(slot)]; });
  }
  // Adds the values at those places, of all rows of a query, in turn.
  void weigh(long query, long from, long to, long chunk, const float* weights, float* out) const {
    const T* values[PIECES];
    Reach reach[PIECES];
    long count = 0;
    walk(query, from, to, [&](long place, long slot, long) {
      const long in = place % s.block, of = (place - chunk) / s.block;
      const T* value = cache.of_value(s, slot / s.block, g) + slot % s.block * s.columns() - in * s.columns();
      if (count && values[count - 1] == value && reach[count - 1].block == of) reach[count - 1].to++;
      else values[count] = value, reach[count++] = {of, in, in + 1};
    });
    all_values(s.groups, weights, values, reach, count, s, true, out);
  }

 private:
  long at(long place, long chunk) const { return (place - chunk) / s.block * s.wide() + place % s.block; }
  long factor(long slot) const { return (slot / s.block * s.held() + g) * s.wide() + slot % s.block; }
  template <class F>
  void walk(long query, long from, long to, F run) const {
    for (long place = std::max(from, first); place < std::min<long>(to, span.past); place++)
      run(place, step.table[span.table + block] * s.block + place - first, place - first);
    long place = span.past;
    for (uint64_t left = step.seen[span.tree + query]; left; left &= left - 1, place++) {
      const long token = __builtin_ctzll(left), lies = span.past + token;
      if (place >= from && place < to)
        run(place, step.slots[span.start + token], (lies / s.block - block) * s.wide() + lies % s.block);
    }
  }
};

// The blocks [low, top) of a chunk of keys, and which rows of them any query sees.
template <class T>
struct Chunk {
  const T *strips[STRIPS], *values[STRIPS];
  Reach reach[STRIPS];
  long from, low, top;
  Chunk(const Shape& s, const Cache<T>& cache, const int64_t* table, long g, long from_, long first, long last)
      : Chunk(s, from_, first, last) {
    for (long b = low; b < top; b++) {
      const long block = table[from / s.block + b];
      place(s, b - low, cache.key(s, block, g), cache.of_value(s, block, g));
    }
  }
  // The same in fp32, which is worth its making where many queries read it.
  template <class N>
  Chunk(const Shape& s, const Chunk<N>& narrow, float* room) : Chunk(narrow) {
    const long keys = s.size * s.wide(), values_ = s.wide() * s.columns();
    for (long b = 0; b < top - low; b++, room += keys + values_) {
      const N *key = narrow.strips[b * (s.wide() / LANES)], *value = narrow.values[b];
      for (long i = 0; i < keys; i += LANES) store(room + i, llmkit::wide(key + i));
      for (long i = reach[b].from * s.columns(); i < reach[b].to * s.columns(); i += LANES)
        store(room + keys + i, llmkit::wide(value + i));
      place(s, b, room, room + keys);
    }
  }
  // The factors of its keys or values, lane by lane.
  void factors(const Shape& s, const float* of, const int64_t* table, long g, float* by) const {
    for (long b = low; b < top; b++) {
      const float* there = of + (table[from / s.block + b] * s.held() + g) * s.wide();
      std::copy(there, there + s.wide(), by + b * s.wide());
    }
  }

 private:
  template <class> friend struct Chunk;
  Chunk(const Shape& s, long from_, long first, long last)
      : from(from_), low(std::max(0L, first - from_) / s.block),
        top(std::max(low, (std::min(last - from_, s.blocks() * s.block) + s.block - 1) / s.block)) {
    for (long b = low; b < top; b++) {
      const long at = from + b * s.block;
      reach[b - low] = {b, std::max(0L, first - at), std::min(s.block, last - at)};
    }
  }
  template <class N>
  explicit Chunk(const Chunk<N>& other) : from(other.from), low(other.low), top(other.top) {
    std::copy(other.reach, other.reach + (top - low), reach);
  }
  void place(const Shape& s, long b, const T* key, const T* value) {
    for (long l = 0; l < s.wide(); l += LANES) strips[b * (s.wide() / LANES) + l / LANES] = key + l;
    values[b] = value;
  }
};

// Where more queries than go through registers at once read a narrow chunk, it is made fp32 first: the same numbers.
template <class T>
const Chunk<float>* widened(const Shape& s, const Chunk<T>& chunk, long rows, const Room& room,
                            std::optional<Chunk<float>>& held) {
  if (std::is_same<T, float>::value || rows <= 6) return nullptr;
  held.emplace(s, chunk, room.wide);
  return &*held;
}

bool finite(const float* x, long n) {
  vec total{};  // times 0 what is finite is 0
  for (long i = 0; i < n; i += LANES) total += load(x + i) * 0.0f;
  return sum(total) == 0;
}

template <class T>
void attend(const Shape& s, const Step& step, const Span& span, const Cache<T>& cache, const Heads& q, float* out,
            const float* sinks, long g, long query, long n, const Room& room) {
  const bool branches = span.tree >= 0, whole = std::is_same<T, int8_t>::value;
  const Tree<T> tree(s, step, span, cache, g, room.tree);
  const int64_t* depths = step.depths + span.tree + query;
  const auto place = [&](long i) { return span.past + (branches ? depths[i] : query + i); };
  const auto ends = std::minmax_element(depths, depths + (branches ? n : 0));
  const long first = s.first(branches ? span.past + *ends.first : place(0));
  const long last = (branches ? span.past + *ends.second : place(n - 1)) + 1;
  const long rows = n * s.groups, keys = s.blocks() * s.block, columns = s.columns(), pitch = s.pitch();
  const int64_t* table = step.table + span.table;
  for (long r = 0; r < rows; r++) {
    const long token = span.start + query + r / s.groups;
    float* to = room.q + r * s.size;
    const float* from = turned(q.of<float>(g * s.groups + r % s.groups, token), token, s, step, to);
    for (long d = 0; d < s.size; d++) to[d] = from[d] * s.scale;
    room.mass[r] = {NONE, 0};
  }
  std::fill(room.out, room.out + rows * columns, 0.0f);
  if (branches) tree.meet(rows, room.q);
  std::optional<Chunk<float>> held;
  for (long from = first / keys * keys; from < last; from += keys) {
    const Chunk<T> chunk(s, cache, table, g, from, first, branches ? std::min(last, tree.first) : last);
    const Chunk<float>* wide = widened(s, chunk, rows, room, held);
    const long blocks = chunk.top - chunk.low, shared = blocks * s.wide(), low = chunk.low * s.wide();
    const long end = std::min(last, from + keys), top = (end - from + s.block - 1) / s.block;
    const long lanes = (top - chunk.low) * s.wide();
    float* scores = room.scores + low;
    if (wide) all_scores(rows, room.q, wide->strips, shared / LANES, s, pitch, scores);
    else all_scores(rows, room.q, chunk.strips, shared / LANES, s, pitch, scores);
    if (whole) {
      chunk.factors(s, cache.by_key, table, g, room.by);
      chunk.factors(s, cache.by_value, table, g, room.by + pitch);
    }
    for (long r = 0; r < rows; r++) {
      float* row = scores + r * pitch;
      const long i = r / s.groups, begin = std::max(from, s.first(place(i))), stop = std::min(end, place(i) + 1);
      if (whole) times(row, shared, room.by + low);
      if (branches) tree.take(query + i, r, begin, stop, from, row - low);
      if (s.cap > 0) capped(row, lanes, s.cap);
      hide(s, place(i), from, chunk.low, top, row - low);
      room.chunk[r] = softened(row, lanes);
      if (whole) times(row, shared, room.by + pitch + low);
      if (whole && branches) tree.times(query + i, begin, stop, from, row - low);
    }
    if (wide) all_values(rows, room.scores, wide->values, chunk.reach, blocks, s, false, room.part);
    else all_values(rows, room.scores, chunk.values, chunk.reach, blocks, s, false, room.part);
    for (long i = 0; branches && i < n; i++)
      tree.weigh(query + i, std::max(from, s.first(place(i))), std::min(end, place(i) + 1), from,
                 room.scores + i * s.groups * pitch, room.part + i * s.groups * columns);
    for (long r = 0; r < rows; r++)
      merge(room.mass[r], room.out + r * columns, room.chunk[r], room.part + r * columns, columns);
  }
  if (n > 1 && !finite(room.out, rows * columns)) {
    // values of later tokens have a weight of 0 here, and 0 times what is no number is none: one query at a time then
    for (long i = 0; i < n; i++) attend(s, step, span, cache, q, out, sinks, g, query + i, 1, room);
    return;
  }
  std::fill(room.part, room.part + columns, 0.0f);
  for (long r = 0; r < rows; r++) {
    const long h = g * s.groups + r % s.groups;
    float* o = room.out + r * columns;
    if (sinks) merge(room.mass[r], o, {sinks[h], 1}, room.part, columns);  // a key without a value
    const float over = 1 / room.mass[r].sum;
    float* to = out + ((span.start + query + r / s.groups) * s.heads + h) * s.value;
    for (long d = 0; d < s.value; d++) to[d] = o[d] * over;
  }
}

struct Given {
  Shape s;
  Step step;
  Heads q, k, v;
  float *out, *rooms;
  void *keys, *values;
  float *by_key, *by_value;
  const float* sinks;
  const int64_t* tasks;  // span and first query
  long tokens, count;
  int threads;
};

template <class In, class T>
void run(const Given& given) {
  const Shape& s = given.s;
  const Cache<T> cache{static_cast<T*>(given.keys), static_cast<T*>(given.values), given.by_key, given.by_value};
#pragma omp parallel num_threads(given.threads)
  {
    const Room room(given.rooms + omp_get_thread_num() * Room::floats(s), s);
    write<In>(s, given.k, given.v, given.step, cache, given.tokens, room.q);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < given.count * s.held(); task++) {
      const int64_t* at = given.tasks + 2 * (task / s.held());
      const Span& span = given.step.spans[at[0]];
      const long n = std::min(s.queries, span.end - span.start - at[1]);
      attend(s, given.step, span, cache, given.q, given.out, given.sinks, task % s.held(), at[1], n, room);
    }
  }
}

}  // namespace

extern "C" {

// Floats of room for each thread.
int64_t paged_room(int64_t groups, int64_t size, int64_t value, int64_t block, int64_t queries) {
  return Room::floats(Shape{groups, groups, size, value, block, queries, 0, 0, 0});
}

// Writes the new keys and values k, v (heads / groups, tokens, size) to their slots, then attends: q (heads, tokens,
// size) -> out (tokens, heads, value). `precision` of the cache: 0 fp32, 1 bf16, 2 fp16 (k and v are of the same), 3 int8
// (k and v are fp32, and every head of a token has a factor). `cos` and `sin` (tokens, size) turn queries and keys that are
// given in fp32, or are null.
void paged_attention(const float* q, const void* k, const void* v, const int64_t* strides, float* out, void* keys,
                     void* values, float* by_key, float* by_value, const int64_t* slots, const int64_t* spans,
                     const int64_t* table, const uint64_t* seen, const int64_t* depths, const int64_t* tasks,
                     const float* sinks, const float* cos, const float* sin, float* rooms, int64_t tokens,
                     int64_t count, int64_t heads, int64_t groups, int64_t size, int64_t value, int64_t block,
                     int64_t queries, int64_t window, int64_t precision, float scale, float cap, int threads) {
  const Step step{reinterpret_cast<const Span*>(spans), table, slots, seen, depths, cos, sin};
  const Given given{Shape{heads, groups, size, value, block, queries, window, scale, cap}, step,
                    Heads{q, strides[0], strides[1]}, Heads{k, strides[2], strides[3]}, Heads{v, strides[4], strides[5]},
                    out, rooms, keys, values, by_key, by_value, sinks, tasks, tokens, count, threads};
  if (precision == 0) run<float, float>(given);
  if (precision == 1) run<bf16, bf16>(given);
  if (precision == 2) run<fp16, fp16>(given);
  if (precision == 3) run<float, int8_t>(given);
}
}
