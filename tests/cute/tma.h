// What the TMA is told: the arguments of tensor maps, and the boxes of a tile.
#pragma once

#include <algorithm>

#include "cute_tile.h"
#include "sm90/pipeline.cuh"
#include "tensor_map_calls.h"

namespace jvp_attn::witness {

using witness_tma::TensorView;

// CuTe's load of tiles of Rows x Columns of a tensor to shared memory.
template <int Rows, int Columns>
auto cute_load(const TensorView& x) {
    using namespace cute;
    const auto tensor = make_tensor(make_gmem_ptr(reinterpret_cast<CuteElement*>(x.address)),
                                    make_shape(x.rows, x.columns, x.heads, x.batches),
                                    make_stride(x.row_stride, _1{}, x.head_stride, x.batch_stride));
    using Box = Shape<Int<Rows>, Int<whole_atoms(Columns)>>;
    return make_tma_atom(SM90_TMA_LOAD{}, tensor, k_major_layout<Rows, Columns>(), Box{});
}

// Tensors whose heads or whose rows follow each other in memory, one that is a part of a larger
// one, and one of a single batch. The columns that fill a tile are beyond the tensor.
inline std::vector<TensorView> example_tensors(int columns) {
    const int64_t n = 1000, h = 3, d = columns - 8;
    return {{0, 2, n, h, d, n * h * d, h * d, d},
            {0, 2, n, h, d, h * n * d, d, n * d},
            {0, 2, n, h, d, n * h * 320, h * 320, 320},
            {0, 1, n, h, d, n * h * d, h * d, d}};
}

// The last map that was encoded.
inline witness_tma::EncodeCall last_encoded(const std::string& error) {
    if (!error.empty() || witness_tma::encode_calls.empty()) {
        std::fprintf(stderr, "no tensor map: %s\n", error.c_str());
        std::exit(1);
    }
    const witness_tma::EncodeCall call = witness_tma::encode_calls.back();
    witness_tma::encode_calls.clear();
    return call;
}

// encode_tensor_maps, for a tensor of queries and one of keys. Not compared: the promotion in L2,
// which changes no result.
template <int Rows, int Columns>
void compare_tensor_maps(Comparison& comparison) {
    static uint64_t address = 0x7f0000000000;  // csrc caches the map of a known address
    for (TensorView x : example_tensors(Columns))
        for (const bool of_keys : {false, true}) {
            x.address = address += 0x100000;
            const auto csrc = last_encoded(witness_tma::encode_by_csrc(x, of_keys, Rows));
            cute_load<Rows, Columns>(x);
            const auto cute = last_encoded("");
            comparison.equal(csrc.address, cute.address, "address");
            comparison.equal(csrc.element_bytes, cute.element_bytes, "bytes of an element");
            comparison.equal(csrc.rank, cute.rank, "rank");
            for (int i = 0; i < cute.rank; ++i) {
                comparison.equal(csrc.sizes[i], cute.sizes[i], "size", i);
                comparison.equal(csrc.box[i], cute.box[i], "box", i);
                comparison.equal(csrc.element_strides[i], cute.element_strides[i], "element stride",
                                 i);
                if (i > 0 && cute.sizes[i] > 1)  // one of size 1 may have any
                    comparison.equal(csrc.strides[i - 1], cute.strides[i - 1], "stride", i);
            }
            comparison.equal(csrc.interleave, cute.interleave, "interleave");
            comparison.equal(csrc.swizzle, cute.swizzle, "swizzle");
            comparison.equal(csrc.fill, cute.fill, "fill beyond the tensor");
        }
}

// load_tile: where each box comes from and goes to.
template <int Rows, int Columns>
void compare_boxes(Comparison& comparison) {
    using namespace cute;
    const int tile_row = 2, head = 1, batch = 1;
    const auto tile = example_tile<Rows, Columns>();
    as_warpgroup([&](int thread) {
        const TensorMap map;
        const sm90::TmaSource source = {map, 0, head, batch, sm90::kOutOfBounds};
        if (thread == 0) sm90::load_tile(tile, source, tile_row * Rows, 0);
    });
    const TensorView x = example_tensors(Columns).front();
    const auto coordinates = cute_load<Rows, Columns>(x).get_tma_tensor(
        make_shape(x.rows, x.columns, x.heads, x.batches));
    const auto elements = k_major<Rows, Columns>(tile.base);
    const auto& loads = recorded[0].tma_loads;
    comparison.require(loads.size() == whole_atoms(Columns) / 64, "a box has 64 columns");
    for (std::size_t box = 0; box < loads.size(); ++box) {
        const int column = 64 * box;
        comparison.equal(loads[box].target, address_of(elements(0, column)), "target of box", box);
        const auto coordinate = coordinates(tile_row * Rows, column, head, batch);
        for_each(make_seq<4>{}, [&](auto i) {
            comparison.equal<int>(loads[box].coordinates[i], get<i>(coordinate),
                                  "(box, coordinate)", box, i);
        });
    }
}

}  // namespace jvp_attn::witness
