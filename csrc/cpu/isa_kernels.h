// The kernels for the instruction set that this is compiled for: each isa_*.cpp includes it once.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/isa_independent.h"
#include "cpu/preprocess.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// Roughly the floating point operations of a kernel with `products` matrix products per head.
inline double operations(const AttentionParams& p, int products) {
    double scores = 0;
    for (int batch = 0; batch < p.batch; ++batch) {
        const SeqlenInfo seqlen(p, batch);
        scores += double(seqlen.queries) * seqlen.keys;
    }
    return scores * p.heads * products * (p.head_dim + p.head_dim_v);
}

// Calls `function(type)` with the type to accumulate in.
template <class Function>
void with_accumulation_type(const AttentionParams& p, Function function) {
    if (p.element == Element::float64)
        function(std::type_identity<double>());
    else
        function(std::type_identity<float>());
}

template <class Worker, class Tasks>
void run(Tasks tasks, int threads) {
    run_in_threads<Worker>(tasks, tasks.count(), threads);
}

inline void forward(const AttentionParams& p) {
    const int threads = useful_threads(operations(p, p.tout.data ? 6 : 2), p.threads);
    with_accumulation_type(p, [&]<class Value>(std::type_identity<Value>) {
        run<Forward<Value>>(ForwardTasks<Value>(p, threads), threads);
    });
}

inline void backward(const AttentionParams& p) {
    const int threads = useful_threads(operations(p, p.tout.data ? 15 : 5), p.threads);
    with_accumulation_type(p, [&]<class Value>(std::type_identity<Value>) {
        BackwardWorkspace<Value> workspace(p);
        run<Preprocess<Value>>(typename Preprocess<Value>::Tasks(workspace), threads);
        run<Backward<Value>>(typename Backward<Value>::Tasks(workspace), threads);
    });
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
