// One call of a collective on one rank, as a state machine over a board: `step` does what can be done now and never
// waits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "board.hpp"
#include "copy.hpp"
#include "plan.hpp"

namespace collectives::engine {

using transports::Address;
using transports::Board;
using transports::Counters;
using transports::Offer;
using transports::Slot;

enum class Progress : std::uint8_t { blocked, moved, done, mismatch };

struct Traffic {
    std::vector<std::uint64_t> sent, received;  // payload bytes, by peer
    explicit Traffic(std::size_t size) : sent(size, 0), received(size, 0) {}
};

// The part of a heap that an array may lie in, to tell whether it can be offered as it is.
struct HeapRange {
    const std::byte* begin = nullptr;
    const std::byte* end = nullptr;
    bool holds(const std::byte* data, std::size_t bytes) const {
        return data >= begin && bytes <= static_cast<std::size_t>(end - begin) && data <= end - bytes;
    }
};

class Operation {
  public:
    // `first_piece`: how many pieces all earlier calls had together. Arrays and `scratch` must live until `done`.
    Operation(Board& board, Traffic& traffic, std::vector<const std::byte*>& scratch, const Plan& plan,
              std::uint64_t call, std::uint64_t first_piece, HeapRange heap, const std::byte* input, std::byte* output)
        : board_(board),
          traffic_(traffic),
          sources_(scratch),
          plan_(plan),
          call_(call),
          first_(first_piece),
          heap_(heap),
          input_(input),
          output_(output) {}

    Progress step() {
        if (!entered_) {
            if (!board_.slot_free(call_)) return Progress::blocked;
            enter();
        }
        if (plan_.in_slot) return take_slots();
        return by_owners() ? reduce_by_owners() : pull_pieces();
    }

    std::uint64_t call() const { return call_; }
    const Plan& plan() const { return plan_; }
    std::size_t differing_peer() const { return differing_; }

    // The ranks whose part is missing for the next step, as far as can be told.
    std::vector<std::size_t> awaited() {
        std::vector<std::size_t> ranks;
        for (std::size_t peer = 0; peer < board_.size(); ++peer) {
            if (peer != board_.rank() && board_.last_call(peer) < call_) ranks.push_back(peer);
        }
        if (!ranks.empty()) return ranks;
        for (std::size_t peer = 0; peer < board_.size(); ++peer) {
            if (peer == board_.rank()) continue;
            const std::uint64_t next = first_ + std::min(taken_ + 1, plan_.pieces);
            if (!board_.reached(peer, &Counters::produced, next) || !board_.reached(peer, &Counters::consumed, next)) {
                ranks.push_back(peer);
            }
        }
        return ranks;
    }

  private:
    // From how many bytes a block is read from the other process rather than staged: below, the system call costs more.
    static constexpr std::size_t read_from = 32 * 1024;

    bool by_owners() const { return !plan_.shares.empty(); }

    void enter() {
        entered_ = true;
        offers_ = !plan_.offered.empty();
        Slot& own = board_.slot(board_.rank(), call_);
        Offer offer = Offer::staged;
        if (plan_.in_slot) {
            offer = Offer::in_slot;
            if (offers_) {
                std::memcpy(own.payload, input_, plan_.input_bytes);
                for (const auto& block : plan_.offered) count_sent(block.reader, block.bytes);
            }
        } else if (offers_ && heap_.holds(input_, plan_.input_bytes) && can_lend()) {
            offer = Offer::in_heap;
            const Address address{static_cast<std::uint64_t>(input_ - heap_.begin)};
            std::memcpy(own.payload, &address, sizeof address);
        } else if (offers_ && board_.self().process != 0 && plan_.reduction.fold == nullptr &&
                   plan_.collective != Collective::gather && can_lend() && plan_.largest_block >= read_from) {
            offer = Offer::in_process;
            const Address address{reinterpret_cast<std::uintptr_t>(input_)};
            std::memcpy(own.payload, &address, sizeof address);
        }
        offer_ = offer;
        board_.publish(call_, offer, plan_.label);
        if (plan_.in_slot || by_owners()) return;
        if (offer_ != Offer::staged || !offers_) {
            produced_ = plan_.pieces;
            board_.advance(&Counters::produced, first_ + plan_.pieces);
            if (offers_) {
                for (const auto& block : plan_.offered) count_sent(block.reader, block.bytes);
            }
        }
        if (plan_.pulls.empty()) {
            taken_ = plan_.pieces;
            board_.advance(&Counters::consumed, first_ + plan_.pieces);
        }
        board_.advance(&Counters::reduced, first_ + plan_.pieces);
    }

