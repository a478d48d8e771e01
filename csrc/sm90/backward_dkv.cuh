// The gradients of K and V, through the output alone: the equations of ../sm80/backward_dkv.cuh,
// which become
//
//     gV = Pᵀ gO      gK = s Sbarᵀ Q      Sbar = P∘(gO Vᵀ − delta)
#pragma once

#include "sm90/key_gradients.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct BackwardDkv : KeyGradients<Element, HeadDim, Rows, Keys, 1> {
    using K = KeyGradients<Element, HeadDim, Rows, Keys, 1>;
    using typename K::Block, typename K::Gradient, typename K::Weights;

    static constexpr int kSharedBytes = K::kStreamBytes;
    static_assert(kSharedBytes <= kMaxSharedBytes);

    DEVICE static void run(const Params& params) {
        const typename K::Memory memory;
        K::run(params, memory, Warpgroup{{params.attention, memory}});
    }

private:
    struct Warpgroup : K::Warpgroup {
        DEVICE void operator()(int piece) {
            this->differentiate(piece, [&](Gradient& grad_k, Gradient& grad_v, const Block& block,
                                           int, int first_row) {
                Weights sbar, rounded;
                this->find_sbar(sbar, rounded, grad_v, block, first_row);
                pin(sbar.word);
                pin(grad_k.value);
                wgmma_fence();
                multiply<Element>(grad_k, sbar, this->q());
                wgmma_commit();
                wgmma_wait<0>();
                pin(grad_k.value);
                pin(grad_v.value);
                pin(rounded.word);
                pin(sbar.word);
                this->leave_tile();
            });
        }
    };
};

}  // namespace jvp_attn::sm90
