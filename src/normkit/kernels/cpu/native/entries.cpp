// The functions that Python calls with tensors: the signature of a call, forward,
// backward. `functional/signature.py` says what a signature is, `kernels/cpu/call.py` what
// a forward keeps.
//
// Between two backwards Python runs out of cold caches: a signature of 20 attributes took
// 12 µs there (5 in a loop), a call by ctypes with two addresses 5 (2.5). What is here
// takes 2 together.
#include <cstring>
#include <initializer_list>

#include "call.hpp"
#include "fault.hpp"
#include "library.hpp"
#include "tensor.hpp"
#include "verify.hpp"

namespace normkit {
namespace {

// The bytes of a signature.
class Key {
 public:
  void add(int64_t value) {
    if (used_ + sizeof value > sizeof bytes_) is_full_ = true;
    if (is_full_) return;
    std::memcpy(bytes_ + used_, &value, sizeof value);
    used_ += sizeof value;
  }
  void add(const View& view, bool with_strides) {
    add(view.dtype * 256 + view.dimensions);
    for (int d = 0; d < view.dimensions; ++d) add(view.shape[d]);
    for (int d = 0; with_strides && d < view.dimensions; ++d) add(view.strides[d]);
  }
  PyObject* bytes() const {
    return is_full_ ? nullptr : PyBytes_FromStringAndSize(bytes_, (std::ptrdiff_t)used_);
  }

