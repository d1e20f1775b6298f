// One call of a schedule on one rank, as a state machine over byte channels: `step` does what can be done now and never
// waits.
//
// The stream to a peer is a header, which names the call, then the bytes of the tasks in the order of the wire. Slices
// are no units of it: what has come of one is used at once, straight from the channel, and a send may begin with the
// part of its span that is finished. So a chain of receive, reduce and send is one pass over bytes that the cache still
// holds. No room in a channel is needed beyond one byte: of all transfers that are not done, the first in the order of
// the schedule's rows can always move.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "channel.hpp"
#include "operation.hpp"
#include "task_table.hpp"

namespace collectives::engine {

// What the stream of a call begins with.
struct StreamHeader {
    Label label;
    std::uint64_t bytes;  // that follow; where counts are not part of the label, they may differ
};
static_assert(sizeof(StreamHeader) == 32);

// `Writer` and `Reader`: the channels to and from each peer, by its rank.
template <transports::ByteWriter Writer, transports::ByteReader Reader>
class ScheduleRun {
  public:
    // Arrays, `scratch` and all that is referred to must live until `done`.
    ScheduleRun(std::vector<Writer>& writers, std::vector<Reader>& readers, Traffic& traffic, const TaskTable& table,
                const std::byte* input, std::byte* output, std::byte* scratch)
        : writers_(writers),
          readers_(readers),
          traffic_(traffic),
          table_(table),
          input_(input),
          output_(output),
          scratch_(scratch),
          remaining_(table.tasks.size()),
          moved_(table.tasks.size(), 0) {
        for (const Stream& stream : table.sends) outgoing_.push_back({stream});
        for (const Stream& stream : table.receives) incoming_.push_back({stream, {}, 0, 0, {}, 0});
        waits_.reserve(table.tasks.size());
        for (std::uint32_t index = 0; index < table.tasks.size(); ++index) {
            waits_.push_back(table.tasks[index].waits);
            if (waits_[index] == 0 && is_local(index)) ready_.push_back(index);
        }
    }

    Progress step() {
        bool moved = false;
        for (;;) {
            bool now = false;
            for (Incoming& stream : incoming_) {
                now = receive(stream) || now;
                if (differing_) return Progress::mismatch;
            }
            for (Outgoing& stream : outgoing_) now = send(stream) || now;
            if (next_ready_ < ready_.size()) {
                run_local();
                now = true;
            }
            if (!now) break;
            moved = true;
        }
        if (remaining_ > 0 || !headers_exchanged()) return moved ? Progress::moved : Progress::blocked;
        const Reduction& reduction = table_.reduction;
        if (reduction.scale != nullptr && table_.output_bytes > 0) {
            reduction.scale(output_, table_.output_bytes / reduction.element_bytes, reduction.factor);
        }
        return Progress::done;
    }

    // After a mismatch: whose stream belongs to another call, and what it says.
    std::size_t differing_peer() const { return differing_->first; }
    const StreamHeader& their_header() const { return differing_->second; }
    std::uint64_t expected_bytes() const {
        for (const Stream& stream : table_.receives) {
            if (stream.peer == differing_->first) return stream.bytes;
        }
        return 0;
    }

    // The ranks that something must still come from; when nothing must, those that must take something.
    std::vector<std::size_t> awaited() const {
        std::vector<std::size_t> ranks;
        for (const Incoming& stream : incoming_) {
            if (!stream.done()) ranks.push_back(stream.plan.peer);
        }
        if (!ranks.empty()) return ranks;
        for (const Outgoing& stream : outgoing_) {
            if (!stream.done()) ranks.push_back(stream.plan.peer);
        }
        return ranks;
    }

  private:
    // What moves before other streams have their turn: small, so that what was received is in the cache when it is
    // sent.
    static constexpr std::size_t chunk_bytes = 32 * 1024;
    static constexpr std::size_t small_message = 1024;
    static constexpr std::size_t largest_element = 16;

    struct Outgoing {
        const Stream& plan;
        std::size_t header_sent = 0;
        std::size_t next = 0;  // among the tasks of the stream
        bool done() const { return header_sent == sizeof(StreamHeader) && next == plan.tasks.size(); }
    };

    struct Incoming {
        const Stream& plan;
        std::array<std::byte, sizeof(StreamHeader)> header;
        std::size_t header_read;
        std::size_t next;
        std::array<std::byte, largest_element> element;  // one to be reduced, of which only the beginning has come
        std::size_t element_read;
        bool done() const { return header_read == sizeof(StreamHeader) && next == plan.tasks.size(); }
    };

