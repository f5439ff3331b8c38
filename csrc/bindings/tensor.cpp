#include "bindings/tensor.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

/// nullptr: this kind of object is no tensor.
const dlpack::ExchangeApi* exchange_api(py::handle object) {
  static PyObject* const attribute = PyUnicode_InternFromString(dlpack::ExchangeApi::kAttribute);
  const auto capsule = py::reinterpret_steal<py::object>(
      PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())), attribute));
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::ExchangeApi::kCapsule));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->major_version != dlpack::kMajorVersion) api = api->previous;
  return api;
}

std::string text(py::handle object) { return py::str(object).cast<std::string>(); }

constexpr std::uint32_t key_of(std::uint32_t code, std::uint32_t bits, std::uint32_t lanes = 1) {
  return code << 24 | bits << 16 | lanes;
}

/// Nothing: calls do not take it.
std::optional<DType> dtype_of(dlpack::DataType type) {
  struct Known {
    std::uint32_t key;
    DType dtype;
  };
  constexpr Known kKnown[] = {
      {key_of(dlpack::kFloat, 32), DType::kFloat32},
      {key_of(dlpack::kBFloat, 16), DType::kBFloat16},
      {key_of(dlpack::kFloat, 64), DType::kFloat64},
      {key_of(dlpack::kFloat, 16), DType::kFloat16},
      {key_of(dlpack::kInt, 64), DType::kInt64},
      {key_of(dlpack::kInt, 32), DType::kInt32},
      {key_of(dlpack::kUInt, 8), DType::kUInt8},
      {key_of(dlpack::kInt, 8), DType::kInt8},
      {key_of(dlpack::kBool, 8), DType::kBool},
      {key_of(dlpack::kInt, 16), DType::kInt16},
      {key_of(dlpack::kUInt, 16), DType::kUInt16},
      {key_of(dlpack::kUInt, 32), DType::kUInt32},
      {key_of(dlpack::kUInt, 64), DType::kUInt64},
      {key_of(dlpack::kComplex, 32), DType::kComplex32},
      {key_of(dlpack::kComplex, 64), DType::kComplex64},
      {key_of(dlpack::kComplex, 128), DType::kComplex128},
      {key_of(dlpack::kFloat8E4M3FN, 8), DType::kFloat8E4M3FN},
      {key_of(dlpack::kFloat8E5M2, 8), DType::kFloat8E5M2},
      {key_of(dlpack::kFloat8E4M3FNUZ, 8), DType::kFloat8E4M3FNUZ},
      {key_of(dlpack::kFloat8E5M2FNUZ, 8), DType::kFloat8E5M2FNUZ},
      {key_of(dlpack::kFloat8E8M0FNU, 8), DType::kFloat8E8M0FNU},
      {key_of(dlpack::kFloat4E2M1FN, 4, 2), DType::kFloat4E2M1FNx2},
  };
  static_assert(sizeof(kKnown) / sizeof(kKnown[0]) == kNumDTypes);
  const std::uint32_t key = key_of(type.code, type.bits, type.lanes);
  for (const Known& known : kKnown) {
    if (known.key == key) return known.dtype;
  }
  return std::nullopt;
}

/// Whether an array says, in the words of DLPack 1, that nobody may write it. Older arrays cannot say so.
bool is_read_only(py::handle array) {
  py::object capsule;
  try {
    capsule = array.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(dlpack::kMajorVersion, 0));
  } catch (py::error_already_set& error) {
    // TypeError: `max_version` is unknown to it. BufferError: it cannot hand over what is read-only.
    if (error.matches(PyExc_BufferError)) return true;
    if (error.matches(PyExc_TypeError)) return false;
    throw;
  }
  using dlpack::VersionedTensor;
  if (PyCapsule_IsValid(capsule.ptr(), VersionedTensor::kCapsule) == 0) return false;
  const auto* tensor =
      static_cast<const VersionedTensor*>(PyCapsule_GetPointer(capsule.ptr(), VersionedTensor::kCapsule));
  return tensor->major_version == dlpack::kMajorVersion && (tensor->flags & VersionedTensor::kReadOnly) != 0;
}

[[noreturn]] void refuse_dtype(const Tensor& tensor) {
  std::string names;
  for (int d = 0; d < kNumDTypes; ++d) names += (d == 0 ? "" : ", ") + std::string(name_of(static_cast<DType>(d)));
  std::string dtype = text(tensor.attribute("dtype"));
  if (dtype.starts_with("torch.")) dtype.erase(0, 6);
  throw py::value_error("dtype " + dtype + " is not supported; it is one of " + names);
}

}  // namespace