 private:
  char bytes_[1024];
  std::size_t used_ = 0;
  bool is_full_ = false;
};

bool is_present(PyObject* const* args, std::ptrdiff_t n, int k) {
  return k < n && args[k] != torch.none;
}

bool is_negative(PyObject* tensor) {
  if (planted("no_values_are_negated")) return false;
  const Reference found(PyObject_CallMethodObjArgs(tensor, torch.is_neg, nullptr));
  return found.get() == torch.is_true;
}

// A plain tensor in CPU memory whose values lie at its address.
bool read(Reader& reader, PyObject* object, View& view) {
  return is_plain(object) && reader.read(object, view) && view.is_on_cpu &&
         !is_negative(object);
}

bool add_vector(Key& key, PyObject* object) {
  Reader reader;
  View view;
  if (!read(reader, object, view) || view.dtype > kFloat64 || !view.is_contiguous()) {
    return false;
  }
  key.add(view, false);
  return true;
}

// Mean, variance, rate, counters, one more: `kernels.spec.Running`.
bool add_running(Key& key, PyObject* running) {
  PyObject *mean = PyTuple_GetItem(running, 0), *var = PyTuple_GetItem(running, 1);
  if (!mean || !var || (mean == torch.none) != (var == torch.none)) return false;
  key.add(mean != torch.none);
  if (mean != torch.none) {
    for (PyObject* statistic : {mean, var}) {
      if (is_true_of(statistic, torch.requires_grad)) return false;
      if (!add_vector(key, statistic)) return false;
    }
  }
  for (int k : {3, 4}) {
    PyObject* counter = PyTuple_GetItem(running, k);
    if (!counter) return false;
    key.add(counter != torch.none);
    if (counter == torch.none) continue;
    Reader reader;
    View view;
    if (!read(reader, counter, view) || view.dtype != kInt64 || view.size() != 1) return false;
  }
  return true;
}

// operation, x, weight, bias, residual, mask, running; the last ones may be missing.
// Null, with an exception set or not, where the call cannot be cached.
PyObject* key_of(PyObject* const* args, std::ptrdiff_t n) {
  Key key;
  Reader reader;
  View x, other;
  if (!read(reader, args[1], x) || x.dtype > kFloat64) return nullptr;
  key.add(x, !planted("signatures_leave_out_strides"));
  for (int k : {2, 3}) {
    key.add(is_present(args, n, k));
    if (is_present(args, n, k) && !add_vector(key, args[k])) return nullptr;
  }
  key.add(is_present(args, n, 4));
  if (is_present(args, n, 4) &&
      (!read(reader, args[4], other) || !other.has_shape_of(x))) {
    return nullptr;
  }
  key.add(is_present(args, n, 5));
  if (is_present(args, n, 5)) {
    if (!read(reader, args[5], other) || other.dtype != kBool) return nullptr;
    key.add(other, false);
  }
  key.add(is_present(args, n, 6));
  if (planted("signatures_leave_out_running")) n = 6;
  if (is_present(args, n, 6) && !add_running(key, args[6])) return nullptr;
  const Reference threads(PyObject_CallFunctionObjArgs(torch.number_of_threads, nullptr));
  if (!threads) return nullptr;
  key.add(PyLong_AsLongLong(threads.get()));
  const Reference backend(PyObject_CallFunctionObjArgs(torch.backend, nullptr));
  const Reference bytes(key.bytes());
  if (!backend || !bytes) return nullptr;
  return PyTuple_Pack(3, args[0], bytes.get(), backend.get());
}

PyObject* none() {
  Py_IncRef(torch.none);
  return torch.none;
}

// The signature, or None.
PyObject* signature(PyObject*, PyObject* const* args, std::ptrdiff_t n) {
  PyObject* key = key_of(args, n);
  if (key) return key;
  PyErr_Clear();
  return none();
}

// The value of a dictionary, its first argument, under the signature; None without one.
PyObject* find(PyObject*, PyObject* const* args, std::ptrdiff_t n) {
  const Reference key(key_of(args + 1, n - 1));
  if (!key) {
    PyErr_Clear();
    return none();
  }
  PyObject* found = PyDict_GetItemWithError(args[0], key.get());
  if (!found && PyErr_Occurred()) return nullptr;
  found = found ? found : torch.none;
  Py_IncRef(found);
  return found;
}

// Sets the address of a tensor, null for None. False with an exception.
template <typename T>
bool set(T*& pointer, PyObject* object) {
  void* address = nullptr;
  if (object != torch.none && !read_address(object, address)) return false;
  pointer = static_cast<T*>(address);
  return true;
}

bool set_fixed(Call& call, PyObject* fixed) {
  const char* bytes = PyBytes_AsString(fixed);
  if (!bytes) return false;
  std::memcpy(&call, bytes, (std::size_t)PyBytes_Size(fixed));
  return true;
}

// The rows of what a forward kept: mean, 1/std, and if there are four m2 and count.
bool set_kept(Call& call, PyObject* object) {
  if (object == torch.none) return true;
  View view;
  Reader reader;
  if (!reader.read(object, view)) return false;
  const int64_t n = call.statistics() - planted("kept_rows_overlap");
  call.center = static_cast<double*>(view.data);
  call.scale = call.center + n;
  if (view.shape[0] == 4) {
    call.m2 = call.scale + n;
    if (call.mask) call.count = reinterpret_cast<int64_t*>(call.m2 + n);
  }
  return true;
}

bool set_running(Call& call, PyObject* running) {
  if (running == torch.none) return true;
  PyObject* rate = PyTuple_GetItem(running, 2);
  if (!rate) return false;
  if (rate != torch.none) call.rate = PyFloat_AsDouble(rate);
  return !(call.rate == -1 && PyErr_Occurred()) &&
         set(call.running_mean, PyTuple_GetItem(running, 0)) &&
         set(call.running_var, PyTuple_GetItem(running, 1)) &&
         set(call.num_batches_tracked, PyTuple_GetItem(running, 3)) &&
         set(call.num_batches_skipped, PyTuple_GetItem(running, 4));
}

PyObject* run(const Call& call, int (*kernel)(const void*)) {
  PyThreadState* state = PyEval_SaveThread();
  const int status = kernel(&call);
  PyEval_RestoreThread(state);
  return PyLong_FromLong(status);
}

// fixed, x, weight, bias, residual, mask, running, kept, y, sum
PyObject* forward(PyObject*, PyObject* const* args, std::ptrdiff_t) {
  Call call{};
  if (!set_fixed(call, args[0]) || !set(call.x, args[1]) || !set(call.weight, args[2]) ||
      !set(call.bias, args[3]) || !set(call.residual, args[4]) || !set(call.mask, args[5]) ||
      !set_running(call, args[6]) || !set_kept(call, args[7]) || !set(call.y, args[8]) ||
      !set(call.sum, args[9])) {
    return nullptr;
  }
  return run(call, normkit_forward);
}

// fixed, x, weight, bias, residual, mask, gate, kept, dy, dsum, dx, dweight, dbias,
// dresidual
PyObject* backward(PyObject*, PyObject* const* args, std::ptrdiff_t) {
  Call call{};
  if (!set_fixed(call, args[0]) || !set(call.x, args[1]) || !set(call.weight, args[2]) ||
      !set(call.bias, args[3]) || !set(call.residual, args[4]) || !set(call.mask, args[5]) ||
      !set(call.gate, args[6]) || !set_kept(call, args[7]) || !set(call.dy, args[8]) ||
      !set(call.dsum, args[9]) || !set(call.dx, args[10]) || !set(call.dweight, args[11]) ||
      !set(call.dbias, args[12]) || !set(call.dresidual, args[13])) {
    return nullptr;
  }
  call.m2 = nullptr;
  if (call.has(kGiven)) call.count = nullptr;
  return run(call, normkit_backward);
}

// The means and 1/std that torch saved, and the bound on |mean|/std: 1 if exact. Some
// tenths of a microsecond: releasing the lock would cost more.
PyObject* verify(PyObject*, PyObject* const* args, std::ptrdiff_t) {
  Reader reader;
  View mean, inv_std;
  if (!reader.read(args[0], mean) || !reader.read(args[1], inv_std)) return nullptr;
  return PyLong_FromLong(verify_saved(static_cast<const float*>(mean.data),
                                      static_cast<const float*>(inv_std.data), mean.size(),
                                      PyFloat_AsDouble(args[2])));
}

PyMethodDef methods[] = {
    {"signature", signature, kFastCall, nullptr}, {"find", find, kFastCall, nullptr},
    {"forward", forward, kFastCall, nullptr},     {"backward", backward, kFastCall, nullptr},
    {"verify", verify, kFastCall, nullptr},
};

}  // namespace
}  // namespace normkit

