// Working memory of a call: a stack per thread.
//
// A small call is a microsecond of arithmetic; allocating and clearing its vectors one by
// one took as long again.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace normkit {

// Memory aligned to cache lines, not cleared; released in the reverse order.
// Throws std::bad_alloc.
void* take_scratch(size_t bytes);
void give_back_scratch(void* p, size_t bytes);

template <class E> class Scratch {
 public:
  explicit Scratch(int64_t size)
      : bytes_((size_t)size * sizeof(E)),
        data_(size ? static_cast<E*>(take_scratch(bytes_)) : nullptr) {}
  Scratch(int64_t size, E value) : Scratch(size) { std::fill(data_, data_ + size, value); }
  ~Scratch() {
    if (data_) give_back_scratch(data_, bytes_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  E* data() const { return data_; }
  E& operator[](int64_t k) const { return data_[k]; }

 private:
  const size_t bytes_;
  E* const data_;
};

}  // namespace normkit