    // An input may be read by others in place only while this rank does not write to it. What is lent is copied by
    // those who take it alone: to or from a root, from `shared_work_from` bytes on, two copies in which all take part
    // are quicker.
    bool can_lend() const {
        constexpr std::size_t shared_work_from = 8 * 1024 * 1024;
        const bool gathers = plan_.collective == Collective::gather;
        if ((gathers || plan_.collective == Collective::broadcast) &&
            plan_.input_bytes * (gathers ? board_.size() : 1) >= shared_work_from) {
            return false;
        }
        if (by_owners() || plan_.output_bytes == 0) return true;
        const bool apart = output_ + plan_.output_bytes <= input_ || input_ + plan_.input_bytes <= output_;
        return apart || plan_.collective == Collective::all_gather || plan_.collective == Collective::broadcast ||
               plan_.collective == Collective::gather || plan_.collective == Collective::reduce_scatter ||
               plan_.collective == Collective::scatter;
    }

    // A block that is moved as it is, to where it stays. (An all_reduce has its target's lines in the caches already.)
    void copy_out(std::byte* target, const std::byte* source, std::size_t length) const {
        if (plan_.input_bytes + plan_.output_bytes >= transports::past_caches_from) {
            transports::copy_past_caches(target, source, length);
        } else {
            std::memcpy(target, source, length);
        }
    }

    void count_sent(std::size_t reader, std::size_t bytes) {
        if (reader == Offered::everyone || reader == Offered::above) {
            for (std::size_t peer = reader == Offered::above ? board_.rank() : 0; peer < board_.size(); ++peer) {
                if (peer != board_.rank()) traffic_.sent[peer] += bytes;
            }
        } else if (reader != board_.rank()) {
            traffic_.sent[reader] += bytes;
        }
    }

    // Whether the header of `peer` is there; compares its label once.
    bool header(std::size_t peer) {
        if (!board_.arrived(peer, call_)) return false;
        if (std::memcmp(board_.slot(peer, call_).label.data(), plan_.label.data(), plan_.label.size()) != 0) {
            differing_ = peer;
            differs_ = true;
        }
        return true;
    }

    Progress take_slots() {
        const bool folds = plan_.reduction.fold != nullptr;
        const auto begin = taken_;
        for (; taken_ < plan_.pulls.size(); ++taken_) {
            const Pull& pull = plan_.pulls[taken_];
            if (pull.source != board_.rank()) {
                if (!header(pull.source)) return taken_ > begin ? Progress::moved : Progress::blocked;
                if (differs_) return Progress::mismatch;
                traffic_.received[pull.source] += pull.bytes;
            }
            // Our own block is taken from the slot too: where input and output are the same array, it may be gone
            // already.
            if (!folds && pull.bytes > 0) {
                std::memcpy(output_ + pull.out, board_.slot(pull.source, call_).payload + pull.offset, pull.bytes);
            }
        }
        if (folds && !plan_.pulls.empty() && plan_.output_bytes > 0) {
            sources_.resize(plan_.pulls.size());
            for (std::size_t i = 0; i < plan_.pulls.size(); ++i) {
                const Pull& pull = plan_.pulls[i];
                sources_[i] = pull.source == board_.rank() ? input_ + pull.offset
                                                           : board_.slot(pull.source, call_).payload + pull.offset;
            }
            fold(sources_.data(), plan_.pulls.size(), output_, plan_.output_bytes);
        }
        return Progress::done;
    }

