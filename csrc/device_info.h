// The CUDA devices of this machine as plain data, without CUDA headers or exceptions.
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
    std::size_t shared_memory_per_block;  // bytes, the most that a kernel may request (opt-in)
};

struct DeviceQuery {
    std::vector<Device> devices;
    int driver_version = 0;   // the newest CUDA that the driver runs: 13000 is 13.0; 0: no driver
    int runtime_version = 0;  // of the CUDA runtime linked into this extension
    std::string error;        // why no device was found; empty if one was
};

// Creates no CUDA context, so it uses no device memory.
DeviceQuery query_devices() noexcept;

// Makes a device the current one of this thread. Returns an error, empty if none.
std::string select_device(int ordinal) noexcept;

}  // namespace jvp_attn
