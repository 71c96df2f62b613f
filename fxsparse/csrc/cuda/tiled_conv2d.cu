// Chooses among the kernels for batch-innermost images.
#include "tiled_conv2d.h"
#include "tiled_kernels.h"

#include <climits>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fxsparse::cuda {
namespace {

struct Device {
  int major = 0, minor = 0, multiprocessors = 0;
};

cudaError_t current_device(Device &found) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&found.minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return status;
}

bool is_wgmma(TiledKernel kernel) {
  return kernel == TiledKernel::kWgmma64 || kernel == TiledKernel::kWgmma128 || kernel == TiledKernel::kWgmma64Half ||
         kernel == TiledKernel::kWgmma128Half;
}

bool is_float(TiledKernel kernel) {
  return kernel == TiledKernel::kFloat64 || kernel == TiledKernel::kFloat128 || kernel == TiledKernel::kFloat256;
}

int64_t units_of(int64_t height, int64_t width, int64_t channels, int64_t units) {
  const __int128 count = static_cast<__int128>(height) * width * channels * units;
  return count > INT_MAX ? INT64_MAX : static_cast<int64_t>(count);
}

bool runs_wgmma(const TiledConv &conv, const Device &device) {
  return conv.type != TiledType::kFloat && conv.kernel != TiledKernel::kPortable && device.major == 9;
}

template <typename T>
cudaError_t launch_half(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                        const Device &device, cudaStream_t stream) {
  if (runs_wgmma(conv, device))
    return launch_tiled_wgmma<T>(conv, weight, tensors, device.multiprocessors, stream);
  return launch_tiled_mma<T>(conv, weight, tensors, stream);
}

} // namespace

const char *tiled_conv2d_refusal(const TiledConv &conv, int64_t tile_rows) {
  const Conv2dGeometry &g = conv.geometry;
  const int64_t units = padded_batch(g.batch) / (conv.type == TiledType::kFloat ? 4 : 8);
  if (g.padding_mode != PaddingMode::kZeros)
    return "the padding is not with zeros";
  if (g.kernel_height > kMaxKernel || g.kernel_width > kMaxKernel)
    return "the kernel has more than 15 rows or columns";
  if (g.in_channels > kMaxChannels)
    return "the input has more than 2^23 channels";
  if (tile_rows != 64 && tile_rows != 128)
    return "the weight's tiles have neither 64 nor 128 rows";
  if (units_of(g.in_height, g.in_width, g.in_channels, units) == INT64_MAX ||
      units_of(g.out_height, g.out_width, g.out_channels, units) == INT64_MAX)
    return "the input or the output has more than 2^31 times 16 bytes";
  Device device;
  if (current_device(device) != cudaSuccess || device.major < 8)
    return "the device has a compute capability below 8.0";
  if (is_wgmma(conv.kernel) && (device.major != 9 || conv.type == TiledType::kFloat))
    return "the kernel is for 16-bit types on compute capability 9.0";
  if (is_float(conv.kernel) && conv.type != TiledType::kFloat)
    return "the kernel is for float32";
  return nullptr;
}

bool can_pool_tiled_conv2d(const TiledConv &conv) {
  Device device;
  return current_device(device) == cudaSuccess && runs_wgmma(conv, device);
}

cudaError_t launch_tiled_conv2d(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                                cudaStream_t stream) {
  const Conv2dGeometry &g = conv.geometry;
  if (g.batch == 0 || g.out_height == 0 || g.out_width == 0 || weight.tile_count == 0)
    return cudaSuccess;
  Device device;
  const cudaError_t status = current_device(device);
  if (status != cudaSuccess)
    return status;
  if (weight.tile_count > INT_MAX / weight.tile_rows ||
      (conv.pools && (!runs_wgmma(conv, device) || tensors.add != nullptr)))
    return cudaErrorInvalidValue;
  switch (conv.type) {
  case TiledType::kBFloat16:
    return launch_half<__nv_bfloat16>(conv, weight, tensors, device, stream);
  case TiledType::kHalf:
    return launch_half<__half>(conv, weight, tensors, device, stream);
  case TiledType::kFloat:
    return launch_tiled_float(conv, weight, tensors, device.multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

} // namespace fxsparse::cuda