// Takes what `Torch` holds, in its order (dtypes as a tuple; the exchange API as a capsule
// or None), and returns the functions above. Null with an exception.
extern "C" __attribute__((visibility("default"))) PyObject* normkit_functions(
    PyObject* given) {
  using namespace normkit;
  Py_IncRef(given);  // for the life of the process
  PyObject** objects[] = {&torch.tensor,  &torch.parameter,         &torch.none,
                          &torch.is_true, &torch.number_of_threads, &torch.backend};
  int k = 0;
  for (PyObject** object : objects) {
    if (!(*object = PyTuple_GetItem(given, k++))) return nullptr;
  }
  PyObject *dtypes = PyTuple_GetItem(given, k), *exchange = PyTuple_GetItem(given, k + 1);
  if (!dtypes || !exchange) return nullptr;
  for (int d = 0; d < kOther; ++d) {
    if (!(torch.dtypes[d] = PyTuple_GetItem(dtypes, d))) return nullptr;
  }
  if (exchange != torch.none) {
    void* table = PyCapsule_GetPointer(exchange, "dlpack_exchange_api");
    if (!table) return nullptr;
    auto* api = static_cast<dlpack::ExchangeApi*>(table);
    torch.exchange = api->major == 1 && api->tensor_from_object ? api : nullptr;
  }
  const struct { PyObject** name; const char* text; } names[] = {
      {&torch.data_ptr, "data_ptr"}, {&torch.shape, "shape"},
      {&torch.stride, "stride"},     {&torch.dtype, "dtype"},
      {&torch.is_cpu, "is_cpu"},     {&torch.is_neg, "is_neg"},
      {&torch.requires_grad, "requires_grad"}};
  for (const auto& name : names) {
    if (!(*name.name = PyUnicode_InternFromString(name.text))) return nullptr;
  }
  PyObject* functions[5];
  for (int f = 0; f < 5; ++f) {
    functions[f] = PyCFunction_NewEx(&methods[f], nullptr, nullptr);
    if (!functions[f]) return nullptr;
  }
  return PyTuple_Pack(5, functions[0], functions[1], functions[2], functions[3], functions[4]);
}
