// The module jvp_attn._cpu: AttentionParams, instruction_sets(), forward() and backward().
// jvp_attn/_cpu.pyi describes it to type checkers.
#include "common/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/map.h"

namespace py = pybind11;
using namespace jvp_attn::cpu;

namespace {

void bind_params(py::module_& module) {
    jvp_attn::bind_tensor<Tensor>(module);
    jvp_attn::bind_row_vector<RowVector>(module);
    jvp_attn::bind_mask<Mask, Element>(module, "element");
    auto params = jvp_attn::bind_common_params<AttentionParams>(module);
    params.def_readwrite("lse_lo", &AttentionParams::lse_lo)
        .def_readwrite("tmask", &AttentionParams::tmask)
        .def_readwrite("grad_mask", &AttentionParams::grad_mask)
        .def_readwrite("grad_tmask", &AttentionParams::grad_tmask)
        .def_readwrite("threads", &AttentionParams::threads);
    jvp_attn::def_enum(params, "element", &AttentionParams::element);
}

const Maps& maps_of(const std::string& instruction_set) {
    for (const Maps* maps : maps_that_run_here())
        if (instruction_set == maps->instruction_set) return *maps;
    throw std::invalid_argument("this machine does not run instruction set " + instruction_set);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Maps* maps : maps_that_run_here()) names.push_back(maps->instruction_set);
    return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "The attention maps on a CPU.";
    bind_params(module);
    module.def("instruction_sets", &instruction_sets, "Those that run here, the fastest first.");
    module.def(
        "forward",
        [](const AttentionParams& p, const std::string& set) { maps_of(set).forward(p); },
        py::arg("params"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>(),
        "Compute out and lse, and their tangents where tout is given.");
    module.def(
        "backward",
        [](const AttentionParams& p, const std::string& set) { maps_of(set).backward(p); },
        py::arg("params"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>(),
        "Compute the gradients that are given places.");
}
