// The maps for the instruction set that this is compiled for: included once by each isa_*.cpp.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/shared_headers.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// About as many floating point operations as a map has matrix products of these.
inline double operations(const AttentionParams& p, int products) {
    double scores = 0;
    for (int batch = 0; batch < p.batch; ++batch) {
        const Sequence sequence(p, batch);
        scores += double(sequence.queries) * sequence.keys;
    }
    return scores * p.heads * products * (p.head_dim + p.head_dim_v);
}

// A call of `as(type)` with the type to compute in.
template <class Call>
void in_computing_type(const AttentionParams& p, Call as) {
    if (p.element == Element::float64)
        as(std::type_identity<double>());
    else
        as(std::type_identity<float>());
}

template <class Worker, class Tasks>
void run(Tasks tasks, int threads) {
    run_in_threads<Worker>(tasks, tasks.count(), threads);
}

inline void forward(const AttentionParams& p) {
    const int threads = threads_worth_waking(operations(p, p.tout.data ? 6 : 2), p.threads);
    in_computing_type(p, [&]<class Value>(std::type_identity<Value>) {
        run<Forward<Value>>(ForwardTasks<Value>(p, threads), threads);
    });
}

inline void backward(const AttentionParams& p) {
    const int threads = threads_worth_waking(operations(p, p.tout.data ? 15 : 5), p.threads);
    in_computing_type(p, [&]<class Value>(std::type_identity<Value>) {
        Shared<Value> shared(p);
        run<Preparation<Value>>(typename Preparation<Value>::Tasks(shared), threads);
        run<Backward<Value>>(typename Backward<Value>::Tasks(shared), threads);
    });
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
