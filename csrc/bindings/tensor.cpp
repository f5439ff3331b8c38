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

/// Of a dtype that is not bool; nothing: the core has none for it.
std::optional<DType> core_dtype(dlpack::DataType dtype) {
  if (dtype.lanes != 1) return std::nullopt;
  switch (dtype.code << 8 | dtype.bits) {
    case dlpack::kFloat << 8 | 32:
      return DType::kFloat32;
    case dlpack::kFloat << 8 | 64:
      return DType::kFloat64;
    case dlpack::kFloat << 8 | 16:
      return DType::kFloat16;
    case dlpack::kBFloat << 8 | 16:
      return DType::kBFloat16;
    case dlpack::kInt << 8 | 8:
      return DType::kInt8;
    case dlpack::kUInt << 8 | 8:
      return DType::kUInt8;
    case dlpack::kInt << 8 | 32:
      return DType::kInt32;
    case dlpack::kInt << 8 | 64:
      return DType::kInt64;
    default:
      return std::nullopt;
  }
}

[[noreturn]] void refuse_dtype(const Tensor& tensor, bool with_bool) {
  std::string names;
  for (int d = 0; d < kNumDTypes; ++d) names += (d == 0 ? "" : ", ") + std::string(name_of(static_cast<DType>(d)));
  std::string dtype = text(tensor.attribute("dtype"));
  if (dtype.starts_with("torch.")) dtype.erase(0, 6);
  throw py::value_error("dtype " + dtype + " is not supported; it is one of " + names + (with_bool ? ", bool" : ""));
}

}  // namespace

Tensor::Tensor(py::handle argument, const char* name, std::optional<dlpack::Device> device)
    : name_(name), object_(argument) {
  const dlpack::ExchangeApi* api = exchange_api(object_);
  if (api == nullptr) {
    if (!py::hasattr(argument, "__dlpack__")) {
      throw py::type_error(std::string(name) + ": " + text(py::type::handle_of(argument).attr("__name__")) +
                           " is neither a tensor nor an array that speaks DLPack");
    }
    converted_ = py::module_::import("torch").attr("from_dlpack")(argument);
    object_ = converted_;
    api = exchange_api(object_);
    if (api == nullptr) {
      throw py::import_error("this torch has no DLPack exchange interface: pycomm needs torch 2.11 or newer");
    }
  }
  if (!read(*api)) refuse_unreadable(device);
  for (int d = 0; d < view_.num_dims; ++d) count_ *= static_cast<std::uint64_t>(view_.shape[d]);
  if (device) check_device(*device);
  if (!is_contiguous()) {
    throw py::value_error(std::string(name) + " is not contiguous (shape " + shape_text() + ", strides " +
                          text(attribute("stride")()) +
                          "): pass tensor.contiguous() and copy the result back, or lay the tensor out contiguously");
  }
  if (view_.data == nullptr && count_ != 0) {
    throw py::value_error(std::string(name) + " has no memory of its own: pass its local tensor");
  }
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
  refuse_dtype(*this, true);
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

DType Tensor::moved_dtype() const {
  if (view_.dtype.code == dlpack::kBool && view_.dtype.bits == 8) return DType::kUInt8;
  const std::optional<DType> dtype = core_dtype(view_.dtype);
  if (!dtype) refuse_dtype(*this, true);
  return *dtype;
}

DType Tensor::reduced_dtype() const {
  const std::optional<DType> dtype = core_dtype(view_.dtype);
  if (!dtype) refuse_dtype(*this, false);
  return *dtype;
}

bool Tensor::same_dtype(const Tensor& other) const {
  return view_.dtype.code == other.view_.dtype.code && view_.dtype.bits == other.view_.dtype.bits;
}

}  // namespace pycomm::bindings
