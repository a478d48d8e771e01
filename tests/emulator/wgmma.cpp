#include "wgmma.h"

#include <cstring>
#include <string>

#include "tma_loads.h"

namespace jvp_attn::emulator {

namespace {

constexpr int kRowBytes = 128;       // a row of the swizzle pattern
constexpr int kPatternBytes = 1024;  // 8 of them
constexpr int kChunkBytes = 16;
constexpr int kChunkElements = 8;

// The fields of a descriptor in the PTX ISA, "Matrix Descriptor Format" of wgmma; in bytes.
struct Descriptor {
    explicit Descriptor(uint64_t bits)
        : start(field(bits, 0)),
          leading_offset(field(bits, 16)),
          stride_offset(field(bits, 32)),
          base_offset(bits >> 49 & 7),
          swizzle(bits >> 62) {}

    SharedAddress start, leading_offset, stride_offset;
    int base_offset;
    int swizzle;  // 1: of 128 bytes

private:
    static SharedAddress field(uint64_t bits, int shift) { return (bits >> shift & 0x3fff) << 4; }
};

// Four float32 in a vector register.
using Four = float __attribute__((vector_size(16)));

// Element (i, k) is at k * extent + i, where k is the summed index.
using Operand = std::vector<float>;

Operand load_operand(std::span<const SharedAddress> chunks, Major major, int extent,
                     float (*widen)(uint16_t), const SharedMemory& shared) {
    Operand operand(extent * WgmmaOp::kDepth);
    const int in_contiguous = major == Major::contraction ? WgmmaOp::kDepth : extent;
    for (int chunk = 0; chunk < std::ssize(chunks); ++chunk) {
        uint16_t elements[kChunkElements];
        std::memcpy(elements, shared.at(chunks[chunk]), sizeof elements);
        const int chunks_in_line = in_contiguous / kChunkElements;
        const int line = chunk / chunks_in_line;
        const int first = chunk % chunks_in_line * kChunkElements;
        for (int e = 0; e < kChunkElements; ++e) {
            const int i = major == Major::contraction ? line : first + e;
            const int k = major == Major::contraction ? first + e : line;
            operand[k * extent + i] = widen(elements[e]);
        }
    }
    return operand;
}

// Warp w has rows 16 w to 16 w + 15, in the layout of mma.
Operand operand_in_registers(std::span<const WgmmaThread> threads, float (*widen)(uint16_t)) {
    Operand operand(WgmmaOp::kRows * WgmmaOp::kDepth);
    for (int thread = 0; thread < std::ssize(threads); ++thread) {
        const int g = thread % 32 / 4, t = thread % 4;
        for (int word = 0; word < 4; ++word) {
            const int row = thread / 32 * 16 + g + word % 2 * 8;
            const int column = 2 * t + word / 2 * 8;
            const uint32_t bits = threads[thread].a[word];
            operand[column * WgmmaOp::kRows + row] = widen(bits & 0xffff);
            operand[(column + 1) * WgmmaOp::kRows + row] = widen(bits >> 16);
        }
    }
    return operand;
}

// The row and column in the accumulator of a thread's registers i and i + 1, for even i.
int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2; }

}  // namespace

std::vector<SharedAddress> operand_chunks(const Actor& actor, uint64_t descriptor, Major major,
                                          int extent) {
    const Descriptor x(descriptor);
    if (x.swizzle != 1)
        fail(actor, "the descriptor's swizzle mode is " + std::to_string(x.swizzle) +
                        "; only 1 (128 bytes) is emulated");
    if (static_cast<int>(x.start % kPatternBytes / kRowBytes) != x.base_offset)
        fail(actor, "the descriptor starts in row " +
                        std::to_string(x.start % kPatternBytes / kRowBytes) +
                        " of the swizzle pattern, and its base offset is " +
                        std::to_string(x.base_offset));
    const int bytes_in_row = major == Major::contraction ? 2 * WgmmaOp::kDepth : kRowBytes;
    if (x.start % kRowBytes + bytes_in_row > kRowBytes)
        fail(actor, "the descriptor starts at " + text_of(x.start) + ", and " +
                        std::to_string(bytes_in_row) +
                        " bytes from there cross a row of the swizzle pattern");

    std::vector<SharedAddress> chunks;
    const auto add = [&](int pattern_row, SharedAddress offset) {
        chunks.push_back(swizzled(x.start + pattern_row * kRowBytes + offset));
    };
    if (major == Major::contraction) {
        for (int i = 0; i < extent; ++i)
            for (int k = 0; k < WgmmaOp::kDepth; k += kChunkElements)
                add(i % 8, i / 8 * x.stride_offset + 2 * k);
    } else {
        for (int k = 0; k < WgmmaOp::kDepth; ++k)
            for (int i = 0; i < extent; i += kChunkElements)
                add(k % 8, k / 8 * x.stride_offset + i / 64 * x.leading_offset + i % 64 * 2);
    }
    return chunks;
}

void perform(const WgmmaOp& product, std::span<const SharedAddress> a,
             std::span<const SharedAddress> b, std::span<const WgmmaThread> threads,
             const SharedMemory& shared) {
    const int columns = product.columns;
    const Operand left = product.a_in_registers ? operand_in_registers(threads, product.widen)
                                                : load_operand(a, product.major_a, product.kRows,
                                                               product.widen, shared);
    const Operand right = load_operand(b, product.major_b, columns, product.widen, shared);

    std::vector<float> sums(product.kRows * columns);
    if (product.accumulate)
        for (int thread = 0; thread < std::ssize(threads); ++thread)
            for (int i = 0; i < columns / 2; i += 2)
                std::memcpy(&sums[row_of(thread, i) * columns + column_of(thread, i)],
                            threads[thread].accumulator + i, 2 * sizeof(float));

    for (int row = 0; row < product.kRows; ++row)
        for (int column = 0; column < columns; column += 4) {
            Four sum;
            std::memcpy(&sum, &sums[row * columns + column], sizeof sum);
            for (int k = 0; k < product.kDepth; ++k) {
                Four x;
                std::memcpy(&x, &right[k * columns + column], sizeof x);
                sum += left[k * product.kRows + row] * x;
            }
            std::memcpy(&sums[row * columns + column], &sum, sizeof sum);
        }

    for (int thread = 0; thread < std::ssize(threads); ++thread)
        for (int i = 0; i < columns / 2; i += 2)
            std::memcpy(threads[thread].accumulator + i,
                        &sums[row_of(thread, i) * columns + column_of(thread, i)],
                        2 * sizeof(float));
}

}  // namespace jvp_attn::emulator