    void fold(const std::byte* const* sources, std::size_t number, std::byte* out, std::size_t bytes) const {
        const Reduction& reduction = plan_.reduction;
        const std::size_t count = bytes / reduction.element_bytes;
        reduction.fold(sources, number, out, count);
        if (reduction.scale != nullptr) reduction.scale(out, count, reduction.factor);
    }

    // What piece `piece` takes of a block of `bytes`: begin and length.
    std::size_t slice_begin(std::uint64_t piece) const { return static_cast<std::size_t>(piece) * plan_.slice_bytes; }
    std::size_t slice_length(std::uint64_t piece, std::size_t bytes) const {
        const std::size_t begin = slice_begin(piece);
        return begin >= bytes ? 0 : std::min(plan_.slice_bytes, bytes - begin);
    }

    // Whether the staging rings have room for `piece`: all ranks have taken the piece that lies there.
    bool room(std::uint64_t piece) {
        const std::uint64_t number = first_ + piece;
        if (number < Geometry::pieces) return true;
        const std::uint64_t needed = number - Geometry::pieces + 1;
        if (consumed_by_all_ >= needed) return true;
        if (!board_.all_reached(&Counters::consumed, needed)) return false;
        consumed_by_all_ = needed;
        return true;
    }

    Progress pull_pieces() {
        bool moved = false;
        for (;;) {
            bool now = false;
            if (produced_ < plan_.pieces && produced_ < taken_ + lead() && room(produced_)) {
                put_out();
                now = true;
            }
            if (taken_ < plan_.pieces) {
                if (sources_ready()) {
                    now = take_in() || now;
                } else if (differs_) {
                    return Progress::mismatch;
                }
            }
            if (!now) break;
            moved = true;
        }
        if (produced_ == plan_.pieces && taken_ == plan_.pieces) {
            const bool lent = offers_ && offer_ != Offer::staged;
            if (!lent || board_.all_reached(&Counters::consumed, first_ + plan_.pieces)) return Progress::done;
        }
        return moved ? Progress::moved : Progress::blocked;
    }

    // How many pieces this rank puts out ahead of those it takes in: one is under way while the one before is taken.
    std::uint64_t lead() const { return plan_.pulls.empty() ? plan_.pieces : 2; }

    void put_out() {
        std::byte* const target = board_.staging(board_.rank(), first_ + produced_);
        for (std::size_t index = 0; index < plan_.offered.size(); ++index) {
            const Offered& block = plan_.offered[index];
            const std::size_t length = slice_length(produced_, block.bytes);
            if (length == 0 || block.reader == board_.rank()) continue;
            std::memcpy(target + index * plan_.slice_bytes, input_ + block.offset + slice_begin(produced_), length);
            count_sent(block.reader, length);
        }
        ++produced_;
        board_.advance(&Counters::produced, first_ + produced_);
    }

    bool sources_ready() {
        for (const Pull& pull : plan_.pulls) {
            if (pull.source == board_.rank()) {
                if (produced_ <= taken_) return false;
                continue;
            }
            if (taken_ == 0 && (!header(pull.source) || differs_)) return false;
            if (!board_.reached(pull.source, &Counters::produced, first_ + taken_ + 1)) return false;
        }
        return true;
    }

    Address address_at(std::size_t source) const {
        Address address;
        std::memcpy(&address, board_.slot(source, call_).payload, sizeof address);
        return address;
    }

    // Where the piece to be taken next lies; in our memory, whatever it is offered by.
    const std::byte* source_of(const Pull& pull) const {
        if (pull.source == board_.rank()) return input_ + pull.offset + slice_begin(taken_);
        if (board_.offer(pull.source, call_) == Offer::in_heap) {
            return board_.member(pull.source).heap + address_at(pull.source).offset + pull.offset + slice_begin(taken_);
        }
        return board_.staging(pull.source, first_ + taken_) + pull.index * plan_.slice_bytes;
    }