    bool is_local(std::uint32_t index) const {
        const TaskKind kind = table_.tasks[index].kind;
        return kind == TaskKind::copy || kind == TaskKind::reduce || kind == TaskKind::fold;
    }

    const std::byte* source_of(const Task& task) const {
        const std::byte* const buffers[buffer_count] = {input_, output_, scratch_};
        return buffers[static_cast<std::size_t>(task.source)] + task.source_offset;
    }

    std::byte* target_of(const Task& task) const {
        return (task.target == Buffer::out ? output_ : scratch_) + task.target_offset;
    }

    bool headers_exchanged() const {
        return std::all_of(outgoing_.begin(), outgoing_.end(), [](const Outgoing& stream) { return stream.done(); }) &&
               std::all_of(incoming_.begin(), incoming_.end(), [](const Incoming& stream) { return stream.done(); });
    }

    void complete(std::uint32_t index) {
        const Task& task = table_.tasks[index];
        moved_[index] = task.bytes;
        --remaining_;
        for (std::uint32_t entry = task.dependents.begin; entry < task.dependents.end; ++entry) {
            const std::uint32_t dependent = table_.dependents[entry];
            if (--waits_[dependent] == 0 && is_local(dependent)) ready_.push_back(dependent);
        }
    }

    // How many bytes, from the first, of what a send reads have their final value. Addresses are compared, since input
    // and output may be the same memory.
    std::size_t finished_part(std::uint32_t index) const {
        const Task& task = table_.tasks[index];
        if (waits_[index] == 0) return task.bytes;
        const auto begin = reinterpret_cast<std::uintptr_t>(source_of(task));
        std::uintptr_t end = begin + task.bytes;
        for (std::uint32_t entry = task.feeders.begin; entry < task.feeders.end; ++entry) {
            const std::uint32_t feeder = table_.feeders[entry];
            if (moved_[feeder] == table_.tasks[feeder].bytes) continue;
            const auto written = reinterpret_cast<std::uintptr_t>(target_of(table_.tasks[feeder])) + moved_[feeder];
            end = std::min(end, std::max(begin, written));
        }
        return end - begin;
    }

    bool send(Outgoing& stream) {
        Writer& writer = writers_[stream.plan.peer];
        const bool moved = send_header(stream, writer);
        if (stream.header_sent < sizeof(StreamHeader)) return moved;
        std::size_t sent = 0;
        while (stream.next < stream.plan.tasks.size() && sent < chunk_bytes) {
            const std::uint32_t index = stream.plan.tasks[stream.next];
            const std::size_t length = std::min(finished_part(index) - moved_[index], chunk_bytes);
            if (length == 0) break;
            const std::size_t taken = writer.try_send({source_of(table_.tasks[index]) + moved_[index], length});
            note_sent(stream, index, taken);
            sent += taken;
            if (taken < length) break;
        }
        return moved || sent > 0;
    }

    void note_sent(Outgoing& stream, std::uint32_t index, std::size_t bytes) {
        moved_[index] += bytes;
        traffic_.sent[stream.plan.peer] += bytes;
        if (moved_[index] == table_.tasks[index].bytes) {
            complete(index);
            ++stream.next;
        }
    }

    // Small messages go together with their header: what is sent at once is seen at once.
    bool send_header(Outgoing& stream, Writer& writer) {
        if (stream.header_sent == sizeof(StreamHeader)) return false;
        const StreamHeader header{table_.label, stream.plan.bytes};
        std::array<std::byte, sizeof header + small_message> together;
        std::memcpy(together.data(), &header, sizeof header);
        std::size_t length = sizeof header;
        if (!stream.plan.tasks.empty()) {
            const std::uint32_t first = stream.plan.tasks[0];
            const std::size_t ready = finished_part(first);
            if (ready <= small_message && ready == table_.tasks[first].bytes) {
                std::memcpy(together.data() + length, source_of(table_.tasks[first]), ready);
                length += ready;
            }
        }
        const std::size_t taken = writer.try_send({together.data() + stream.header_sent, length - stream.header_sent});
        const std::size_t of_header = std::min(taken, sizeof header - stream.header_sent);
        stream.header_sent += of_header;
        if (taken > of_header) note_sent(stream, stream.plan.tasks[0], taken - of_header);
        return taken > 0;
    }

