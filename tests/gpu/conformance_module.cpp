// The kernels of the conformance test on a GPU, as the Python module `conformance_gpu`.
#include "kernel_bindings.h"

PYBIND11_MODULE(conformance_gpu, module) { jvp_attn::bind_kernels(module); }
