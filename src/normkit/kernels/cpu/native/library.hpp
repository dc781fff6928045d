// The two calls that `entries.cpp` runs; `library.cpp` has all.
#pragma once

extern "C" {
int normkit_forward(const void* call);
int normkit_backward(const void* call);
}
