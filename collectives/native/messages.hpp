// Messages between two ranks (send and recv), as state machines over pipes: `step` does what can be done now and never
// waits.
//
// A message is a header, then its bytes; or, for a large array in the sender's heap, a header that says where it lies.
// Such a message is read once the receiver has advanced past its header. A receive takes the first message with its
// tag; messages with other tags that come before it are kept in memory of their own.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <list>
#include <memory>
#include <span>
#include <vector>

#include "board.hpp"
#include "copy.hpp"
#include "operation.hpp"
#include "pipe.hpp"
#include "plan.hpp"

namespace collectives::engine {

using transports::PipeReader;
using transports::PipeWriter;

// Something that was started and is not waited for yet.
struct Pending {
    Pending() = default;
    Pending(const Pending&) = delete;
    Pending& operator=(const Pending&) = delete;
    virtual ~Pending() = default;
    std::atomic<bool> done = false;
    // Of a collective, once it is done: when its first step was made, and its last. Small ones are not timed.
    std::chrono::steady_clock::time_point began{}, ended{};
};

// One posted send or recv.
struct Message : Pending {
    bool sends = false;
    std::size_t peer = 0;
    std::uint32_t tag = 0;
    Label label{};
    std::byte* data = nullptr;  // only read by a send
    std::size_t bytes = 0;

    bool begun = false;
    std::size_t moved = 0;
    std::uint64_t end = 0;  // of a lent message: the stream position past its header
};

class Messages {
  public:
    Messages(Board& board, Traffic& traffic, HeapRange heap)
        : traffic_(traffic), heap_(heap), readable_(board.self().process != 0) {
        for (std::size_t peer = 0; peer < board.size(); ++peer) {
            const std::byte* const their_heap = board.member(peer).heap;
            links_.push_back({PipeWriter(board, peer),
                              PipeReader(board, peer),
                              their_heap,
                              board.member(peer).process,
                              {},
                              {},
                              {},
                              {}});
        }
    }

    void post(const std::shared_ptr<Message>& message) {
        Link& link = links_[message->peer];
        (message->sends ? link.sends : link.receives).push_back(message);
        ++pending_;
    }

    // Makes the first step of a send that was just posted and has no other before it, so that its receiver sees it now
    // and not when this process has a core to spare for its background thread.
    void begin(const std::shared_ptr<Message>& message) {
        Link& link = links_[message->peer];
        bool moved = false;
        if (link.sends.front() == message && step_send(link, *message, moved)) finish(link.sends, link.sends.begin());
    }

    bool idle() const { return pending_ == 0; }
    std::size_t pending() const { return pending_; }

    // Moves every message as far as it goes now. `mismatch`: a message does not fit its receive; see `differing`.
    Progress step() {
        bool moved = false, sending = false;
        for (Link& link : links_) {
            while (!link.sends.empty() && step_send(link, *link.sends.front(), moved)) {
                finish(link.sends, link.sends.begin());
            }
            sending = sending || !link.sends.empty();
        }
        for (Link& link : links_) {
            while ((sending || !link.receives.empty()) && step_receive(link, moved)) {
            }
            if (differing_ != nullptr) return Progress::mismatch;
        }
        return moved ? Progress::moved : Progress::blocked;
    }

    const Message* differing() const { return differing_.get(); }
    const Label& their_label() const { return their_label_; }

  private:
    // From how many bytes on an array is lent instead of being copied through the pipe.
    static constexpr std::size_t heap_from = 16 * 1024;
    static constexpr std::size_t process_from = 32 * 1024;
    static constexpr std::size_t chunk_bytes = 32 * 1024;

    struct Header {
        Label label;
        std::uint32_t tag;
        std::uint32_t offer;  // an Offer; staged: the bytes follow
        std::uint64_t bytes;
        std::uint64_t address;

        bool lent() const { return static_cast<Offer>(offer) != Offer::staged; }
    };

    // A message that nobody had asked for when it came.
    struct Kept {
        Header header;
        std::vector<std::byte> data;
    };

    using Queue = std::deque<std::shared_ptr<Message>>;

    struct Link {
        PipeWriter writer;
        PipeReader reader;
        const std::byte* heap;
        pid_t process;  // 0: its memory cannot be read
        Queue sends, receives;
        std::list<Kept> kept;
        std::shared_ptr<Message> arriving;  // the receive whose message is coming in
        Kept* keeping = nullptr;            // or the message being kept
        std::size_t kept_so_far = 0;
    };

    void finish(Queue& queue, Queue::iterator position) {
        (*position)->done.store(true, std::memory_order_release);
        queue.erase(position);
        --pending_;
    }

    Header header_of(const Message& message) const {
        Header header{message.label, message.tag, static_cast<std::uint32_t>(Offer::staged), message.bytes, 0};
        if (message.bytes >= heap_from && heap_.holds(message.data, message.bytes)) {
            header.offer = static_cast<std::uint32_t>(Offer::in_heap);
            header.address = static_cast<std::uint64_t>(message.data - heap_.begin);
        } else if (message.bytes >= process_from && readable_) {
            header.offer = static_cast<std::uint32_t>(Offer::in_process);
            header.address = reinterpret_cast<std::uintptr_t>(message.data);
        }
        return header;
    }

