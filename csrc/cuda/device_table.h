// A table in device memory that follows a host image: uploads what changed, in stream order,
// without waiting.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <vector>

namespace braze::cuda {

class DeviceTable {
 public:
  DeviceTable() = default;
  ~DeviceTable();
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;

  // The image to fill for the next upload: `bytes` long, with the last upload's content as far as
  // that reached.
  char* image(size_t bytes);

  // Makes device memory equal to the image for work that follows on `stream`.
  cudaError_t upload(cudaStream_t stream);

  // Later uploads on other streams wait for the work on `stream` so far, which reads the table.
  // That holds after an error too, at the price of waiting here.
  cudaError_t mark_read(cudaStream_t stream);

  const char* device() const { return device_; }
  size_t bytes_uploaded() const { return bytes_uploaded_; }  // by the last upload

 private:
  // Page-locked staging memory. It is used again only after its copy is through.
  struct Staging {
    char* host = nullptr;
    size_t capacity = 0;
    cudaEvent_t copied = nullptr;
  };
  cudaError_t grow(size_t bytes);
  cudaError_t take_staging(size_t bytes, Staging*& result);

  std::vector<char> image_, uploaded_;  // the latter: what device memory holds
  std::vector<Staging> staging_;
  size_t next_staging_ = 0;
  char* device_ = nullptr;
  size_t capacity_ = 0, bytes_uploaded_ = 0;
  cudaEvent_t used_ = nullptr;  // the last copy or reader, on last_stream_
  cudaStream_t last_stream_ = nullptr;
  bool in_use_ = false;
};

}  // namespace braze::cuda