    // Whether the piece could be taken: a process that has ended cannot be read.
    bool take_in() {
        if (plan_.reduction.fold != nullptr) {
            const std::size_t length = slice_length(taken_, plan_.output_bytes);
            sources_.clear();
            for (const Pull& pull : plan_.pulls) {
                sources_.push_back(source_of(pull));
                if (pull.source != board_.rank()) traffic_.received[pull.source] += length;
            }
            if (length > 0) fold(sources_.data(), sources_.size(), output_ + slice_begin(taken_), length);
        } else {
            for (const Pull& pull : plan_.pulls) {
                const std::size_t length = slice_length(taken_, pull.bytes);
                if (length == 0) continue;
                std::byte* const target = output_ + pull.out + slice_begin(taken_);
                const bool own = pull.source == board_.rank();
                if (!own && board_.offer(pull.source, call_) == Offer::in_process) {
                    const std::uint64_t address = address_at(pull.source).offset + pull.offset + slice_begin(taken_);
                    if (!transports::read_process(board_.member(pull.source).process, address, target, length))
                        return false;
                } else {
                    const std::byte* const source = source_of(pull);
                    if (source != target) copy_out(target, source, length);
                }
                if (!own) traffic_.received[pull.source] += length;
            }
        }
        ++taken_;
        board_.advance(&Counters::consumed, first_ + taken_);
        return true;
    }

    Progress reduce_by_owners() {
        if (offer_ == Offer::in_heap && !agreed_) {
            if (!headers()) return differs_ ? Progress::mismatch : Progress::blocked;
            bool all_lend = true;
            for (std::size_t peer = 0; peer < board_.size(); ++peer) {
                all_lend = all_lend && board_.offer(peer, call_) == Offer::in_heap;
            }
            agreed_ = true;
            if (all_lend) {
                reduce_in_place();
                in_place_ = true;
                finish_counters();
            }
        }
        if (in_place_) {
            return board_.all_reached(&Counters::reduced, first_ + plan_.pieces) ? Progress::done : Progress::blocked;
        }
        return reduce_staged();
    }

    void finish_counters() {
        board_.advance(&Counters::produced, first_ + plan_.pieces);
        board_.advance(&Counters::consumed, first_ + plan_.pieces);
        board_.advance(&Counters::reduced, first_ + plan_.pieces);
    }

    // All arrays lie in heaps: one pass that reads this rank's share from all and stores the result to all.
    void reduce_in_place() {
        constexpr std::size_t block_bytes = 8 * 1024;
        const std::size_t rank = board_.rank();
        const Share own = plan_.shares[rank];
        std::vector<std::byte*> arrays(board_.size());
        for (std::size_t peer = 0; peer < board_.size(); ++peer) {
            arrays[peer] = board_.member(peer).heap + address_at(peer).offset + own.offset;
        }
        sources_.resize(board_.size());
        for (std::size_t begin = 0; begin < own.bytes; begin += block_bytes) {
            const std::size_t length = std::min(block_bytes, own.bytes - begin);
            for (std::size_t peer = 0; peer < board_.size(); ++peer) sources_[peer] = arrays[peer] + begin;
            std::byte* const mine = arrays[rank] + begin;
            fold(sources_.data(), sources_.size(), mine, length);
            for (std::size_t i = 1; i < board_.size(); ++i) {
                std::memcpy(arrays[(rank + i) % board_.size()] + begin, mine, length);
            }
        }
        for (std::size_t peer = 0; peer < board_.size(); ++peer) {
            if (peer == rank) continue;
            // What the owner of a share reads of ours is sent to it, what it stores to us is received; and so for our
            // own.
            traffic_.sent[peer] += plan_.shares[peer].bytes + own.bytes;
            traffic_.received[peer] += own.bytes + plan_.shares[peer].bytes;
        }
    }

