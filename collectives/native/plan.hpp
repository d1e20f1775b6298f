// One rank's part in a collective over mapped memory, worked out once per (collective, counts, dtype, operation, root).
//
// Every collective is a pull: some ranks offer blocks of their inputs, and each rank takes what `spec.py` says that it
// holds afterwards, a block from each source, moved or folded in the order of the ranks. That is the schedule `direct`.
// A large all_reduce is two of them in one, over pieces: every rank folds the share that it owns and offers it to all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "board.hpp"
#include "types.hpp"

namespace collectives::engine {

using transports::Geometry;
using transports::Label;

enum class Collective : std::uint8_t {
    all_reduce,
    all_gather,
    reduce_scatter,
    broadcast,
    reduce,
    gather,
    scatter,
    all_to_all,
    scan,
    barrier,
};
inline constexpr std::size_t collective_count = 10;

// A block of this rank's input that others take: rank `reader` alone, every other rank, or all ranks above this one.
struct Offered {
    static constexpr std::size_t everyone = ~std::size_t{0};
    static constexpr std::size_t above = everyone - 1;
    std::size_t offset;
    std::size_t bytes;
    std::size_t reader;
};

// A block that this rank takes: `index` among the source's offered blocks, at `offset` of the source's input.
struct Pull {
    std::size_t source;
    std::size_t index;
    std::size_t offset;
    std::size_t out;
    std::size_t bytes;
};

// A stretch of an array that one rank owns.
struct Share {
    std::size_t offset;
    std::size_t bytes;
};

struct Reduction {
    kernels::ReduceFunction fold = nullptr;  // none: blocks are moved
    kernels::ScaleFunction scale = nullptr;  // of the result, for averages
    double factor = 1.0;
    std::size_t element_bytes = 1;
};

struct Plan {
    Collective collective = Collective::barrier;
    Label label{};
    Reduction reduction;
    std::size_t input_bytes = 0;
    std::size_t output_bytes = 0;
    std::size_t largest_block = 0;  // bytes, of all blocks of all ranks
    std::vector<Offered> offered;
    std::vector<Pull> pulls;
    bool in_slot = false;         // every offer fits into a slot
    std::vector<Share> shares;    // of the large all_reduce, which is done by owners: what each rank folds
    std::size_t slice_bytes = 0;  // what one piece takes of every offered block
    std::uint64_t pieces = 0;     // the same on all ranks
};

// Elements per block: of the inputs and outputs of all ranks, as the collective cuts them. One count: all blocks are
// alike.
struct Counts {
    std::vector<std::size_t> blocks;
    std::size_t operator[](std::size_t block) const { return blocks[blocks.size() == 1 ? 0 : block]; }
    std::size_t before(std::size_t block) const {
        if (blocks.size() == 1) return block * blocks[0];
        std::size_t sum = 0;
        for (std::size_t i = 0; i < block; ++i) sum += blocks[i];
        return sum;
    }
    std::size_t largest() const {
        std::size_t most = 0;
        for (const std::size_t count : blocks) most = count > most ? count : most;
        return most;
    }
};

// What one piece takes of each of `blocks` blocks. A quarter of the whole overlaps the copies of different ranks;
// pieces below `smallest` cost more in waiting than they gain.
inline std::size_t slice_size(std::size_t largest_block, std::size_t blocks, std::size_t smallest,
                              const Geometry& geometry) {
    const std::size_t quarter = transports::round_up(largest_block * blocks / 4 + 1, smallest);
    const std::size_t piece = quarter < geometry.piece_bytes ? quarter : geometry.piece_bytes;
    const std::size_t slice = piece / blocks / 64 * 64;
    return slice > 0 ? slice : 64;
}

// Cut at multiples of 64 bytes, so that no two ranks write one cache line; the first shares have one line more.
inline std::vector<Share> cut_into_shares(std::size_t bytes, std::size_t size) {
    constexpr std::size_t line = 64;
    const std::size_t lines = (bytes + line - 1) / line;
    std::vector<Share> shares;
    std::size_t begin = 0;
    for (std::size_t rank = 0; rank < size; ++rank) {
        const std::size_t wanted = begin + (lines / size + (rank < lines % size ? 1 : 0)) * line;
        const std::size_t end = wanted < bytes ? wanted : bytes;
        shares.push_back({begin, end - begin});
        begin = end;
    }
    return shares;
}

inline Plan make_plan(Collective collective, std::size_t rank, std::size_t size, std::size_t root, const Counts& counts,
                      const Reduction& reduction, const Label& label, const Geometry& geometry) {
    Plan plan;
    plan.collective = collective;
    plan.label = label;
    plan.reduction = reduction;
    const std::size_t unit = reduction.element_bytes;
    const auto bytes = [&](std::size_t block) { return counts[block] * unit; };
    const auto start = [&](std::size_t block) { return counts.before(block) * unit; };
    const std::size_t everything = start(size);
    std::size_t blocks = 1;
    const auto offer_one = [&](std::size_t length, std::size_t reader) {
        plan.input_bytes = length;
        plan.offered.push_back({0, length, reader});
    };
    const auto offer_each = [&] {
        plan.input_bytes = everything;
        for (std::size_t peer = 0; peer < size; ++peer) plan.offered.push_back({start(peer), bytes(peer), peer});
    };
    switch (collective) {
        case Collective::all_reduce:
            offer_one(bytes(0), Offered::everyone);
            for (std::size_t s = 0; s < size; ++s) plan.pulls.push_back({s, 0, 0, 0, bytes(0)});
            plan.output_bytes = bytes(0);
            break;
        case Collective::all_gather:
            offer_one(bytes(rank), Offered::everyone);
            for (std::size_t s = 0; s < size; ++s) plan.pulls.push_back({s, 0, 0, start(s), bytes(s)});
            plan.output_bytes = everything;
            break;
        case Collective::reduce_scatter:
            blocks = size;
            offer_each();
            for (std::size_t s = 0; s < size; ++s) plan.pulls.push_back({s, rank, start(rank), 0, bytes(rank)});
            plan.output_bytes = bytes(rank);
            break;
        case Collective::broadcast:
            if (rank == root) offer_one(bytes(0), Offered::everyone);
            plan.pulls.push_back({root, 0, 0, 0, bytes(0)});
            plan.output_bytes = bytes(0);
            break;
        case Collective::reduce:
            offer_one(bytes(0), root);
            if (rank == root) {
                for (std::size_t s = 0; s < size; ++s) plan.pulls.push_back({s, 0, 0, 0, bytes(0)});
                plan.output_bytes = bytes(0);
            }
            break;
        case Collective::gather:
            offer_one(bytes(rank), root);
            if (rank == root) {
                for (std::size_t s = 0; s < size; ++s) plan.pulls.push_back({s, 0, 0, start(s), bytes(s)});
                plan.output_bytes = everything;
            }
            break;
        case Collective::scatter:
            blocks = size;
            if (rank == root) offer_each();
            plan.pulls.push_back({root, rank, start(rank), 0, bytes(rank)});
            plan.output_bytes = bytes(rank);
            break;
        case Collective::all_to_all:
            blocks = size;
            offer_each();
            for (std::size_t s = 0; s < size; ++s) plan.pulls.push_back({s, rank, start(rank), start(s), bytes(s)});
            plan.output_bytes = everything;
            break;
        case Collective::scan:
            offer_one(bytes(0), Offered::above);
            for (std::size_t s = 0; s <= rank; ++s) plan.pulls.push_back({s, 0, 0, 0, bytes(0)});
            plan.output_bytes = bytes(0);
            break;
        case Collective::barrier:
            for (std::size_t s = 0; s < size; ++s) plan.pulls.push_back({s, 0, 0, 0, 0});
            break;
    }
    if (!reduction.fold) {
        // Where a rank takes from several, each begins with its neighbour, so that not all read the same memory.
        std::vector<Pull> turned;
        for (std::size_t i = 0; i < plan.pulls.size(); ++i)
            turned.push_back(plan.pulls[(rank + i) % plan.pulls.size()]);
        plan.pulls = turned;
    }
    const std::size_t largest = counts.largest() * unit;
    plan.largest_block = largest;
    const std::size_t largest_offer = blocks == 1 ? largest : everything;
    plan.in_slot = largest_offer <= geometry.slot_payload;
    if (plan.in_slot) return plan;
    std::size_t longest = largest;
    std::size_t smallest_piece = 64 * 1024;
    if (collective == Collective::all_reduce) {
        blocks = size;
        smallest_piece /= 2;  // it is waited for twice
        plan.shares = cut_into_shares(largest, size);
        longest = 0;
        for (const Share& share : plan.shares) longest = share.bytes > longest ? share.bytes : longest;
    }
    plan.slice_bytes = slice_size(longest, blocks, smallest_piece, geometry) / unit * unit;
    plan.pieces = (longest + plan.slice_bytes - 1) / plan.slice_bytes;
    return plan;
}

}  // namespace collectives::engine
