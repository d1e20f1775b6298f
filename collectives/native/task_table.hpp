// One rank's part in a schedule, worked out once: the tasks of `collectives/plan.py`, as flat arrays.
//
// A task is one slice of one instruction. It may run when `waits` other tasks are done; the tasks between the same two
// ranks run in the order of the wire, which is the same at both ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "plan.hpp"

namespace collectives::engine {

// As in collectives/schedule.py.
enum class TaskKind : std::uint8_t { send, recv, recv_reduce, copy, reduce, fold };
enum class Buffer : std::uint8_t { in, out, tmp };
inline constexpr std::size_t buffer_count = 3;

// As Python makes it, in elements.
struct TaskRow {
    TaskKind kind;
    std::size_t peer;  // of what is sent or received
    Buffer source;
    std::size_t source_start;
    Buffer target;
    std::size_t target_start;
    std::size_t count;
    std::size_t contributions;  // of a fold: how many spans it reads, each `stride` elements after the last
    std::size_t stride;
    std::uint32_t waits;
    std::vector<std::uint32_t> dependents;
};

// For every rank that the schedule sends to (or receives from): that rank, and the tasks in the order of the wire.
// There may be none, where counts are zero.
using TaskQueues = std::vector<std::pair<std::size_t, std::vector<std::uint32_t>>>;

// Neighbouring entries of a list that all tasks share.
struct Entries {
    std::uint32_t begin = 0, end = 0;
};

// Offsets and lengths in bytes.
struct Task {
    TaskKind kind;
    Buffer source, target;
    std::uint32_t waits;
    std::size_t source_offset, target_offset, bytes;
    std::size_t contributions, stride;
    Entries dependents;
    Entries feeders;  // of a send: the tasks that write what it reads
};

struct Stream {
    std::size_t peer;
    std::uint64_t bytes;  // of all its tasks together
    std::vector<std::uint32_t> tasks;
};

struct TaskTable {
    Collective collective = Collective::barrier;
    Label label{};
    Reduction reduction;
    std::size_t input_bytes = 0;
    std::size_t output_bytes = 0;
    std::size_t scratch_bytes = 0;
    std::uint64_t bytes_moved = 0;  // sent and received, to tell small calls
    std::vector<Task> tasks;
    std::vector<std::uint32_t> dependents, feeders;
    std::vector<Stream> sends, receives;

    bool shares_memory(const std::byte* input, const std::byte* output) const {
        const auto in = reinterpret_cast<std::uintptr_t>(input), out = reinterpret_cast<std::uintptr_t>(output);
        return input_bytes > 0 && output_bytes > 0 && in < out + output_bytes && out < in + input_bytes;
    }
};

inline TaskTable make_task_table(Collective collective, const Label& label, const Reduction& reduction,
                                 std::size_t input_count, std::size_t output_count, std::size_t scratch_count,
                                 const std::vector<TaskRow>& rows, const TaskQueues& sends,
                                 const TaskQueues& receives) {
    if (rows.size() > std::numeric_limits<std::uint32_t>::max()) throw std::length_error("a plan has too many tasks");
    const std::size_t unit = reduction.element_bytes;
    TaskTable table;
    table.collective = collective;
    table.label = label;
    table.reduction = reduction;
    table.input_bytes = input_count * unit;
    table.output_bytes = output_count * unit;
    table.scratch_bytes = scratch_count * unit;
    std::vector<std::vector<std::uint32_t>> feeders(rows.size());
    for (std::uint32_t index = 0; index < rows.size(); ++index) {
        for (const std::uint32_t dependent : rows[index].dependents) {
            if (rows.at(dependent).kind == TaskKind::send) feeders[dependent].push_back(index);
        }
    }
    const auto append = [](std::vector<std::uint32_t>& all, const std::vector<std::uint32_t>& some) {
        const auto begin = static_cast<std::uint32_t>(all.size());
        all.insert(all.end(), some.begin(), some.end());
        return Entries{begin, static_cast<std::uint32_t>(all.size())};
    };
    for (std::size_t index = 0; index < rows.size(); ++index) {
        const TaskRow& row = rows[index];
        if (row.kind != TaskKind::send && row.target == Buffer::in) {
            throw std::invalid_argument("a task writes to the input");
        }
        table.tasks.push_back({row.kind, row.source, row.target, row.waits, row.source_start * unit,
                               row.target_start * unit, row.count * unit, row.contributions, row.stride * unit,
                               append(table.dependents, row.dependents), append(table.feeders, feeders[index])});
    }
    const auto gather = [&](const TaskQueues& queues) {
        std::vector<Stream> streams;
        for (const auto& [peer, tasks] : queues) {
            std::uint64_t bytes = 0;
            for (const std::uint32_t task : tasks) bytes += table.tasks.at(task).bytes;
            table.bytes_moved += bytes;
            streams.push_back({peer, bytes, tasks});
        }
        return streams;
    };
    table.sends = gather(sends);
    table.receives = gather(receives);
    return table;
}

}  // namespace collectives::engine
