#include "bindings/exported.hpp"

#include <memory>
#include <utility>

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

struct Exported {
  dlpack::ManagedTensor managed{};
  std::int64_t shape = 0;
  py::object owner;
};

/// From any thread. At the interpreter's end there is nobody left to give the owner back to.
void release(dlpack::ManagedTensor* managed) {
  if (Py_IsInitialized() == 0) return;
  const py::gil_scoped_acquire gil;
  delete static_cast<Exported*>(managed->owner);
}

}  // namespace

py::capsule exported(void* data, std::int64_t bytes, dlpack::Device device, py::object owner) {
  auto object = std::make_unique<Exported>();
  object->shape = bytes;
  object->owner = std::move(owner);
  object->managed.tensor = {.data = data,
                            .device = device,
                            .num_dims = 1,
                            .dtype = {dlpack::kUInt, 8, 1},
                            .shape = &object->shape,
                            .strides = nullptr,
                            .byte_offset = 0};
  object->managed.owner = object.get();
  object->managed.deleter = &release;
  // Whoever takes the tensor gives the capsule another name.
  PyObject* const capsule = PyCapsule_New(&object->managed, dlpack::ManagedTensor::kCapsule, [](PyObject* self) {
    if (PyCapsule_IsValid(self, dlpack::ManagedTensor::kCapsule) == 0) return;
    release(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(self, dlpack::ManagedTensor::kCapsule)));
  });
  if (capsule == nullptr) throw py::error_already_set();
  static_cast<void>(object.release());
  return py::reinterpret_steal<py::capsule>(capsule);
}

}  // namespace pycomm::bindings
