#include <algorithm>

#include "../math/hook.h"
#include "conv_grid.h"

namespace braze::cuda {

bool conv_fits(const ConvShape& s) {
  constexpr int64_t kChunks = INT32_MAX, kSide = INT16_MAX / 2, kMaxChannels = 1 << 20;
  const auto fits = [](int64_t n, int64_t h, int64_t w, int64_t c) {
    // A tile may reach beyond the last pixel.
    return h <= kSide && w <= kSide && c <= kMaxChannels && n * h * w <= INT32_MAX - kTilePixels &&
           n * h * w * (c / 8) <= kChunks;
  };
  return fits(s.n, s.h, s.w, s.c) && fits(s.n, s.out_h, s.out_w, s.k) &&
         s.k * s.taps() * (s.c / 8) <= kChunks;
}

ConvPixels conv_pixels(const ConvShape& s, bool transposed) {
  const ActivationShape of = transposed ? s.input() : s.output();
  ConvPixels pixels = {};
  pixels.count = static_cast<uint32_t>(of.per_channel());
  pixels.h = static_cast<int32_t>(transposed ? s.h : s.out_h);
  pixels.w = static_cast<int32_t>(transposed ? s.w : s.out_w);
  pixels.from_h = static_cast<int32_t>(transposed ? s.out_h : s.h);
  pixels.from_w = static_cast<int32_t>(transposed ? s.out_w : s.w);
  pixels.chunks = static_cast<int32_t>((transposed ? s.k : s.c) / 8);
  pixels.stride = s.stride;
  pixels.padding = s.padding;
  pixels.linear = BRAZE_HOOK(linear, s.kernel == 1 && s.stride == 1 && s.padding == 0);
  return pixels;
}

NormGrid make_conv_grid(int64_t pixels, int64_t width, int columns, int64_t resident) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t tiles = divide_up(pixels, kTilePixels), groups = divide_up(width, columns);
  // Values that a thread adds up of each tile, and so tiles that it may add up.
  const int64_t values = kTilePixels * columns / 8 / kNormThreads, most = kMaxRun / values;
  const int64_t wave = std::max<int64_t>(resident / groups, 1);
  // Whole waves.
  const int64_t waves = std::max<int64_t>(divide_up(divide_up(tiles, most), wave), 1);
  NormGrid grid = {};
  grid.channels = width;
  grid.groups = static_cast<uint32_t>(groups);
  grid.splits = static_cast<uint32_t>(
      std::clamp<int64_t>(BRAZE_HOOK(conv_waves, waves) * wave, 1, std::max<int64_t>(tiles, 1)));
  grid.words = columns / 8;
  grid.active = kNormThreads;
  grid.width = columns;
  grid.share = 1;
  grid.per_lane = true;
  return grid;
}

}  // namespace braze::cuda
