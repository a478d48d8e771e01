// The Python module jvp_attn._C. jvp_attn/_C.pyi describes it to type checkers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "device_info.h"
#include "kernel_bindings.h"

// setup.py defines JVP_ATTN_ARCHS, JVP_ATTN_NVCC_VERSION and JVP_ATTN_GIT_HASH for .cpp files only,
// so that a new commit does not recompile the kernels.

namespace py = pybind11;

namespace {

std::vector<std::string> split_words(const std::string& text) {
    std::istringstream stream(text);
    std::vector<std::string> words;
    for (std::string word; stream >> word;) words.push_back(word);
    return words;
}

std::string compiler() {
#ifdef __clang__
    return __VERSION__;  // names itself: "Clang 18.1.3"
#else
    return std::string("GCC ") + __VERSION__;
#endif
}

py::dict build_info() {
    py::dict info;
    info["archs"] = split_words(JVP_ATTN_ARCHS);
    info["nvcc"] = JVP_ATTN_NVCC_VERSION;
    info["compiler"] = compiler();
    info["git_hash"] = JVP_ATTN_GIT_HASH;
    return info;
}

// 13020 is how CUDA writes 13.2, and 0 stands for none.
py::object version_text(int version) {
    if (version == 0) return py::none();
    return py::str(std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10));
}

py::list devices() {
    py::list list;
    for (const jvp_attn::Device& device : jvp_attn::query_devices().devices) {
        py::dict entry;
        entry["name"] = device.name;
        entry["capability"] = py::make_tuple(device.capability_major, device.capability_minor);
        entry["multiprocessors"] = device.multiprocessors;
        entry["memory"] = device.memory;
        entry["shared_memory_per_block"] = device.shared_memory_per_block;
        list.append(entry);
    }
    return list;
}

py::object device_error() {
    const std::string error = jvp_attn::query_devices().error;
    if (error.empty()) return py::none();
    return py::str(error);
}

void select_device(int ordinal) {
    const std::string error = jvp_attn::select_device(ordinal);
    if (error.empty()) return;
    throw std::runtime_error("CUDA device " + std::to_string(ordinal) + ": " + error);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The CUDA side of jvp_attn: takes raw pointers, knows nothing of torch.";
    module.def("build_info", &build_info, "What this extension was built from, and with what.");
    module.def("devices", &devices, "The CUDA devices, none where device_error() says why.");
    module.def("device_error", &device_error, "Why there are no devices, or None.");
    module.def(
        "driver_version", [] { return version_text(jvp_attn::query_devices().driver_version); },
        "The newest CUDA that the installed driver runs, or None without a driver.");
    module.def(
        "runtime_version", [] { return version_text(jvp_attn::query_devices().runtime_version); },
        "The CUDA runtime inside this extension.");
    module.def("select_device", &select_device, py::arg("ordinal"),
               "Make a device the current one of this thread.");
    jvp_attn::bind_kernels(module);
}
