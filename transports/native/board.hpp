// What the ranks of one communicator write for each other to read, in shared memory.
//
// Each rank has a board in its own heap, and it alone writes there. A board has
//   slots      one for each of the last calls: number, label, and the call's bytes when they are few;
//   counters   how many pieces this rank has put out (produced), reduced, and taken in (consumed), over all calls;
//   staging    a ring of pieces of its input, or of what it has reduced;
//   pipes      two byte streams to every other rank, for messages and for schedules: see pipe.hpp.
// Words that another rank polls are stored with release and loaded with acquire; everything else is plain memory that
// such a word makes visible. Counters only grow. This file moves no data and waits for nothing: `slot_free`, `arrived`
// … only look.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "wait.hpp"

namespace collectives::transports {

inline constexpr std::size_t label_bytes = 24;
using Label = std::array<std::byte, label_bytes>;

constexpr std::size_t round_up(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

// How a rank offers the input of a call.
enum class Offer : std::uint64_t {
    in_slot = 0,     // all of it lies in the slot
    staged = 1,      // piece by piece through the staging ring
    in_heap = 2,     // where it is, in the heap: the slot holds its Address there
    in_process = 3,  // where it is, in the process, which the others may read: the slot holds its Address
};

struct Address {
    std::uint64_t offset;
};

struct Slot {
    std::uint64_t word;  // call number · 4 + Offer; stored last
    Label label;
    std::byte payload[1];  // as many as the geometry says
};
inline constexpr std::size_t slot_header_bytes = offsetof(Slot, payload);
static_assert(slot_header_bytes == 32);

struct Counters {
    alignas(line_bytes) std::uint64_t produced;
    alignas(line_bytes) std::uint64_t reduced;
    alignas(line_bytes) std::uint64_t consumed;
};

// What a stream carries: between two ranks there is one of each.
enum class Lane : std::uint8_t { messages, schedules };
inline constexpr std::size_t lanes = 2;

// How far a stream between two ranks has come: `written` by its sender to that peer, `read` by its receiver from that
// peer.
struct StreamCounters {
    alignas(line_bytes) std::uint64_t written;
    alignas(line_bytes) std::uint64_t read;
};

// The sizes of a board; equal on all ranks.
struct Geometry {
    static constexpr std::size_t slots = 16;
    static constexpr std::size_t pieces = 4;
    std::size_t ranks;
    std::size_t slot_payload = 8192;
    std::size_t piece_bytes = 256 * 1024;
    std::size_t most_pipe_bytes = 256 * 1024;

    // A power of two: less for each peer where there are many.
    std::size_t pipe_bytes() const {
        std::size_t bytes = most_pipe_bytes;
        while (bytes > 16 * 1024 && bytes * ranks > 1024 * 1024) bytes /= 2;
        return bytes;
    }

    std::size_t slot_stride() const { return round_up(slot_header_bytes + slot_payload, line_bytes); }
    std::size_t slots_offset() const { return sizeof(Counters); }
    std::size_t staging_offset() const { return round_up(slots_offset() + slots * slot_stride(), 4096); }
    std::size_t streams_offset() const { return staging_offset() + pieces * piece_bytes; }
    std::size_t pipes_offset() const {
        return round_up(streams_offset() + lanes * ranks * sizeof(StreamCounters), 4096);
    }
    std::size_t bytes() const { return pipes_offset() + lanes * ranks * pipe_bytes(); }

    // For any communicator of at most so many ranks: fewer may need more, since their pipes are larger.
    static std::size_t most_bytes(std::size_t ranks) {
        std::size_t most = 0;
        for (std::size_t fewer = 1; fewer <= ranks; ++fewer) most = std::max(most, Geometry{fewer}.bytes());
        return most;
    }
};

// One member of the communicator, as mapped into this process.
struct Member {
    std::byte* heap = nullptr;
    std::byte* board = nullptr;
    pid_t process = 0;  // 0: its memory cannot be read from here

    Doorbell& door() const { return *reinterpret_cast<Doorbell*>(heap); }
    Counters& counters() const { return *reinterpret_cast<Counters*>(board); }
};

// Copies from the memory of another process; false when it does not let us, or has ended.
inline bool read_process(pid_t process, std::uint64_t address, std::byte* target, std::size_t length) {
    while (length > 0) {
        iovec local{target, length};
        iovec remote{reinterpret_cast<void*>(address), length};  // NOLINT: an address of the other process
        const ssize_t count = process_vm_readv(process, &local, 1, &remote, 1, 0);
        if (count <= 0) return false;
        address += static_cast<std::uint64_t>(count);
        target += count;
        length -= static_cast<std::size_t>(count);
    }
    return true;
}

class Board {
  public:
    Board(std::size_t rank, std::vector<Member> members, Geometry geometry)
        : rank_(rank), members_(std::move(members)), geometry_(geometry), started_(members_.size(), 0) {}

    std::size_t rank() const { return rank_; }
    std::size_t size() const { return members_.size(); }
    const Geometry& geometry() const { return geometry_; }
    const Member& member(std::size_t rank) const { return members_[rank]; }
    const Member& self() const { return members_[rank_]; }

    Slot& slot(std::size_t rank, std::uint64_t call) const {
        std::byte* const slots = members_[rank].board + geometry_.slots_offset();
        return *reinterpret_cast<Slot*>(slots + call % Geometry::slots * geometry_.slot_stride());
    }
    std::byte* staging(std::size_t rank, std::uint64_t piece) const {
        return members_[rank].board + geometry_.staging_offset() + piece % Geometry::pieces * geometry_.piece_bytes;
    }

    // What `rank` has written to and read from the streams between itself and `peer`.
    StreamCounters& stream(std::size_t rank, std::size_t peer, Lane lane) const {
        std::byte* const streams = members_[rank].board + geometry_.streams_offset();
        return reinterpret_cast<StreamCounters*>(streams)[number(peer, lane)];
    }
    // Where the bytes of the stream from `rank` to `peer` lie.
    std::byte* pipe(std::size_t rank, std::size_t peer, Lane lane) const {
        return members_[rank].board + geometry_.pipes_offset() + number(peer, lane) * geometry_.pipe_bytes();
    }

    // Whether the slot of `call` may be written: every rank has begun the call after the one that used it last.
    bool slot_free(std::uint64_t call) {
        if (call <= Geometry::slots) return true;
        const std::uint64_t needed = call - Geometry::slots + 1;
        for (std::size_t peer = 0; peer < size(); ++peer) {
            if (started_[peer] >= needed || peer == rank_) continue;
            const std::uint64_t word = atomic(slot(peer, needed).word).load(std::memory_order_acquire);
            if (word / 4 < needed) return false;
            started_[peer] = word / 4;
        }
        return true;
    }

    // Makes the slot of `call`, whose payload has been written, visible to all.
    void publish(std::uint64_t call, Offer offer, const Label& label) {
        Slot& own = slot(rank_, call);
        own.label = label;
        atomic(own.word).store(call * 4 + static_cast<std::uint64_t>(offer), std::memory_order_release);
        ring_all();
    }

    // Whether `peer` has published its slot of `call`.
    bool arrived(std::size_t peer, std::uint64_t call) {
        if (atomic(slot(peer, call).word).load(std::memory_order_acquire) / 4 != call) return false;
        started_[peer] = call;
        return true;
    }

    Offer offer(std::size_t peer, std::uint64_t call) const {
        return static_cast<Offer>(atomic(slot(peer, call).word).load(std::memory_order_relaxed) % 4);
    }

    // Stores one of this rank's own counters.
    void advance(std::uint64_t Counters::* counter, std::uint64_t value) {
        atomic(self().counters().*counter).store(value, std::memory_order_release);
        ring_all();
    }

    bool reached(std::size_t peer, std::uint64_t Counters::* counter, std::uint64_t value) const {
        return atomic(members_[peer].counters().*counter).load(std::memory_order_acquire) >= value;
    }

    bool all_reached(std::uint64_t Counters::* counter, std::uint64_t value) const {
        for (std::size_t peer = 0; peer < size(); ++peer) {
            if (peer != rank_ && !reached(peer, counter, value)) return false;
        }
        return true;
    }

    bool aborted() const { return atomic(self().door().aborted).load(std::memory_order_relaxed) != 0; }

    // The number of the last call that `peer` has begun, as far as can be seen; 0 for none.
    std::uint64_t last_call(std::size_t peer) const {
        std::uint64_t last = 0;
        for (std::size_t index = 0; index < Geometry::slots; ++index) {
            last = std::max(last, atomic(slot(peer, index).word).load(std::memory_order_acquire) / 4);
        }
        return last;
    }

  private:
    std::size_t number(std::size_t peer, Lane lane) const { return static_cast<std::size_t>(lane) * size() + peer; }

    void ring_all() {
        for (std::size_t peer = 0; peer < size(); ++peer) {
            if (peer != rank_) ring(members_[peer].door());
        }
    }

    std::size_t rank_;
    std::vector<Member> members_;
    Geometry geometry_;
    std::vector<std::uint64_t> started_;  // the last call of each peer that this rank has seen begin
};

}  // namespace collectives::transports
