// What a call needs of a torch tensor: address, shape, strides, dtype.
//
// torch 2.10 and later hand it over by a table of C functions (DLPack's exchange API, on
// the class as `__dlpack_c_exchange_api__`); of older ones its attributes are read.
#pragma once
#include <cstdint>

#include "call.hpp"
#include "python.hpp"

namespace normkit {

constexpr int kMostDimensions = 16;

struct View {
  void* data;
  bool is_on_cpu;
  int dtype;  // a `Dtype`, kInt64 or kBool; kOther for all the rest
  int dimensions;
  const int64_t *shape, *strides;

  int64_t size() const {
    int64_t n = 1;
    for (int d = 0; d < dimensions; ++d) n *= shape[d];
    return n;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int d = dimensions - 1; d >= 0; --d) {
      if (shape[d] == 0) return true;
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
  bool has_shape_of(const View& other) const {
    if (dimensions != other.dimensions) return false;
    for (int d = 0; d < dimensions; ++d) {
      if (shape[d] != other.shape[d]) return false;
    }
    return true;
  }
};

constexpr int kInt64 = 4, kBool = 5, kOther = 6;

// The names of DLPack 1, in its order.
namespace dlpack {
struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
};
constexpr int kCpu = 1, kInt = 0, kFloat = 2, kBfloat = 4, kBoolean = 6;

inline int dtype_of(const Tensor& t) {
  if (t.code == kFloat) {
    return t.bits == 32 ? kFloat32 : t.bits == 64 ? kFloat64 : t.bits == 16 ? kFloat16 : kOther;
  }
  if (t.code == kBfloat) return t.bits == 16 ? (int)kBFloat16 : kOther;
  if (t.code == kInt) return t.bits == 64 ? kInt64 : kOther;
  return t.code == kBoolean ? kBool : kOther;
}
}  // namespace dlpack

// Set once, from Python; all are kept for the life of the process.
struct Torch {
  PyObject *tensor, *parameter;           // classes
  PyObject *none, *is_true;               // None, True
  PyObject* dtypes[kOther];               // in the order of `View::dtype`
  PyObject *number_of_threads, *backend;  // functions without arguments
  dlpack::ExchangeApi* exchange;          // null in older versions
  PyObject *data_ptr, *shape, *stride, *dtype, *is_cpu, *is_neg, *requires_grad;  // names
};
inline Torch torch{};

inline bool is_plain(PyObject* object) {
  const Reference type(PyObject_Type(object));
  return type.get() == torch.tensor || type.get() == torch.parameter;
}

inline bool is_true_of(PyObject* object, PyObject* attribute) {
  const Reference found(PyObject_GetAttr(object, attribute));
  return found.get() == torch.is_true;
}

// Sets the address of a tensor's values. False, with an exception, where it has none.
inline bool read_address(PyObject* tensor, void*& address) {
  if (torch.exchange) {
    dlpack::Tensor t;
    if (torch.exchange->tensor_from_object(tensor, &t)) return false;
    address = static_cast<char*>(t.data) + t.byte_offset;
    return true;
  }
  const Reference found(PyObject_CallMethodObjArgs(tensor, torch.data_ptr, nullptr));
  if (!found) return false;
  address = reinterpret_cast<void*>(PyLong_AsLongLong(found.get()));
  return true;
}

// Writes up to kMostDimensions integers of a tuple; -1 where there are more.
inline int read_sizes(PyObject* tuple, int64_t* sizes) {
  const auto n = PyTuple_Size(tuple);
  if (n > kMostDimensions) return -1;
  for (int d = 0; d < n; ++d) sizes[d] = PyLong_AsLongLong(PyTuple_GetItem(tuple, d));
  return (int)n;
}

// Reads tensors one after the other; a view is valid while its reader is.
class Reader {
 public:
  // False where it has no address, as a sparse layout or the wrapper of a transform, or in
  // older versions too many dimensions; with an exception set or not.
  bool read(PyObject* tensor, View& view) {
    if (torch.exchange) {
      dlpack::Tensor t;
      if (torch.exchange->tensor_from_object(tensor, &t)) return false;
      view = {static_cast<char*>(t.data) + t.byte_offset, t.device_type == dlpack::kCpu,
              dlpack::dtype_of(t), t.ndim, t.shape, t.strides};
      return true;
    }
    return read_attributes(tensor, view);
  }

 private:
  bool read_attributes(PyObject* tensor, View& view) {
    const Reference shape(PyObject_GetAttr(tensor, torch.shape));
    const Reference strides(PyObject_CallMethodObjArgs(tensor, torch.stride, nullptr));
    const Reference dtype(PyObject_GetAttr(tensor, torch.dtype));
    if (!shape || !strides || !dtype || !read_address(tensor, view.data)) return false;
    view.is_on_cpu = is_true_of(tensor, torch.is_cpu);
    view.dtype = 0;
    while (view.dtype < kOther && torch.dtypes[view.dtype] != dtype.get()) ++view.dtype;
    int64_t* sizes = sizes_[next_++ % kViews];
    view.dimensions = read_sizes(shape.get(), sizes);
    if (view.dimensions < 0) return false;
    read_sizes(strides.get(), sizes + kMostDimensions);
    view.shape = sizes;
    view.strides = sizes + kMostDimensions;
    return !PyErr_Occurred();
  }

  // A call compares two views at most.
  static constexpr int kViews = 2;
  int64_t sizes_[kViews][2 * kMostDimensions];
  int next_ = 0;
};

}  // namespace normkit
