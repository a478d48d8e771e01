// Queries the CUDA runtime for devices; a failure is returned as a message.
#include "device_info.h"

#include <cuda_runtime.h>

namespace jvp_attn {
namespace {

cudaError_t describe(int ordinal, Device& device) {
    cudaDeviceProp properties;
    if (cudaError_t status = cudaGetDeviceProperties(&properties, ordinal); status != cudaSuccess)
        return status;
    device.name = properties.name;
    device.capability_major = properties.major;
    device.capability_minor = properties.minor;
    device.multiprocessors = properties.multiProcessorCount;
    device.memory = properties.totalGlobalMem;
    device.shared_memory_per_block = properties.sharedMemPerBlockOptin;
    return cudaSuccess;
}

cudaError_t describe_all(DeviceQuery& query) {
    int count = 0;
    if (cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess) return status;
    for (int ordinal = 0; ordinal < count; ++ordinal) {
        Device device;
        if (cudaError_t status = describe(ordinal, device); status != cudaSuccess) return status;
        query.devices.push_back(device);
    }
    return cudaSuccess;
}

}  // namespace

DeviceQuery query_devices() noexcept {
    DeviceQuery query;
    cudaRuntimeGetVersion(&query.runtime_version);
    cudaDriverGetVersion(&query.driver_version);
    // Without a driver CUDA reports that the driver is too old.
    if (query.driver_version == 0) {
        query.error = "no CUDA driver is installed";
        return query;
    }
    if (cudaError_t status = describe_all(query); status != cudaSuccess) {
        cudaGetLastError();  // clear the error, or the next caller would see it again
        query.devices.clear();
        query.error = cudaGetErrorString(status);
    }
    return query;
}

std::string select_device(int ordinal) noexcept {
    const cudaError_t status = cudaSetDevice(ordinal);
    if (status == cudaSuccess) return "";
    cudaGetLastError();
    return cudaGetErrorString(status);
}

}  // namespace jvp_attn
