// The Python bindings of the kernels: AttentionParams, kernels(), limits() and launch().
// jvp_attn/_C.pyi describes them to type checkers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/bindings.h"
#include "common/limits.h"
#include "kernel.h"

namespace jvp_attn {

inline void bind_params(pybind11::module_& module) {
    bind_tensor<Tensor>(module);
    bind_row_vector<RowVector>(module);
    bind_mask<Mask, MaskKind>(module, "kind");
    bind_common_params<AttentionParams>(module)
        .def_readwrite("beta", &AttentionParams::beta)
        .def_readwrite("delta", &AttentionParams::delta)
        .def_readwrite("dq_accum", &AttentionParams::dq_accum)
        .def_readwrite("ds_row_sums", &AttentionParams::ds_row_sums)
        .def_readwrite("total_q", &AttentionParams::total_q)
        .def_readwrite("total_k", &AttentionParams::total_k);
}

inline const Kernel& kernel_named(const std::string& name) {
    for (const Kernel& kernel : all_kernels())
        if (name == kernel.name) return kernel;
    throw std::invalid_argument("this build has no kernel " + name);
}

inline pybind11::dict kernels() {
    pybind11::dict list;
    for (const Kernel& kernel : all_kernels()) {
        pybind11::dict entry;
        entry["threads"] = kernel.threads;
        entry["shared_bytes"] = kernel.shared_bytes;
        list[kernel.name] = entry;
    }
    return list;
}

inline pybind11::dict limits() {
    pybind11::dict result;
    result["tma_alignment_bytes"] = kTmaAlignmentBytes;
    result["tma_alignment_elements"] = kTmaAlignmentElements;
    result["dq_accum_row_multiple"] = kDqAccumRowMultiple;
    return result;
}

inline void launch_named(const std::string& name, const AttentionParams& params,
                         std::uintptr_t stream) {
    const std::string error = kernel_named(name).launch(params, pointer_from<void>(stream));
    if (!error.empty()) throw std::runtime_error("kernel " + name + ": " + error);
}

inline void bind_kernels(pybind11::module_& module) {
    namespace py = pybind11;
    bind_params(module);
    module.def("kernels", &kernels, "The kernels of this build by name: their threads and memory.");
    module.def("limits", &limits, "What the kernels require of addresses, strides and sizes.");
    module.def("launch", &launch_named, py::arg("name"), py::arg("params"), py::arg("stream"),
               "Enqueue a kernel on a CUDA stream of the current device.");
}

}  // namespace jvp_attn
