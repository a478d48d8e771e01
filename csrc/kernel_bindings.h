// The Python bindings of the kernels: AttentionParams, kernels(), limits() and launch().
// jvp_attn/_C.pyi describes them to type checkers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/limits.h"
#include "kernel.h"

namespace jvp_attn {

// Python hands over addresses as integers: what `Tensor.data_ptr()` returns.
template <class Value>
Value* pointer_from(std::uintptr_t address) {
    return reinterpret_cast<Value*>(address);
}

// The classes are local to the module, since several modules with kernels may be imported.
inline void bind_params(pybind11::module_& module) {
    namespace py = pybind11;

    py::class_<Tensor>(module, "Tensor", py::module_local())
        .def(py::init([](std::uintptr_t data, int64_t batch, int64_t row, int64_t head) {
                 return Tensor{pointer_from<void>(data), batch, row, head};
             }),
             py::arg("data"), py::arg("batch_stride"), py::arg("row_stride"),
             py::arg("head_stride"));

    py::class_<RowVector>(module, "RowVector", py::module_local())
        .def(py::init([](std::uintptr_t data, int64_t batch, int64_t head) {
                 return RowVector{pointer_from<float>(data), batch, head};
             }),
             py::arg("data"), py::arg("batch_stride"), py::arg("head_stride"));

    py::class_<Mask>(module, "Mask", py::module_local())
        .def(py::init([](std::uintptr_t data, int64_t batch, int64_t head, int64_t row,
                         int64_t column, int kind) {
                 return Mask{pointer_from<void>(data),   batch, head, row, column,
                             static_cast<MaskKind>(kind)};
             }),
             py::arg("data"), py::arg("batch_stride"), py::arg("head_stride"),
             py::arg("row_stride"), py::arg("column_stride"), py::arg("kind"));

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
    JVP_ATTN_FIELD(lse);
    JVP_ATTN_FIELD(mu);
    JVP_ATTN_FIELD(grad_out);
    JVP_ATTN_FIELD(grad_tout);
    JVP_ATTN_FIELD(grad_lse);
    JVP_ATTN_FIELD(grad_mu);
    JVP_ATTN_FIELD(beta);
    JVP_ATTN_FIELD(delta);
    JVP_ATTN_FIELD(grad_q);
    JVP_ATTN_FIELD(grad_k);
    JVP_ATTN_FIELD(grad_v);
    JVP_ATTN_FIELD(grad_tq);
    JVP_ATTN_FIELD(grad_tk);
    JVP_ATTN_FIELD(grad_tv);
    JVP_ATTN_FIELD(dq_accum);
    JVP_ATTN_FIELD(ds_row_sums);
    JVP_ATTN_FIELD(mask);
    JVP_ATTN_FIELD(batch);
    JVP_ATTN_FIELD(heads);
    JVP_ATTN_FIELD(heads_k);
    JVP_ATTN_FIELD(seqlen_q);
    JVP_ATTN_FIELD(seqlen_k);
    JVP_ATTN_FIELD(total_q);
    JVP_ATTN_FIELD(total_k);
    JVP_ATTN_FIELD(head_dim);
    JVP_ATTN_FIELD(head_dim_v);
    JVP_ATTN_FIELD(softmax_scale);
#undef JVP_ATTN_FIELD

#define JVP_ATTN_LENGTHS(NAME)                                                                    \
    params.def_property(                                                                          \
        #NAME, [](const AttentionParams& p) { return reinterpret_cast<std::uintptr_t>(p.NAME); }, \
        [](AttentionParams& p, std::uintptr_t address) {                                          \
            p.NAME = pointer_from<const int32_t>(address);                                        \
        })
    JVP_ATTN_LENGTHS(cu_seqlens_q);
    JVP_ATTN_LENGTHS(cu_seqlens_k);
    JVP_ATTN_LENGTHS(seqused_k);
#undef JVP_ATTN_LENGTHS

    params.def_property(
        "causal", [](const AttentionParams& p) { return static_cast<int>(p.causal); },
        [](AttentionParams& p, int causal) { p.causal = static_cast<Causal>(causal); });
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