    bool receive(Incoming& stream) {
        Reader& reader = readers_[stream.plan.peer];
        bool moved = false;
        while (stream.header_read < sizeof(StreamHeader)) {
            const auto view = reader.arrived();
            const std::size_t length = std::min(view.size(), sizeof(StreamHeader) - stream.header_read);
            if (length == 0) return moved;
            std::memcpy(stream.header.data() + stream.header_read, view.data(), length);
            reader.advance(length);
            stream.header_read += length;
            moved = true;
            if (stream.header_read == sizeof(StreamHeader) && !fits(stream)) return moved;
        }
        std::size_t received = 0;
        while (stream.next < stream.plan.tasks.size() && received < chunk_bytes) {
            const std::uint32_t index = stream.plan.tasks[stream.next];
            if (waits_[index] > 0) break;
            const auto view = reader.arrived();
            if (view.empty()) break;
            const std::size_t taken =
                table_.tasks[index].kind == TaskKind::recv ? take(index, view) : take_and_reduce(stream, index, view);
            reader.advance(taken);
            received += taken;
            traffic_.received[stream.plan.peer] += taken;
            if (moved_[index] == table_.tasks[index].bytes) {
                complete(index);
                ++stream.next;
            }
        }
        return moved || received > 0;
    }

    bool fits(const Incoming& stream) {
        StreamHeader theirs;
        std::memcpy(&theirs, stream.header.data(), sizeof theirs);
        if (theirs.label == table_.label && theirs.bytes == stream.plan.bytes) return true;
        differing_.emplace(stream.plan.peer, theirs);
        return false;
    }

    // Both return how many bytes of the view they have used.
    std::size_t take(std::uint32_t index, std::span<const std::byte> view) {
        const Task& task = table_.tasks[index];
        const std::size_t length = std::min({view.size(), task.bytes - moved_[index], chunk_bytes});
        std::memcpy(target_of(task) + moved_[index], view.data(), length);
        moved_[index] += length;
        return length;
    }

    std::size_t take_and_reduce(Incoming& stream, std::uint32_t index, std::span<const std::byte> view) {
        const Task& task = table_.tasks[index];
        const std::size_t unit = table_.reduction.element_bytes;
        const std::size_t whole = std::min({view.size(), task.bytes - moved_[index], chunk_bytes}) / unit * unit;
        if (stream.element_read == 0 && whole > 0) {
            reduce(index, view.data(), whole);
            return whole;
        }
        const std::size_t length = std::min(view.size(), unit - stream.element_read);
        std::memcpy(stream.element.data() + stream.element_read, view.data(), length);
        stream.element_read += length;
        if (stream.element_read == unit) {
            reduce(index, stream.element.data(), unit);
            stream.element_read = 0;
        }
        return length;
    }

    void reduce(std::uint32_t index, const std::byte* arrived, std::size_t bytes) {
        const Task& task = table_.tasks[index];
        const std::byte* const inputs[2] = {arrived, source_of(task) + moved_[index]};
        table_.reduction.fold(inputs, 2, target_of(task) + moved_[index], bytes / table_.reduction.element_bytes);
        moved_[index] += bytes;
    }

    void run_local() {
        const std::uint32_t index = ready_[next_ready_++];
        const Task& task = table_.tasks[index];
        std::byte* const target = target_of(task);
        const std::byte* const source = source_of(task);
        if (task.kind == TaskKind::copy) {
            std::memcpy(target, source, task.bytes);
        } else {
            std::vector<const std::byte*>& inputs = fold_inputs_;
            inputs.clear();
            if (task.kind == TaskKind::reduce) {
                inputs = {target, source};
            } else {
                for (std::size_t i = 0; i < task.contributions; ++i) inputs.push_back(source + i * task.stride);
            }
            table_.reduction.fold(inputs.data(), inputs.size(), target, task.bytes / table_.reduction.element_bytes);
        }
        complete(index);
    }

    std::vector<Writer>& writers_;
    std::vector<Reader>& readers_;
    Traffic& traffic_;
    const TaskTable& table_;
    const std::byte* input_;
    std::byte* output_;
    std::byte* scratch_;
    std::size_t remaining_;
    std::vector<std::size_t> moved_;    // by task: bytes that are done
    std::vector<std::uint32_t> waits_;  // by task: tasks that must be done before it
    std::vector<std::uint32_t> ready_;  // local tasks in the order in which they may run
    std::size_t next_ready_ = 0;
    std::vector<Outgoing> outgoing_;
    std::vector<Incoming> incoming_;
    std::vector<const std::byte*> fold_inputs_;
    std::optional<std::pair<std::size_t, StreamHeader>> differing_;
};

}  // namespace collectives::engine
