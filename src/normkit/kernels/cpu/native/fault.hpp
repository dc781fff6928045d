// Planted faults, for the tests of the tests. A library built with NORMKIT_FAULTS has the
// one that the environment variable NORMKIT_FAULT names; any other library has none, and
// the same machine code as without these lines.
#pragma once
#ifdef NK_FAULTS
#include <cstdlib>
#include <cstring>
#endif

namespace normkit {

#ifdef NK_FAULTS
inline bool planted(const char* name) {
  static const char* const chosen = std::getenv("NORMKIT_FAULT");
  return chosen && !std::strcmp(chosen, name);
}
#else
constexpr bool planted(const char*) { return false; }
#endif

}  // namespace normkit
