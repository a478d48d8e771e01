// The module jvp_attn._cpu: AttentionParams, instruction_sets(), forward() and backward().
// jvp_attn/_cpu.pyi describes it to type checkers.
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

// Python hands over addresses as integers: what `Tensor.data_ptr()` returns.
template <class Value>
Value* pointer_from(std::uintptr_t address) {
    return reinterpret_cast<Value*>(address);
}

void bind_params(py::module_& module) {
    py::class_<Tensor>(module, "Tensor", py::module_local())
        .def(py::init([](std::uintptr_t data, int64_t batch, int64_t row, int64_t head) {
                 return Tensor{pointer_from<void>(data), batch, row, head};
             }),
             py::arg("data"), py::arg("batch_stride"), py::arg("row_stride"),
             py::arg("head_stride"));

    py::class_<RowVector>(module, "RowVector", py::module_local())
        .def(py::init([](std::uintptr_t data, int64_t batch, int64_t head) {
                 return RowVector{pointer_from<void>(data), batch, head};
             }),
             py::arg("data"), py::arg("batch_stride"), py::arg("head_stride"));

    py::class_<Mask>(module, "Mask", py::module_local())
        .def(py::init([](std::uintptr_t data, int64_t batch, int64_t head, int64_t row,
                         int64_t column, int element) {
                 return Mask{pointer_from<void>(data),     batch, head, row, column,
                             static_cast<Element>(element)};
             }),
             py::arg("data"), py::arg("batch_stride"), py::arg("head_stride"),
             py::arg("row_stride"), py::arg("column_stride"), py::arg("element"));

    py::class_<AttentionParams> params(module, "AttentionParams", py::module_local());
    params.def(py::init<>());

#define JVP_ATTN_FIELD(NAME) params.def_readwrite(#NAME, &AttentionParams::NAME)
    JVP_ATTN_FIELD(q);
    JVP_ATTN_FIELD(k);
    JVP_ATTN_FIELD(v);
    JVP_ATTN_FIELD(tq);
    JVP_ATTN_FIELD(tk);
    JVP_ATTN_FIELD(tv);
    JVP_ATTN_FIELD(out);
    JVP_ATTN_FIELD(tout);
    JVP_ATTN_FIELD(out_lo);
    JVP_ATTN_FIELD(tout_lo);
    JVP_ATTN_FIELD(lse_lo);
    JVP_ATTN_FIELD(lse);
    JVP_ATTN_FIELD(mu);
    JVP_ATTN_FIELD(grad_out);
    JVP_ATTN_FIELD(grad_tout);
    JVP_ATTN_FIELD(grad_lse);
    JVP_ATTN_FIELD(grad_mu);
    JVP_ATTN_FIELD(grad_q);
    JVP_ATTN_FIELD(grad_k);
    JVP_ATTN_FIELD(grad_v);
    JVP_ATTN_FIELD(grad_tq);
    JVP_ATTN_FIELD(grad_tk);
    JVP_ATTN_FIELD(grad_tv);
    JVP_ATTN_FIELD(mask);
    JVP_ATTN_FIELD(tmask);
    JVP_ATTN_FIELD(grad_mask);
    JVP_ATTN_FIELD(grad_tmask);
    JVP_ATTN_FIELD(batch);
    JVP_ATTN_FIELD(heads);
    JVP_ATTN_FIELD(heads_k);
    JVP_ATTN_FIELD(seqlen_q);
    JVP_ATTN_FIELD(seqlen_k);
    JVP_ATTN_FIELD(head_dim);
    JVP_ATTN_FIELD(head_dim_v);
    JVP_ATTN_FIELD(softmax_scale);
    JVP_ATTN_FIELD(threads);
#undef JVP_ATTN_FIELD

    const auto write_only = [&](const char* name, auto set) {
        params.def_property(name, nullptr, set);
    };
    write_only("cu_seqlens_q", [](AttentionParams& p, std::uintptr_t address) {
        p.cu_seqlens_q = pointer_from<const int32_t>(address);
    });
    write_only("cu_seqlens_k", [](AttentionParams& p, std::uintptr_t address) {
        p.cu_seqlens_k = pointer_from<const int32_t>(address);
    });
    write_only("seqused_k", [](AttentionParams& p, std::uintptr_t address) {
        p.seqused_k = pointer_from<const int32_t>(address);
    });
    write_only("causal",
               [](AttentionParams& p, int causal) { p.causal = static_cast<Causal>(causal); });
    write_only("element",
               [](AttentionParams& p, int element) { p.element = static_cast<Element>(element); });
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
