// The Python module with the kernels of a conformance test, for a GPU.
#include "kernel_bindings.h"

PYBIND11_MODULE(JVP_ATTN_MODULE, module) { jvp_attn::bind_kernels(module); }
