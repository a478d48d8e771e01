// The kernels of a conformance test on a GPU, as a Python module: pybind11 knows modules by name.
#include "kernel_bindings.h"

PYBIND11_MODULE(JVP_ATTN_MODULE, module) { jvp_attn::bind_kernels(module); }
