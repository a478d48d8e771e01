// Python bindings of the parameter structs of csrc/params.h and csrc/cpu/params.h, which have most
// fields in common. The classes are local to their module: a process may import several of these.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <type_traits>

namespace jvp_attn {

// Python passes addresses as integers, as `Tensor.data_ptr()` returns them.
template <class Value>
Value* pointer_from(std::uintptr_t address) {
    return reinterpret_cast<Value*>(address);
}

template <class Params>
using ParamsClass = pybind11::class_<Params>;

// A field that holds an array on the same device as the tensors: an address for Python.
template <class Params>
void def_address(ParamsClass<Params>& params, const char* name, const int32_t* Params::* field) {
    params.def_property(
        name, [field](const Params& p) { return reinterpret_cast<std::uintptr_t>(p.*field); },
        [field](Params& p, std::uintptr_t address) {
            p.*field = pointer_from<const int32_t>(address);
        });
}

// A field that holds an enumerator: an integer for Python.
template <class Params, class Enum>
void def_enum(ParamsClass<Params>& params, const char* name, Enum Params::* field) {
    params.def_property(
        name, [field](const Params& p) { return static_cast<int>(p.*field); },
        [field](Params& p, int value) { p.*field = static_cast<Enum>(value); });
}

template <class Tensor>
void bind_tensor(pybind11::module_& module) {
    namespace py = pybind11;
    py::class_<Tensor>(module, "Tensor", py::module_local())
        .def(py::init([](std::uintptr_t data, int64_t batch, int64_t row, int64_t head) {
                 return Tensor{pointer_from<void>(data), batch, row, head};
             }),
             py::arg("data"), py::arg("batch_stride"), py::arg("row_stride"),
             py::arg("head_stride"));
}

template <class RowVector>
void bind_row_vector(pybind11::module_& module) {
    namespace py = pybind11;
    using Value = std::remove_pointer_t<decltype(RowVector::data)>;
    py::class_<RowVector>(module, "RowVector", py::module_local())
        .def(py::init([](std::uintptr_t data, int64_t batch, int64_t head) {
                 return RowVector{pointer_from<Value>(data), batch, head};
             }),
             py::arg("data"), py::arg("batch_stride"), py::arg("head_stride"));
}

// `type` names the enumerator that says what a mask consists of.
template <class Mask, class Type>
void bind_mask(pybind11::module_& module, const char* type) {
    namespace py = pybind11;
    py::class_<Mask>(module, "Mask", py::module_local())
        .def(py::init([](std::uintptr_t data, int64_t batch, int64_t head, int64_t row,
                         int64_t column, int value, int32_t size, int32_t group) {
                 const auto kind = static_cast<Type>(value);
                 return Mask{pointer_from<void>(data), batch, head, row, column, kind, size, group};
             }),
             py::arg("data"), py::arg("batch_stride"), py::arg("head_stride"),
             py::arg("row_stride"), py::arg("column_stride"), py::arg(type),
             py::arg("batch_size") = Mask().batch_size, py::arg("batch_group") = 1);
}

// AttentionParams with the fields that kernels for every device have.
template <class Params>
ParamsClass<Params> bind_common_params(pybind11::module_& module) {
    ParamsClass<Params> params(module, "AttentionParams", pybind11::module_local());
    params.def(pybind11::init<>())
        .def_readwrite("q", &Params::q)
        .def_readwrite("k", &Params::k)
        .def_readwrite("v", &Params::v)
        .def_readwrite("tq", &Params::tq)
        .def_readwrite("tk", &Params::tk)
        .def_readwrite("tv", &Params::tv)
        .def_readwrite("out", &Params::out)
        .def_readwrite("tout", &Params::tout)
        .def_readwrite("out_lo", &Params::out_lo)
        .def_readwrite("tout_lo", &Params::tout_lo)
        .def_readwrite("lse", &Params::lse)
        .def_readwrite("mu", &Params::mu)
        .def_readwrite("lse_lo", &Params::lse_lo)
        .def_readwrite("grad_out", &Params::grad_out)
        .def_readwrite("grad_tout", &Params::grad_tout)
        .def_readwrite("grad_lse", &Params::grad_lse)
        .def_readwrite("grad_mu", &Params::grad_mu)
        .def_readwrite("grad_q", &Params::grad_q)
        .def_readwrite("grad_k", &Params::grad_k)
        .def_readwrite("grad_v", &Params::grad_v)
        .def_readwrite("grad_tq", &Params::grad_tq)
        .def_readwrite("grad_tk", &Params::grad_tk)
        .def_readwrite("grad_tv", &Params::grad_tv)
        .def_readwrite("mask", &Params::mask)
        .def_readwrite("batch", &Params::batch)
        .def_readwrite("heads", &Params::heads)
        .def_readwrite("heads_k", &Params::heads_k)
        .def_readwrite("seqlen_q", &Params::seqlen_q)
        .def_readwrite("seqlen_k", &Params::seqlen_k)
        .def_readwrite("head_dim", &Params::head_dim)
        .def_readwrite("head_dim_v", &Params::head_dim_v)
        .def_readwrite("softmax_scale", &Params::softmax_scale);
    def_address(params, "cu_seqlens_q", &Params::cu_seqlens_q);
    def_address(params, "cu_seqlens_k", &Params::cu_seqlens_k);
    def_address(params, "seqused_k", &Params::seqused_k);
    def_enum(params, "causal", &Params::causal);
    return params;
}

}  // namespace jvp_attn
