// One call of a schedule over the pipes of shared memory: what `ScheduleRun` does, and the call's place on the board.
//
// Every rank publishes the label of the call in a slot, as the operations over mapped memory do: so calls of both kinds
// find each other out where they differ, also between ranks that the schedule lets exchange nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "board.hpp"
#include "pipe.hpp"
#include "schedule_run.hpp"
#include "task_table.hpp"

namespace collectives::engine {

struct Scratch {
    std::unique_ptr<std::byte[]> data;
    std::size_t bytes = 0;
};

// The pipes for schedules between this rank and every other one.
struct Links {
    explicit Links(const Board& board) {
        for (std::size_t peer = 0; peer < board.size(); ++peer) {
            writers.emplace_back(board, peer, transports::Lane::schedules);
            readers.emplace_back(board, peer, transports::Lane::schedules);
        }
    }
    std::vector<transports::PipeWriter> writers;
    std::vector<transports::PipeReader> readers;
};

class Scheduled {
  public:
    // Arrays, `scratch` and all that is referred to must live until `done`.
    Scheduled(Board& board, Links& links, Traffic& traffic, const TaskTable& table, std::uint64_t call,
              const std::byte* input, std::byte* output, std::byte* scratch)
        : board_(board),
          table_(table),
          call_(call),
          run_(links.writers, links.readers, traffic, table, input, output, scratch),
          compared_(board.size(), false) {}

    Progress step() {
        if (!entered_) {
            if (!board_.slot_free(call_)) return Progress::blocked;
            board_.publish(call_, transports::Offer::staged, table_.label);
            entered_ = true;
        }
        const Progress progress = run_.step();
        if (progress == Progress::mismatch) {
            differing_ = run_.differing_peer();
            their_label_ = run_.their_header().label;
            if (their_label_ == table_.label) bytes_ = {run_.expected_bytes(), run_.their_header().bytes};
        }
        return progress == Progress::blocked ? compare() : progress;
    }

    std::uint64_t call() const { return call_; }
    const TaskTable& table() const { return table_; }
    std::size_t differing_peer() const { return differing_; }
    const Label& their_label() const { return their_label_; }
    std::uint64_t expected_bytes() const { return bytes_.first; }
    std::uint64_t their_bytes() const { return bytes_.second; }

    // The ranks that have not begun the call; when all have, those that the schedule waits for.
    std::vector<std::size_t> awaited() const {
        std::vector<std::size_t> ranks;
        for (std::size_t peer = 0; peer < board_.size(); ++peer) {
            if (peer != board_.rank() && board_.last_call(peer) < call_) ranks.push_back(peer);
        }
        return ranks.empty() ? run_.awaited() : ranks;
    }

  private:
    // Nothing moves: look at what the others have begun. A slot stays as long as this rank is in its call.
    Progress compare() {
        for (std::size_t peer = 0; peer < board_.size(); ++peer) {
            if (compared_[peer] || peer == board_.rank() || !board_.arrived(peer, call_)) continue;
            compared_[peer] = true;
            their_label_ = board_.slot(peer, call_).label;
            if (their_label_ == table_.label) continue;
            differing_ = peer;
            return Progress::mismatch;
        }
        return Progress::blocked;
    }

    Board& board_;
    const TaskTable& table_;
    std::uint64_t call_;
    ScheduleRun<transports::PipeWriter, transports::PipeReader> run_;
    std::vector<bool> compared_;
    bool entered_ = false;
    std::size_t differing_ = 0;
    Label their_label_{};
    std::pair<std::uint64_t, std::uint64_t> bytes_{};
};

}  // namespace collectives::engine