    // Copies a lent message; false when its sender has ended.
    static bool read_lent(const Link& link, const Header& header, std::byte* target) {
        if (static_cast<Offer>(header.offer) == Offer::in_process) {
            return transports::read_process(link.process, header.address, target, header.bytes);
        }
        if (header.bytes >= transports::past_caches_from) {
            transports::copy_past_caches(target, link.heap + header.address, header.bytes);
        } else {
            std::memcpy(target, link.heap + header.address, header.bytes);
        }
        return true;
    }

    // Whether the message is wholly gone.
    bool step_send(Link& link, Message& message, bool& moved) {
        if (!message.begun) {
            if (link.writer.room(sizeof(Header)) < sizeof(Header)) return false;
            const Header header = header_of(message);
            if (!header.lent() && message.bytes <= small_message &&
                link.writer.room(sizeof header + message.bytes) >= sizeof header + message.bytes) {
                std::byte together[sizeof header + small_message];
                std::memcpy(together, &header, sizeof header);
                if (message.bytes > 0) std::memcpy(together + sizeof header, message.data, message.bytes);
                link.writer.try_send({together, sizeof header + message.bytes});
                traffic_.sent[message.peer] += message.bytes;
                moved = true;
                return true;
            }
            link.writer.try_send(std::as_bytes(std::span(&header, 1)));
            message.begun = moved = true;
            message.end = link.writer.written();
            if (header.lent()) {
                message.moved = message.bytes;
                traffic_.sent[message.peer] += message.bytes;
            } else {
                message.end = 0;
            }
        }
        while (message.moved < message.bytes) {
            const std::size_t length = std::min(chunk_bytes, message.bytes - message.moved);
            const std::size_t sent = link.writer.try_send({message.data + message.moved, length});
            if (sent == 0) return false;
            message.moved += sent;
            traffic_.sent[message.peer] += sent;
            moved = true;
        }
        return message.end == 0 || link.writer.read_up_to(message.end);
    }

    // Takes one step with this peer's stream; whether another may follow at once.
    bool step_receive(Link& link, bool& moved) {
        if (link.arriving) return fill_receive(link, moved);
        if (link.keeping != nullptr) return fill_kept(link, moved);
        for (auto receive = link.receives.begin(); receive != link.receives.end(); ++receive) {
            for (auto kept = link.kept.begin(); kept != link.kept.end(); ++kept) {
                if (kept->header.tag != (*receive)->tag) continue;
                if (!fits(*receive, kept->header)) return false;
                if (!kept->data.empty()) std::memcpy((*receive)->data, kept->data.data(), kept->data.size());
                traffic_.received[(*receive)->peer] += kept->data.size();
                link.kept.erase(kept);
                finish(link.receives, receive);
                return moved = true;
            }
        }
        if (link.reader.available(sizeof(Header)) < sizeof(Header)) return false;
        Header header;
        link.reader.peek(reinterpret_cast<std::byte*>(&header), sizeof header);
        const auto wanted = std::find_if(link.receives.begin(), link.receives.end(),
                                         [&](const auto& receive) { return receive->tag == header.tag; });
        if (wanted == link.receives.end()) {
            Kept kept{header, std::vector<std::byte>(header.bytes)};
            if (header.lent() && !read_lent(link, header, kept.data.data())) return false;
            link.kept.push_back(std::move(kept));
            link.keeping = &link.kept.back();
            link.kept_so_far = header.lent() ? header.bytes : 0;
            link.reader.advance(sizeof header);
            moved = true;
            return fill_kept(link, moved);
        }
        if (!fits(*wanted, header)) return false;
        if (header.lent()) {
            if (!read_lent(link, header, (*wanted)->data)) return false;
            (*wanted)->moved = header.bytes;
            traffic_.received[(*wanted)->peer] += header.bytes;
        }
        link.arriving = *wanted;
        link.reader.advance(sizeof header);
        moved = true;
        return fill_receive(link, moved);
    }

    bool fits(const std::shared_ptr<Message>& receive, const Header& header) {
        if (receive->label == header.label) return true;
        differing_ = receive;
        their_label_ = header.label;
        return false;
    }

    // Copies what has come to `target`; returns how many bytes.
    static std::size_t take(Link& link, std::byte* target, std::size_t wanted) {
        const auto view = link.reader.arrived();
        const std::size_t length = std::min({view.size(), wanted, chunk_bytes});
        if (length == 0) return 0;
        std::memcpy(target, view.data(), length);
        link.reader.advance(length);
        return length;
    }

    bool fill_receive(Link& link, bool& moved) {
        Message& message = *link.arriving;
        while (message.moved < message.bytes) {
            const std::size_t length = take(link, message.data + message.moved, message.bytes - message.moved);
            if (length == 0) return false;
            message.moved += length;
            traffic_.received[message.peer] += length;
            moved = true;
        }
        finish(link.receives, std::find(link.receives.begin(), link.receives.end(), link.arriving));
        link.arriving.reset();
        return true;
    }

    bool fill_kept(Link& link, bool& moved) {
        std::vector<std::byte>& data = link.keeping->data;
        while (link.kept_so_far < data.size()) {
            const std::size_t length = take(link, data.data() + link.kept_so_far, data.size() - link.kept_so_far);
            if (length == 0) return false;
            link.kept_so_far += length;
            moved = true;
        }
        link.keeping = nullptr;
        return true;
    }

    static constexpr std::size_t small_message = 1024;

    Traffic& traffic_;
    HeapRange heap_;
    bool readable_;  // whether the other ranks may read our memory
    std::vector<Link> links_;
    std::size_t pending_ = 0;
    std::shared_ptr<Message> differing_;
    Label their_label_{};
};

}  // namespace collectives::engine
