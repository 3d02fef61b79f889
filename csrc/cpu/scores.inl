// Scores of a row block with a range of key blocks.
//
// AMD processors have separate ports for additions. On them, two of every three pairs of features are computed as
// (x_0 + y_1)(x_1 + y_0) = x_0 y_0 + x_1 y_1 + x_0 x_1 + y_0 y_1: one multiply-add and two additions instead of two
// multiply-adds. The unwanted terms x_0 x_1 and y_0 y_1 depend on one token each and are subtracted from its offset.
#pragma once

namespace {

// Tokens are stored as [block][feature][lane].
MINILM_INLINE const float* row_pointer(const float* x, int64_t width, int64_t row) {
  return x + row / V * width * V + row % V;
}

// Calls paired(d) if the features d and d + 1 are computed together, and single(d) for every other feature d.
template <class Paired, class Single>
MINILM_INLINE void for_each_feature(int64_t width, const Paired& paired, const Single& single) {
  int64_t d = 0;
  for (; d + 6 <= width; d += 6) {
    paired(d);
    paired(d + 2);
    single(d + 4);
    single(d + 5);
  }
  if (d + 4 <= width) {
    paired(d);
    d += 2;
  }
  for (; d < width; ++d) single(d);
}

struct ScoreInput {
  const float* queries;
  int64_t first;      // first row of the row block
  const float* keys;  // first key block
  int64_t width;
  const float* row_offsets = nullptr;  // offsets of the row block's rows and of the keys, added to the scores
  const float* key_offsets = nullptr;
};

enum class Product { plain, offset, paired };  // x·y; x·y + offsets; the same with features in pairs

// Computes the scores of a tile of kTileRows rows and N key blocks. out: [block][row][lane].
template <Product kProduct, int N>
MINILM_INLINE void score_tile(const ScoreInput& in, int64_t row, int64_t block, float* out) {
  int64_t width = in.width;
  const float *rows = row_pointer(in.queries, width, in.first + row), *keys = in.keys + block * width * V;
  F acc[kTileRows][N];
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) {
      acc[r][n] = set1(0.0f);
      if (kProduct != Product::plain)
        acc[r][n] = add(set1(in.row_offsets[row + r]), load(in.key_offsets + (block + n) * V));
    }
  auto single = [&](int64_t d) __attribute__((always_inline)) {
    F key[N];
    for (int n = 0; n < N; ++n) key[n] = load(keys + (n * width + d) * V);
    for (int r = 0; r < kTileRows; ++r) {
      F x = set1(rows[d * V + r]);
      for (int n = 0; n < N; ++n) acc[r][n] = fma(x, key[n], acc[r][n]);
    }
  };
  auto paired = [&](int64_t d) __attribute__((always_inline)) {
    F key[N][2];
    for (int n = 0; n < 2 * N; ++n) key[n / 2][n % 2] = load(keys + (n / 2 * width + d + n % 2) * V);
    for (int r = 0; r < kTileRows; ++r) {
      F x = set1(rows[d * V + r]), y = set1(rows[(d + 1) * V + r]);
      for (int n = 0; n < N; ++n) acc[r][n] = fma(add(x, key[n][1]), add(y, key[n][0]), acc[r][n]);
    }
  };
  if (kProduct == Product::paired)
    for_each_feature(width, paired, single);
  else
    for (int64_t d = 0; d < width; ++d) single(d);
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) store(out + ((block + n) * R + row + r) * V, acc[r][n]);
}

template <Product kProduct>
void scores(const ScoreInput& in, int64_t blocks, float* out) {
  int64_t block = 0;
  for (; block + kTileBlocks <= blocks; block += kTileBlocks)
    for (int row = 0; row < R; row += kTileRows) score_tile<kProduct, kTileBlocks>(in, row, block, out);
  for (; block < blocks; ++block)
    for (int row = 0; row < R; row += kTileRows) score_tile<kProduct, 1>(in, row, block, out);
}

}  // namespace
