// The toolkit's own 16-bit and 8-bit types on top of the emulator.
#include "check.h"
#include "cuda/device.cuh"
// clang-format off
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
// clang-format on

namespace {

__global__ void convert(const float* in, __nv_bfloat16* bf16, __half* fp16, __nv_fp8_e4m3* fp8) {
  bf16[threadIdx.x] = __float2bfloat16(in[threadIdx.x]);
  fp16[threadIdx.x] = __float2half(in[threadIdx.x]);
  fp8[threadIdx.x] = __nv_fp8_e4m3(in[threadIdx.x]);
}

}  // namespace

int main() {
  const float in[4] = {1.0f, 1.0f + 0x1p-9f, -3.5f, 100.0f};
  __nv_bfloat16 bf16[4];
  __half fp16[4];
  __nv_fp8_e4m3 fp8[4];
  BRAZE_LAUNCH(convert, 1, 4, 0, nullptr, in, bf16, fp16, fp8);
  CHECK(__bfloat162float(bf16[0]) == 1 && __bfloat162float(bf16[1]) == 1);
  CHECK(__bfloat162float(bf16[2]) == -3.5f && __half2float(fp16[1]) == in[1]);
  CHECK(__half2float(fp16[3]) == 100 && static_cast<float>(fp8[2]) == -3.5f);
  CHECK(sizeof(uint4) == 16);
  return finish();
}
