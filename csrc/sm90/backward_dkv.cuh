// The gradients of K and V, through the output alone: the equations of ../sm80/backward_dkv.cuh,
// which become
//
//     dV = Pᵀ dO      dK = s dSᵀ Q      dS = P∘(dO Vᵀ − delta)
#pragma once

#include "sm90/bwd_mainloop.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct BackwardDkv : BwdMainloop<Element, HeadDim, Rows, Keys, 1> {
    using K = BwdMainloop<Element, HeadDim, Rows, Keys, 1>;
    using typename K::Block, typename K::Gradient, typename K::Weights;

    static constexpr int kSharedBytes = K::kStreamBytes;
    static_assert(kSharedBytes <= kMaxSharedBytes);

    DEVICE static void run(const Params& params) {
        const typename K::Memory memory;
        K::run(params, memory, Warpgroup{{params.attention, memory}});
    }

private:
    struct Warpgroup : K::Warpgroup {
        DEVICE void operator()(int work_tile) {
            this->differentiate(work_tile, [&](Gradient& grad_k, Gradient& grad_v,
                                               const Block& block, int, int first_row) {
                Weights ds, rounded;
                this->find_sbar(ds, rounded, grad_v, block, first_row);
                warpgroup_fence_operand(ds.word);
                warpgroup_fence_operand(grad_k.value);
                wgmma_fence();
                multiply<Element>(grad_k, ds, this->q());
                wgmma_commit();
                wgmma_wait<0>();
                warpgroup_fence_operand(grad_k.value);
                warpgroup_fence_operand(grad_v.value);
                warpgroup_fence_operand(rounded.word);
                warpgroup_fence_operand(ds.word);
                this->leave_tile();
            });
        }
    };
};

}  // namespace jvp_attn::sm90
