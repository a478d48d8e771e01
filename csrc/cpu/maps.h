// The maps for the instruction set that this is compiled for: included once by each isa_*.cpp.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/shared_headers.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

template <template <class> class Work>
void run(const AttentionParams& p) {
    const auto run_as = [&]<class Value>(std::type_identity<Value>) {
        run_in_threads<Work<Value>>(p, Work<Value>::count(p), p.threads);
    };
    if (p.element == Element::float64)
        run_as(std::type_identity<double>());
    else
        run_as(std::type_identity<float>());
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
