// Just enough of CUDA's names to run kernels on a CPU: a launch runs one block after the other, a thread for each of
// its threads; warps meet in shuffles.
#pragma once

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __CUDACC__
#define __CUDA_ARCH__ 800
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute *attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) { return *value = 8, cudaSuccess; }

struct Warp {
  std::barrier<> meeting{32};
  float exchanged[32];
};

inline thread_local dim3 threadIdx, blockIdx;
inline thread_local Warp *own_warp;

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  const unsigned lane = threadIdx.x % 32;
  own_warp->exchanged[lane] = value;
  own_warp->meeting.arrive_and_wait();
  const float other = own_warp->exchanged[lane ^ lanes];
  own_warp->meeting.arrive_and_wait();
  return other;
}

inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const unsigned threads = config->blockDim.x;
  std::vector<std::unique_ptr<Warp>> warps;
  for (unsigned i = 0; i < threads / 32; ++i)
    warps.push_back(std::make_unique<Warp>());
  std::vector<std::thread> running;
  for (unsigned t = 0; t < threads; ++t)
    running.emplace_back([&, t] {
      own_warp = warps[t / 32].get();
      threadIdx = dim3(t, 0, 0);
      for (unsigned block = 0; block < config->gridDim.x; ++block) {
        blockIdx = dim3(block, 0, 0);
        kernel(arguments...);
      }
      own_warp->meeting.arrive_and_drop();
    });
  for (std::thread &thread : running)
    thread.join();
  return cudaSuccess;
}
