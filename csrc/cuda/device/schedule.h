// Which pairs of tiles a block visits in which round, such that no two pairs of a round share a tile: warps that each
// take a pair then own its rows and columns until the next barrier, and add to them without atomics in a fixed order.
//
// Round −1 pairs every tile with itself; the others are those of a round-robin tournament (the circle method): with an
// even number of players, one added where it is odd, the last stays and the others move on by one each round.
#pragma once

#include "types.h"

#if defined(__CUDACC_RTC__)
#define MINILM_BOTH __host__ __device__
#else
#define MINILM_BOTH
#endif

namespace minilm::cuda {

struct TilePair {
  int row, column;  // row >= column; row −1: the tile has no partner in this round
};

MINILM_BOTH inline int rounds_of(int tiles) { return tiles + tiles % 2 - 1; }

MINILM_BOTH inline int pairs_of(int tiles, int round) { return round < 0 ? tiles : (tiles + 1) / 2; }

MINILM_BOTH inline TilePair tile_pair(int tiles, int round, int pair) {
  if (round < 0) return {pair, pair};
  const int moving = rounds_of(tiles);
  int a = round + pair, b = pair == 0 ? moving : round - pair;
  if (a >= moving) a -= moving;
  if (b < 0) b += moving;
  if (a >= tiles || b >= tiles) return {-1, -1};
  return a > b ? TilePair{a, b} : TilePair{b, a};
}

}  // namespace minilm::cuda
