// Runs the kernels of csrc/cuda/row_lanes.cu on a CPU, on random sizes, and holds them against plain loops. Values are
// small integers, so that every sum is exact.
#include "cuda/row_lanes.cu"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>

using namespace fxsparse;
using namespace fxsparse::cuda;

namespace {

std::mt19937 generator;

int64_t draw(int64_t first, int64_t last) { return std::uniform_int_distribution<int64_t>(first, last)(generator); }

#define EXPECT(condition)                                                                                              \
  if (!(condition)) {                                                                                                  \
    std::printf("line %d: %s\n", __LINE__, #condition);                                                                \
    std::exit(1);                                                                                                      \
  }

template <typename T> struct Drawn {
  Images images;
  ImageLayout layout;
  std::vector<T> memory; // as torch stores it

  Drawn() {
    images = {draw(1, 3), draw(1, 5), draw(1, 9), draw(1, 21)};
    layout = draw(0, 1) ? ImageLayout::kContiguous : ImageLayout::kChannelsLast;
    for (int64_t i = 0; i < images.batch * images.channels * images.height * images.width; ++i)
      memory.push_back(T(float(draw(-8, 8))));
  }

  float at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    if (y < 0 || x < 0 || y >= images.height || x >= images.width)
      return 0;
    const ImageStrides s = strides_in_torch(images, layout);
    return float(memory[n * s.image + c * s.channel + y * s.row + x * s.x]);
  }
};

template <typename T>
float stored(const std::vector<T> &memory, const Images &images, int64_t n, int64_t c, int64_t y, int64_t x) {
  const ImageStrides s = strides_in_row_lanes(images);
  return float(memory[n * s.image + c * s.channel + y * s.row + x]);
}

// What nobody writes is seen: it is NaN.
template <typename T> std::vector<T> poisoned(int64_t count) {
  return std::vector<T>(size_t(count), T(std::numeric_limits<float>::quiet_NaN()));
}

template <typename T> TiledType type_of() {
  return sizeof(T) == 4 ? TiledType::kFloat : std::is_same_v<T, __half> ? TiledType::kHalf : TiledType::kBFloat16;
}

template <typename T> std::vector<T> entered(const Drawn<T> &x) {
  std::vector<T> rows = poisoned<T>(row_lanes_count(x.images));
  EXPECT(launch_unfold(x.images, strides_in_torch(x.images, x.layout), {1, 1, 1, 0, x.images.width}, type_of<T>(),
                       x.memory.data(), rows.data(), nullptr) == cudaSuccess);
  return rows;
}

template <typename T> void check_moves() {
  const Drawn<T> x;
  const std::vector<T> rows = entered(x);
  for (int64_t n = 0; n < x.images.batch; ++n)
    for (int64_t c = 0; c < x.images.channels; ++c)
      for (int64_t y = 0; y < x.images.height; ++y)
        for (int64_t lane = 0; lane < x.images.width; ++lane)
          EXPECT(stored(rows, x.images, n, c, y, lane) == x.at(n, c, y, lane));
  std::vector<T> back = poisoned<T>(int64_t(x.memory.size()));
  launch_from_row_lanes(x.images, x.layout, type_of<T>(), rows.data(), back.data(), nullptr);
  for (size_t i = 0; i < back.size(); ++i)
    EXPECT(float(back[i]) == float(x.memory[i]));
}

// A convolution by plain loops over images stored as tiled_conv2d.h says, of the geometry that its kernels get.
template <typename T>
std::vector<double> convolve(const Conv2dGeometry &g, const std::vector<T> &input, const std::vector<float> &weight) {
  std::vector<double> output;
  for (int64_t y = 0; y < g.out_height; ++y)
    for (int64_t x = 0; x < g.out_width; ++x)
      for (int64_t o = 0; o < g.out_channels; ++o)
        for (int64_t lane = 0; lane < g.batch; ++lane) {
          double sum = 0;
          for (int64_t c = 0; c < g.in_channels; ++c)
            for (int64_t r = 0; r < g.kernel_height; ++r)
              for (int64_t s = 0; s < g.kernel_width; ++s) {
                const int64_t in_y = y * g.stride_y - g.pad_top + r * g.dilation_y;
                const int64_t in_x = x * g.stride_x - g.pad_left + s * g.dilation_x;
                if (in_y < 0 || in_y >= g.in_height || in_x < 0 || in_x >= g.in_width)
                  continue;
                sum += double(weight[((o * g.in_channels + c) * g.kernel_height + r) * g.kernel_width + s]) *
                       float(input[((in_y * g.in_width + in_x) * g.in_channels + c) * g.batch + lane]);
              }
          output.push_back(sum);
        }
  return output;
}

template <typename T> void check_convolution() {
  const Drawn<T> x;
  Conv2dGeometry g = {};
  g.batch = x.images.batch, g.in_channels = x.images.channels;
  g.in_height = x.images.height, g.in_width = x.images.width;
  g.out_channels = draw(1, 4), g.kernel_height = draw(1, 3), g.kernel_width = draw(1, 5);
  g.stride_y = draw(1, 2), g.stride_x = draw(1, 3), g.dilation_y = draw(1, 2), g.dilation_x = draw(1, 3);
  g.pad_top = draw(0, 2), g.pad_bottom = draw(0, 2), g.pad_left = draw(0, 3), g.pad_right = draw(0, 3);
  const auto size = [](int64_t in, int64_t pads, int64_t kernel, int64_t stride, int64_t dilation) {
    const int64_t room = in + pads - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  };
  g.out_height = size(g.in_height, g.pad_top + g.pad_bottom, g.kernel_height, g.stride_y, g.dilation_y);
  g.out_width = size(g.in_width, g.pad_left + g.pad_right, g.kernel_width, g.stride_x, g.dilation_x);
  if (g.out_height == 0 || g.out_width == 0)
    return;
  std::vector<float> weight;
  for (int64_t i = 0; i < g.out_channels * g.in_channels * g.kernel_height * g.kernel_width; ++i)
    weight.push_back(float(draw(-3, 3)));
  const bool moved = draw(0, 1);
  std::vector<T> input = entered(x);
  if (!reads_rows_as_they_lie(g)) {
    const Images unfolded = {g.batch, g.in_channels, g.in_height, g.out_width};
    std::vector<T> columns = poisoned<T>(g.kernel_width * row_lanes_count(unfolded));
    launch_unfold(x.images, moved ? strides_in_row_lanes(x.images) : strides_in_torch(x.images, x.layout), row_taps(g),
                  type_of<T>(), moved ? input.data() : x.memory.data(), columns.data(), nullptr);
    input = columns;
  }
  const std::vector<double> output = convolve(on_row_lanes(g), input, weight);
  const int64_t lanes = padded_width(g.out_width);
  EXPECT(int64_t(output.size()) == row_lanes_count({g.batch, g.out_channels, g.out_height, g.out_width}));
  for (int64_t n = 0; n < g.batch; ++n)
    for (int64_t o = 0; o < g.out_channels; ++o)
      for (int64_t y = 0; y < g.out_height; ++y)
        for (int64_t lane = 0; lane < g.out_width; ++lane) {
          double sum = 0;
          for (int64_t c = 0; c < g.in_channels; ++c)
            for (int64_t r = 0; r < g.kernel_height; ++r)
              for (int64_t s = 0; s < g.kernel_width; ++s)
                sum += double(weight[((o * g.in_channels + c) * g.kernel_height + r) * g.kernel_width + s]) *
                       x.at(n, c, y * g.stride_y - g.pad_top + r * g.dilation_y,
                            lane * g.stride_x - g.pad_left + s * g.dilation_x);
          EXPECT(output[((y * g.out_channels + o) * g.batch + n) * lanes + lane] == sum);
        }
}

template <typename T> void check_pools() {
  Drawn<T> x;
  if (draw(0, 1))
    x.memory[size_t(draw(0, int64_t(x.memory.size()) - 1))] = T(std::numeric_limits<float>::quiet_NaN());
  MaxPool pool = {x.images, 0, 0, {draw(1, 3), draw(1, 3)}, {draw(1, 3), draw(1, 2)}, {}, {draw(1, 2), draw(1, 2)}, {}};
  int64_t sizes[2] = {x.images.height, x.images.width};
  for (int axis = 0; axis < 2; ++axis) {
    pool.pad[axis] = pool.kernel[axis] / 2;
    const int64_t room = sizes[axis] + 2 * pool.pad[axis] - pool.dilation[axis] * (pool.kernel[axis] - 1) - 1;
    if (room < 0)
      return;
    sizes[axis] = room / pool.stride[axis] + 1;
  }
  pool.out_height = sizes[0], pool.out_width = sizes[1];
  const Images out = {x.images.batch, x.images.channels, sizes[0], sizes[1]};
  const std::vector<T> rows = entered(x);
  std::vector<T> pooled = poisoned<T>(row_lanes_count(out)), means = poisoned<T>(x.images.batch * x.images.channels),
                 inside = poisoned<T>(x.images.batch * x.images.channels * 8);
  launch_row_max_pool(pool, type_of<T>(), rows.data(), pooled.data(), nullptr);
  launch_row_average(x.images, type_of<T>(), rows.data(), true, means.data(), nullptr);
  launch_row_average(x.images, type_of<T>(), rows.data(), false, inside.data(), nullptr);
  for (int64_t n = 0; n < out.batch; ++n)
    for (int64_t c = 0; c < out.channels; ++c) {
      double sum = 0;
      for (int64_t y = 0; y < x.images.height; ++y)
        for (int64_t lane = 0; lane < x.images.width; ++lane)
          sum += x.at(n, c, y, lane);
      const float mean = float(T(float(sum) / float(x.images.height * x.images.width)));
      const float found = float(means[n * out.channels + c]);
      EXPECT(found == mean || (found != found && mean != mean));
      const float stays = stored(inside, {out.batch, out.channels, 1, 1}, n, c, 0, 0);
      EXPECT(stays == found || stays != stays);
      for (int64_t y = 0; y < out.height; ++y)
        for (int64_t lane = 0; lane < out.width; ++lane) {
          float most = -std::numeric_limits<float>::infinity();
          for (int64_t r = 0; r < pool.kernel[0]; ++r)
            for (int64_t s = 0; s < pool.kernel[1]; ++s) {
              const int64_t in_y = y * pool.stride[0] - pool.pad[0] + r * pool.dilation[0];
              const int64_t in_x = lane * pool.stride[1] - pool.pad[1] + s * pool.dilation[1];
              if (in_y < 0 || in_x < 0 || in_y >= x.images.height || in_x >= x.images.width)
                continue;
              const float value = x.at(n, c, in_y, in_x);
              most = value > most || value != value ? value : most;
            }
          const float got = stored(pooled, out, n, c, y, lane);
          EXPECT(got == most || (got != got && most != most));
        }
    }
}

template <typename T> void check_all(int rounds) {
  for (int i = 0; i < rounds; ++i) {
    check_moves<T>();
    check_convolution<T>();
    check_pools<T>();
  }
}

} // namespace

int main(int, char **arguments) {
  const int rounds = std::atoi(arguments[1]);
  generator.seed(unsigned(std::atoi(arguments[2])));
  check_all<float>(rounds);
  check_all<__half>(rounds);
  check_all<__nv_bfloat16>(rounds);
  std::printf("%d rounds of each type\n", rounds);
}
