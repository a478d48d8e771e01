// The CUDA devices of this machine as plain data: a caller needs no CUDA header and catches no
// exception.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace jvp_attn {

struct Device {
    std::string name;
    int capability_major;
    int capability_minor;
    int multiprocessors;
    std::size_t memory;                   // bytes
    std::size_t shared_memory_per_block;  // bytes, what a kernel may ask for at most (opt-in)
};

struct DeviceQuery {
    std::vector<Device> devices;
    int driver_version = 0;   // 13000 is CUDA 13.0, the newest that the driver runs; 0: no driver
    int runtime_version = 0;  // of the CUDA runtime inside this extension
    std::string error;        // why there are no devices; empty where there are
};

// Creates no CUDA context: it costs no device memory.
DeviceQuery query_devices() noexcept;

// Makes a device the current one of this thread. Returns an error, empty if none.
std::string select_device(int ordinal) noexcept;

}  // namespace jvp_attn
