// What the bindings share: the memory of an array, and when to let go of the interpreter.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>

namespace collectives::kernels {

namespace nb = nanobind;

// Below this many bytes, handing the interpreter lock over costs more than it frees.
inline constexpr std::size_t release_lock_from = 32 * 1024;

// The memory of a contiguous array, held as long as this lives; empty where the object has none of the kind asked for.
class Buffer {
  public:
    explicit Buffer(nb::handle object, int flags = PyBUF_SIMPLE) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) PyErr_Clear();
    }
    Buffer(Buffer&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    Buffer& operator=(Buffer&&) = delete;
    ~Buffer() {
        if (view_.obj != nullptr) PyBuffer_Release(&view_);
    }

    explicit operator bool() const { return view_.obj != nullptr; }
    std::byte* data() const { return static_cast<std::byte*>(view_.buf); }
    std::size_t bytes() const { return static_cast<std::size_t>(view_.len); }

    // Of the same size, and either the same memory or apart.
    bool fits(const Buffer& out) const {
        if (!*this || bytes() != out.bytes()) return false;
        const auto mine = reinterpret_cast<std::uintptr_t>(data());
        const auto other = reinterpret_cast<std::uintptr_t>(out.data());
        return mine == other || mine + bytes() <= other || other + bytes() <= mine;
    }

  private:
    Py_buffer view_{};
};

template <typename Work>
void run(std::size_t bytes, const Work& work) {
    if (bytes < release_lock_from) {
        work();
    } else {
        const nb::gil_scoped_release unlocked;
        work();
    }
}

}  // namespace collectives::kernels
