#include "scratch.hpp"

#include <cstdlib>
#include <new>

namespace normkit {
namespace {

// Vectors that do not fit are allocated separately; the block grows when it is empty. A
// thread never keeps more than kMost for the next call.
class Stack {
 public:
  ~Stack() { std::free(block_); }
  void* take(size_t bytes) {
    bytes = rounded(bytes);
    if (!used_ && wanted_ > size_) grow();
    if (bytes <= size_ - used_) {
      used_ += bytes;
      return block_ + used_ - bytes;
    }
    wanted_ = std::min(kMost, std::max(wanted_, 2 * (used_ + bytes)));
    return allocate(bytes);
  }
  void give_back(void* p, size_t bytes) {
    if (p >= block_ && p < block_ + size_) used_ -= rounded(bytes);
    else std::free(p);
  }

 private:
  static constexpr size_t kLine = 64, kMost = 4 << 20;
  static size_t rounded(size_t bytes) { return (bytes + kLine - 1) & ~(kLine - 1); }
  static char* allocate(size_t bytes) {
    void* p = std::aligned_alloc(kLine, bytes);
    if (!p) throw std::bad_alloc();
    return static_cast<char*>(p);
  }
  void grow() {
    std::free(block_);
    block_ = nullptr;
    size_ = 0;
    block_ = allocate(wanted_);
    size_ = wanted_;
  }
  char* block_ = nullptr;
  size_t size_ = 0, used_ = 0, wanted_ = 64 << 10;
};

Stack& stack() {
  static thread_local Stack stack;
  return stack;
}

}  // namespace

void* take_scratch(size_t bytes) { return stack().take(bytes); }
void give_back_scratch(void* p, size_t bytes) { stack().give_back(p, bytes); }

}  // namespace normkit
