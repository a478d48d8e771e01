// The module jvp_attn._cpu: AttentionParams, instruction_sets(), forward() and backward().
// jvp_attn/_cpu.pyi describes it to type checkers.
#include "common/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace jvp_attn::cpu;

namespace {

void bind_params(py::module_& module) {
    jvp_attn::bind_tensor<Tensor>(module);
    jvp_attn::bind_row_vector<RowVector>(module);
    jvp_attn::bind_mask<Mask, Element>(module, "element");
    auto params = jvp_attn::bind_common_params<AttentionParams>(module);
    params.def_readwrite("tmask", &AttentionParams::tmask)
        .def_readwrite("grad_mask", &AttentionParams::grad_mask)
        .def_readwrite("grad_tmask", &AttentionParams::grad_tmask)
        .def_readwrite("threads", &AttentionParams::threads);
    jvp_attn::def_enum(params, "element", &AttentionParams::element);
}

const Kernels& kernels_of(const std::string& instruction_set) {
    for (const Kernels* kernels : supported_kernels())
        if (instruction_set == kernels->instruction_set) return *kernels;
    throw std::invalid_argument("this machine does not run instruction set " + instruction_set);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported_kernels()) names.push_back(kernels->instruction_set);
    return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() =
        "The attention kernels for CPUs. They take raw pointers and do not depend on torch.";
    bind_params(module);
    module.def("instruction_sets", &instruction_sets,
               "The instruction sets that this machine has, the fastest first.");
    module.def(
        "forward",
        [](const AttentionParams& p, const std::string& set) { kernels_of(set).forward(p); },
        py::arg("params"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>(),
        "Compute out and lse; with tout, their tangents as well.");
    module.def(
        "backward",
        [](const AttentionParams& p, const std::string& set) { kernels_of(set).backward(p); },
        py::arg("params"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>(),
        "Compute the gradients whose tensors are present.");
}