    // Piece by piece: copy the shares of others to the staging ring, fold one's own share, take theirs. The place of
    // one's own share in the staging ring is free for its result.
    Progress reduce_staged() {
        bool moved = false;
        for (;;) {
            bool now = false;
            if (produced_ < plan_.pieces && produced_ < taken_ + 3 && produced_ < reduced_ + 2 && room(produced_)) {
                put_out_shares();
                now = true;
            }
            if (reduced_ < produced_ && peers_reached(&Counters::produced, reduced_)) {
                fold_share();
                now = true;
            } else if (differs_) {
                return Progress::mismatch;
            }
            if (taken_ < reduced_ && peers_reached(&Counters::reduced, taken_)) {
                take_shares();
                now = true;
            }
            if (!now) break;
            moved = true;
        }
        if (taken_ == plan_.pieces) return Progress::done;
        return moved ? Progress::moved : Progress::blocked;
    }

    // Whether every rank has begun this call, and the same one.
    bool headers() {
        for (std::size_t peer = 0; peer < board_.size(); ++peer) {
            if (peer != board_.rank() && (!header(peer) || differs_)) return false;
        }
        return true;
    }

    bool peers_reached(std::uint64_t Counters::* counter, std::uint64_t piece) {
        if (piece == 0 && counter == &Counters::produced && !headers()) return false;
        return board_.all_reached(counter, first_ + piece + 1);
    }

    void put_out_shares() {
        std::byte* const target = board_.staging(board_.rank(), first_ + produced_);
        for (std::size_t peer = 0; peer < board_.size(); ++peer) {
            const Share& theirs = plan_.shares[peer];
            const std::size_t length = slice_length(produced_, theirs.bytes);
            if (peer == board_.rank() || length == 0) continue;
            std::memcpy(target + peer * plan_.slice_bytes, input_ + theirs.offset + slice_begin(produced_), length);
            traffic_.sent[peer] += length;
        }
        ++produced_;
        board_.advance(&Counters::produced, first_ + produced_);
    }

    void fold_share() {
        const std::size_t rank = board_.rank();
        const Share& own = plan_.shares[rank];
        const std::size_t length = slice_length(reduced_, own.bytes);
        if (length > 0) {
            const std::size_t place = rank * plan_.slice_bytes;
            std::byte* const mine = output_ + own.offset + slice_begin(reduced_);
            sources_.resize(board_.size());
            for (std::size_t peer = 0; peer < board_.size(); ++peer) {
                sources_[peer] = peer == rank ? mine : board_.staging(peer, first_ + reduced_) + place;
                if (peer != rank) traffic_.received[peer] += length;
            }
            fold(sources_.data(), sources_.size(), mine, length);
            std::memcpy(board_.staging(rank, first_ + reduced_) + place, mine, length);
            count_sent(Offered::everyone, length);
        }
        ++reduced_;
        board_.advance(&Counters::reduced, first_ + reduced_);
    }

    void take_shares() {
        const std::size_t rank = board_.rank();
        for (std::size_t i = 1; i < board_.size(); ++i) {
            const std::size_t peer = (rank + i) % board_.size();
            const Share& theirs = plan_.shares[peer];
            const std::size_t length = slice_length(taken_, theirs.bytes);
            if (length == 0) continue;
            const std::byte* const source = board_.staging(peer, first_ + taken_) + peer * plan_.slice_bytes;
            std::memcpy(output_ + theirs.offset + slice_begin(taken_), source, length);
            traffic_.received[peer] += length;
        }
        ++taken_;
        board_.advance(&Counters::consumed, first_ + taken_);
    }

    Board& board_;
    Traffic& traffic_;
    std::vector<const std::byte*>& sources_;
    const Plan& plan_;
    std::uint64_t call_;
    std::uint64_t first_;
    HeapRange heap_;
    const std::byte* input_;
    std::byte* output_;
    Offer offer_ = Offer::staged;
    bool entered_ = false, offers_ = false, agreed_ = false, in_place_ = false, differs_ = false;
    std::size_t differing_ = 0;
    std::uint64_t produced_ = 0, reduced_ = 0, taken_ = 0;
    std::uint64_t consumed_by_all_ = 0;
};

}  // namespace collectives::engine
