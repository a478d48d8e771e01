// Backward without tangents: dK and dV.
//
//     S = s Q Kᵀ      P = exp(S − lse)      dS = P∘(dO Vᵀ − delta)
//     dV = Pᵀ dO      dK = s dSᵀ Q
//
// Tiles: K and V are Keys x HeadDim, Q and dO are Rows x HeadDim; a warpgroup computes 64 keys.
#pragma once

#include "sm90/bwd_mainloop.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct BackwardDkv : BwdMainloop<Element, HeadDim, Rows, Keys, 1> {
    using Mainloop = BwdMainloop<Element, HeadDim, Rows, Keys, 1>;
    using typename Mainloop::Block, typename Mainloop::Gradient, typename Mainloop::Weights;

    static constexpr int kSharedBytes = Mainloop::kPipelineBytes;
    static_assert(kSharedBytes <= kMaxSharedBytes);

    DEVICE static void run(const Params& params) {
        const typename Mainloop::Memory memory;
        Mainloop::run(params, memory, Warpgroup{{params.attention, memory}});
    }

private:
    struct Warpgroup : Mainloop::Warpgroup {
        DEVICE void operator()(int work_tile) {
            this->differentiate(work_tile, [&](Gradient& grad_k, Gradient& grad_v,
                                               const Block& block, int, int first_row) {
                // P and dS; issue dV += Pᵀ dO
                Weights ds, rounded;
                this->compute_ds(ds, rounded, grad_v, block, first_row);
                // issue dK += dSᵀ Q
                wgmma_group([&] { multiply<Element>(grad_k, ds, this->q()); }, ds, grad_k);
                // wait for dV and dK
                this->leave_tile(grad_k, grad_v, rounded, ds);
            });
        }
    };
};

}  // namespace jvp_attn::sm90