Tensor::Tensor(py::handle argument, const char* name, Access access, std::optional<dlpack::Device> device)
    : name_(name), object_(argument) {
  const dlpack::ExchangeApi* api = exchange_api(object_);
  if (api == nullptr) {
    convert(argument, access);
    api = exchange_api(object_);
    if (api == nullptr) {
      throw py::import_error("this torch has no DLPack exchange interface: pycomm needs torch 2.11 or newer");
    }
  }
  if (!read(*api)) refuse_unreadable(device);
  for (int d = 0; d < view_.num_dims; ++d) count_ *= static_cast<std::uint64_t>(view_.shape[d]);
  if (device) check_device(*device);
  const std::optional<DType> dtype = dtype_of(view_.dtype);
  if (!dtype) refuse_dtype(*this);
  dtype_ = *dtype;
  if (!is_contiguous()) {
    throw py::value_error(std::string(name) + " is not contiguous (shape " + shape_text() + ", strides " +
                          text(attribute("stride")()) +
                          "): pass tensor.contiguous() and copy the result back, or lay the tensor out contiguously");
  }
  check_resolved();
  if (view_.data == nullptr && count_ != 0) {
    throw py::value_error(std::string(name) + " has no memory of its own: pass its local tensor");
  }
}

/// torch leaves conjugates and negatives for later, and DLPack does not tell. A contiguous negative is the imaginary
/// part of one conjugate number.
void Tensor::check_resolved() const {
  const char* later = nullptr;
  if (view_.dtype.code == dlpack::kComplex && attribute("is_conj")().cast<bool>()) later = "conj";
  if (count_ == 1 && is_floating_point(dtype_) && attribute("is_neg")().cast<bool>()) later = "neg";
  if (later == nullptr) return;
  throw py::value_error(std::string(name_) + " has values that torch has not computed yet: pass tensor.resolve_" +
                        later + "()");
}

/// An array that is no tensor of torch: a tensor on its memory.
void Tensor::convert(py::handle argument, Access access) {
  if (!py::hasattr(argument, "__dlpack__")) {
    throw py::type_error(std::string(name_) + ": " + text(py::type::handle_of(argument).attr("__name__")) +
                         " is neither a tensor nor an array that speaks DLPack");
  }
  if (access == Access::kWrite && is_read_only(argument)) {
    throw py::value_error(std::string(name_) + " is read-only: this call writes it, so pass a copy");
  }
  try {
    converted_ = py::module_::import("torch").attr("from_dlpack")(argument);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_BufferError)) throw;  // older arrays do not share what is read-only
    throw py::value_error(std::string(name_) + " does not share its memory (" + error.what() + "): pass a copy");
  }
  object_ = converted_;
}

bool Tensor::read(const dlpack::ExchangeApi& api) {
  if (api.tensor_from_object(object_.ptr(), &view_) == 0) return true;
  PyErr_Clear();
  return false;
}

void Tensor::check_device(dlpack::Device device) const {
  const bool on_host = view_.device.type == dlpack::kCpu || view_.device.type == dlpack::kCudaHost;
  if (device.type == dlpack::kCpu ? on_host : view_.device.type == device.type && view_.device.index == device.index) {
    return;
  }
  refuse_device(device);
}

void Tensor::refuse_device(dlpack::Device device) const {
  const std::string wanted = device.type == dlpack::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
  const bool wants_cpu = device.type == dlpack::kCpu;
  throw py::value_error(std::string(name_) + " is on " + text(attribute("device")) + ", this communicator works on " +
                        wanted + ": pass tensor.to(comm.device), or make the communicator with init(backend=" +
                        (wants_cpu ? "'nccl'), whose tensors are on GPUs" : "'host'), whose tensors are on the CPU"));
}

/// What DLPack has no words for: other kinds of device (meta), layouts (sparse) and dtypes.
void Tensor::refuse_unreadable(std::optional<dlpack::Device> device) const {
  const auto kind = attribute("device").attr("type").cast<std::string>();
  if (device && kind != (device->type == dlpack::kCpu ? "cpu" : "cuda")) refuse_device(*device);
  if (!attribute("layout").equal(py::module_::import("torch").attr("strided"))) {
    throw py::value_error(std::string(name_) + " has layout " + text(attribute("layout")) +
                          ": only strided tensors can be sent, so pass tensor.to_dense() or its parts");
  }
  if (attribute("is_nested").cast<bool>()) {
    throw py::value_error(std::string(name_) + " is a nested tensor: pass the tensors that it is made of");
  }
  refuse_dtype(*this);
}

std::string Tensor::shape_text() const {
  std::string sizes;
  for (int d = 0; d < view_.num_dims; ++d) sizes += (d == 0 ? "" : ", ") + std::to_string(view_.shape[d]);
  return "(" + sizes + (view_.num_dims == 1 ? ",)" : ")");
}

bool Tensor::is_contiguous() const {
  if (view_.strides == nullptr || count_ == 0) return true;
  std::int64_t expected = 1;
  for (int d = view_.num_dims - 1; d >= 0; --d) {
    if (view_.shape[d] == 1) continue;
    if (view_.strides[d] != expected) return false;
    expected *= view_.shape[d];
  }
  return true;
}

}  // namespace pycomm::bindings
