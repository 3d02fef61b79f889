// Order in which a block processes pairs of tiles. Within a round no tile occurs twice, so that each warp owns the rows
// and columns of its tile pair until the next barrier and accumulates without atomics, in a fixed order.
//
// Round -1 combines every tile with itself. The other rounds are those of a round-robin tournament (circle method): one
// tile keeps its place, the others rotate. With an odd number of tiles a dummy is added.
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

}  // namespace minilm::cuda
