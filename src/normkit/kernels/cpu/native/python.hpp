// The functions of CPython's stable interface that `entries.cpp` calls.
//
// Declared here, as its documentation gives them: the library builds without the headers
// of a Python and serves every version. Python has loaded them before it loads this.
#pragma once
#include <cstddef>

struct PyObject;
struct PyThreadState;

extern "C" {
using PyFunction = PyObject* (*)(PyObject* self, PyObject* const* args, std::ptrdiff_t n);

struct PyMethodDef {
  const char* name;
  PyFunction function;
  int flags;
  const char* doc;
};

void Py_IncRef(PyObject*);
void Py_DecRef(PyObject*);
PyObject* PyObject_Type(PyObject*);
PyObject* PyObject_GetAttr(PyObject*, PyObject* name);
PyObject* PyObject_CallFunctionObjArgs(PyObject* callable, ...);
PyObject* PyObject_CallMethodObjArgs(PyObject* of, PyObject* name, ...);
PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject* self, PyObject* module);
PyObject* PyUnicode_InternFromString(const char*);
PyObject* PyBytes_FromStringAndSize(const char*, std::ptrdiff_t);
char* PyBytes_AsString(PyObject*);
std::ptrdiff_t PyBytes_Size(PyObject*);
PyObject* PyTuple_Pack(std::ptrdiff_t n, ...);
PyObject* PyTuple_GetItem(PyObject*, std::ptrdiff_t);
std::ptrdiff_t PyTuple_Size(PyObject*);
PyObject* PyDict_GetItemWithError(PyObject*, PyObject* key);
PyObject* PyLong_FromLong(long);
long long PyLong_AsLongLong(PyObject*);
double PyFloat_AsDouble(PyObject*);
void* PyCapsule_GetPointer(PyObject*, const char* name);
PyObject* PyErr_Occurred();
void PyErr_Clear();
PyThreadState* PyEval_SaveThread();
void PyEval_RestoreThread(PyThreadState*);
}

namespace normkit {

constexpr int kFastCall = 0x80;  // METH_FASTCALL

// Owns a new reference.
class Reference {
 public:
  explicit Reference(PyObject* object) : object_(object) {}
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() {
    if (object_) Py_DecRef(object_);
  }
  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_; }

 private:
  PyObject* object_;
};

}  // namespace normkit
