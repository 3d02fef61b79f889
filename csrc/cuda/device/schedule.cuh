// The order in which a block combines tiles. Within a round no tile occurs twice. A warp therefore owns the rows and
// the columns of its two tiles until the next barrier, and accumulates without atomics, in a fixed order.
//
// Round -1 combines every tile with itself. The other rounds are those of a round-robin tournament (circle method): one
// tile keeps its place, and the others rotate. If the number of tiles is odd, a dummy tile is added.
#pragma once

#include "common/numerics.h"

namespace minilm::cuda {

struct TilePair {
  int row, column;  // row >= column, or both -1 if the tile has no partner in this round
};

MINILM_INLINE int rounds_of(int tiles) { return tiles + tiles % 2 - 1; }

MINILM_INLINE int pairs_of(int tiles, int round) { return round < 0 ? tiles : (tiles + 1) / 2; }

MINILM_INLINE TilePair tile_pair(int tiles, int round, int index) {
  if (round < 0) return {index, index};
  const int rotating = rounds_of(tiles);
  int a = round + index, b = index == 0 ? rotating : round - index;
  if (a >= rotating) a -= rotating;
  if (b < 0) b += rotating;
  if (a >= tiles || b >= tiles) return {-1, -1};
  return a > b ? TilePair{a, b} : TilePair{b, a};
}

// Strips: in round 0 every strip meets itself, and in round d strip i meets strip i + d. With an even number of strips,
// only the first half of them meets another one in the last round, d = strips / 2. Returns -1 if the strip does not
// exist or meets no other one.
MINILM_INLINE int partner_of(int strips, int strip, int round) {
  if (strip >= strips || (round > 0 && 2 * round == strips && strip >= round)) return -1;
  return strip + round < strips ? strip + round : strip + round - strips;
}

}  // namespace minilm::cuda
