// The Python module of the emulator, with the kernels that it is linked with; see emulator.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "kernel_bindings.h"
#include "machine.h"

namespace {

using BufferTuple = std::tuple<std::string, std::uintptr_t, std::size_t, bool>;

void set_buffers(const std::vector<BufferTuple>& tuples) {
    std::vector<jvp_attn::emulator::Buffer> buffers;
    for (const auto& [name, address, bytes, writable] : tuples)
        buffers.push_back({name, address, bytes, writable});
    jvp_attn::emulator::machine.global.set_buffers(std::move(buffers));
}

void set_seed(uint64_t seed) { jvp_attn::emulator::machine.set_seed(seed); }

void set_capability(int major, int minor) {
    jvp_attn::emulator::machine.set_capability(10 * major + minor);
}

}  // namespace

PYBIND11_MODULE(JVP_ATTN_MODULE, module) {
    namespace py = pybind11;
    jvp_attn::bind_kernels(module);
    module.def("set_seed", &set_seed, py::arg("seed"),
               "Determine the order of blocks and threads in the next launches.");
    module.def("set_capability", &set_capability, py::arg("major"), py::arg("minor"),
               "Set the compute capability that the host sees, 9.0 by default.");
    module.def("set_buffers", &set_buffers, py::arg("buffers"),
               "Set the memory that the next launches may access, as (name, address, bytes, "
               "writable); if empty, all of it.");
}
