// What the self tests of the engine share: memory for the ranks of a job within one process, and what they draw.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "board.hpp"
#include "group.hpp"
#include "operation.hpp"

namespace collectives::engine::test {

using Element = std::int32_t;
using Random = std::mt19937_64;

inline std::size_t below(Random& random, std::size_t limit) { return static_cast<std::size_t>(random() % limit); }

// Small, so that short arrays take many pieces and the rings wrap round often.
inline Geometry small_geometry(std::size_t ranks) {
    Geometry geometry{ranks};
    geometry.slot_payload = 64;
    geometry.piece_bytes = 1024;
    return geometry;
}

// Emulators and some containers have no process_vm_readv.
inline bool reads_itself() {
    const std::byte one{1};
    std::byte copy{};
    return transports::read_process(getpid(), reinterpret_cast<std::uintptr_t>(&one), &copy, 1);
}

// The memory of all ranks of a job: a doorbell, a board, and room for arrays that lie in the heap.
class Memory {
  public:
    static constexpr std::size_t doorbell = 4096, arrays = 1 << 19;

    // `readable`: ranks read each other's memory by system calls, here their own.
    Memory(std::size_t ranks, bool readable) : Memory(small_geometry(ranks), readable) {}
    Memory(const Geometry& geometry, bool readable) : geometry_(geometry), readable_(readable && reads_itself()) {
        bytes_ = transports::round_up(doorbell + geometry_.bytes() + arrays, 4096);
        for (std::size_t rank = 0; rank < geometry.ranks; ++rank) {
            void* const heap = std::aligned_alloc(4096, bytes_);
            std::memset(heap, 0, bytes_);
            heaps_.emplace_back(static_cast<std::byte*>(heap), &std::free);
        }
    }

    Board board(std::size_t rank) const {
        std::vector<transports::Member> members;
        for (const auto& heap : heaps_)
            members.push_back({heap.get(), heap.get() + doorbell, readable_ ? getpid() : 0});
        return Board(rank, members, geometry_);
    }
    HeapRange range(std::size_t rank) const { return {heaps_[rank].get(), heaps_[rank].get() + bytes_}; }
    Element* array(std::size_t rank, std::size_t offset) const {
        return reinterpret_cast<Element*>(heaps_[rank].get() + doorbell + geometry_.bytes()) + offset;
    }
    const Geometry& geometry() const { return geometry_; }
    std::size_t ranks() const { return heaps_.size(); }

  private:
    Geometry geometry_;
    bool readable_;
    std::size_t bytes_;
    std::vector<std::unique_ptr<std::byte, void (*)(void*)>> heaps_;
};

// For jobs that the background thread has served: it may look at their doorbell after the last call is done.
inline const Memory& kept(Memory memory) {
    static std::deque<Memory> all;
    return all.emplace_back(std::move(memory));
}

struct SilentHost {
    void blocked() {}
    void release() {}
    void look(const Position&, double seconds) {
        if (seconds > 60) std::abort();
    }
    [[noreturn]] void mismatch(const Difference&) { std::abort(); }
};

// Runs a test with many seeds; says which one fails.
inline bool all(const char* name, bool (*test)(std::uint64_t), std::uint64_t seeds) {
    for (std::uint64_t seed = 0; seed < seeds; ++seed) {
        if (!test(seed)) {
            std::fprintf(stderr, "%s fails with seed %llu\n", name, static_cast<unsigned long long>(seed));
            return false;
        }
    }
    return true;
}

// Every rank makes the same calls at its own pace; which one steps next is drawn. False: a wrong result, or nobody gets
// on. A rank has `call`, how many calls it has ended; `run`, the one under way, if any; `part`, which knows what is
// right.
template <typename Rank, typename Begin>
bool step_in_any_order(Random& random, std::vector<std::unique_ptr<Rank>>& job, std::size_t calls, const Begin& begin) {
    std::size_t finished = 0, in_vain = 0;
    while (finished < job.size()) {
        const std::size_t number = below(random, job.size());
        Rank& rank = *job[number];
        if (rank.call == calls) continue;
        if (rank.run == nullptr) begin(rank, number);
        switch (rank.run->step()) {
            case Progress::done:
                if (!rank.part->right()) return false;
                rank.run.reset();
                finished += ++rank.call == calls ? 1 : 0;
                in_vain = 0;
                break;
            case Progress::moved: in_vain = 0; break;
            case Progress::blocked:
                if (++in_vain > 1000 * job.size()) return false;  // a deadlock
                break;
            case Progress::mismatch: return false;
        }
    }
    return true;
}

}  // namespace collectives::engine::test
