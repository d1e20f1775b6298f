// The two ends of a byte stream through a ring in shared memory, which lies on the sender's board.
//
// `written` and `read` count the bytes since the beginning and never wrap round; each has one writer. An end caches the
// other's counter and looks at it again only when it seems to have no room, or nothing to read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "board.hpp"

namespace collectives::transports {

class PipeWriter {
  public:
    PipeWriter(const Board& board, std::size_t peer, Lane lane = Lane::messages)
        : ring_(board.pipe(board.rank(), peer, lane)),
          size_(board.geometry().pipe_bytes()),
          written_word_(&board.stream(board.rank(), peer, lane).written),
          read_word_(&board.stream(peer, board.rank(), lane).read),
          door_(&board.member(peer).door()) {}

    // Writes as many bytes as there is room for now, and returns how many.
    std::size_t try_send(std::span<const std::byte> data) {
        const std::size_t length = std::min(data.size(), room(data.size()));
        if (length == 0) return 0;
        const std::size_t begin = written_ % size_;
        const std::size_t first = std::min(length, size_ - begin);
        std::memcpy(ring_ + begin, data.data(), first);
        std::memcpy(ring_, data.data() + first, length - first);
        written_ += length;
        atomic(*written_word_).store(written_, std::memory_order_release);
        ring(*door_);
        return length;
    }

    // Bytes that can be written now; exact below `wanted`.
    std::size_t room(std::size_t wanted) {
        if (size_ - (written_ - read_) < wanted) read_ = atomic(*read_word_).load(std::memory_order_acquire);
        return size_ - static_cast<std::size_t>(written_ - read_);
    }

    std::uint64_t written() const { return written_; }

    // Whether the receiver has read everything up to `position`.
    bool read_up_to(std::uint64_t position) {
        if (read_ < position) read_ = atomic(*read_word_).load(std::memory_order_acquire);
        return read_ >= position;
    }

  private:
    std::byte* ring_;
    std::size_t size_;
    std::uint64_t* written_word_;
    std::uint64_t* read_word_;
    Doorbell* door_;
    std::uint64_t written_ = 0, read_ = 0;
};

class PipeReader {
  public:
    PipeReader(const Board& board, std::size_t peer, Lane lane = Lane::messages)
        : ring_(board.pipe(peer, board.rank(), lane)),
          size_(board.geometry().pipe_bytes()),
          written_word_(&board.stream(peer, board.rank(), lane).written),
          read_word_(&board.stream(board.rank(), peer, lane).read),
          door_(&board.member(peer).door()) {}

    // How many bytes have come and are not read yet; exact below `wanted`.
    std::size_t available(std::size_t wanted) {
        if (written_ - read_ < wanted) written_ = atomic(*written_word_).load(std::memory_order_acquire);
        return static_cast<std::size_t>(written_ - read_);
    }

    // What has come, as far as it lies in one piece; valid until `advance`.
    std::span<const std::byte> arrived() {
        const std::size_t begin = read_ % size_;
        return {ring_ + begin, std::min(available(1), size_ - begin)};
    }

    // The first `length` bytes of what has come, which may lie round the end of the ring, without advancing.
    void peek(std::byte* target, std::size_t length) const {
        const std::size_t begin = read_ % size_;
        const std::size_t first = std::min(length, size_ - begin);
        std::memcpy(target, ring_ + begin, first);
        std::memcpy(target + first, ring_, length - first);
    }

    void advance(std::size_t length) {
        read_ += length;
        atomic(*read_word_).store(read_, std::memory_order_release);
        ring(*door_);
    }

  private:
    std::byte* ring_;
    std::size_t size_;
    std::uint64_t* written_word_;
    std::uint64_t* read_word_;
    Doorbell* door_;
    std::uint64_t written_ = 0, read_ = 0;
};

}  // namespace collectives::transports
