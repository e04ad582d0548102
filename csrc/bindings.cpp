// The Python module. Its functions take params and launch kernels on a stream, or list the
// launches. Pointers and streams are integers, because nothing here knows who owns the memory.
//
// Every struct of params is a class with a property for each field. Its constructor takes keyword
// arguments only, and fields that it is not given are 0.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>

#include "cross_attention.h"
#include "gated_residual.h"
#include "topk_attention.h"

namespace py = pybind11;

namespace xattn {
namespace {

// The driver's version of CUDA as 1000 * major + 10 * minor, or 0 without a driver.
int DriverVersion() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

std::string Version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // This clears the error, so that the next call does not return it again.
  std::string text =
      std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  if (error == cudaErrorNoDevice || (error == cudaErrorInsufficientDriver && DriverVersion() == 0))
    text += ": there is no CUDA device here, or no driver for one";
  else if (error == cudaErrorInsufficientDriver)
    text += ": the driver is for CUDA " + Version(DriverVersion()) + ", this build for " +
            Version(CUDART_VERSION);
  if (error == cudaErrorNoKernelImageForDevice)
    text += ": this build has no code for the device, see XATTN_CUDA_ARCHS";
  if (error == cudaErrorLaunchOutOfResources)
    text += ": a block needs more shared memory than the device has for one";
  if (error == cudaErrorLaunchFailure || error == cudaErrorIllegalAddress)
    text += ": of this launch or of what the device did before";
  throw std::runtime_error(text);
}

// Makes `device` the current device during its lifetime.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) {
    Check(cudaGetDevice(&before_), what);
    if (before_ != device) Check(cudaSetDevice(device), what);
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

py::tuple AsTuple(const dim3& d) { return py::make_tuple(d.x, d.y, d.z); }

// Defines m.name(params, device, stream), which launches, and m.name_plan(params), which lists what
// would be launched.
template <class Params>
void DefineOp(py::module_& m, const char* name, cudaError_t (*launch)(const Params&, Queue&)) {
  m.def(name, [=](const Params& params, int device, uintptr_t stream) {
    const DeviceGuard guard(device, name);
    StreamQueue queue(reinterpret_cast<cudaStream_t>(stream));
    Check(launch(params, queue), name);
  });
  m.def((std::string(name) + "_plan").c_str(), [=](const Params& params) {
    PlanQueue queue;
    Check(launch(params, queue), name);
    py::list steps;
    for (const auto& s : queue.steps)
      steps.append(
          py::make_tuple(s.name, AsTuple(s.grid), AsTuple(s.block), s.shared, py::bytes(s.params)));
    return steps;
  });
}

// How Python sees a field of type M. Pointers are integers, arrays are lists, and every other type
// is itself.
template <class M>
struct FieldOf {
  using Value = M;
  static M& Get(M& field) { return field; }
  static void Set(M& field, const Value& value) { field = value; }
};

template <class M>
struct FieldOf<M*> {
  using Value = uintptr_t;
  static Value Get(M* field) { return reinterpret_cast<Value>(field); }
  static void Set(M*& field, Value value) { field = reinterpret_cast<M*>(value); }
};

template <class M, size_t N>
struct FieldOf<M[N]> {
  using Value = std::array<M, N>;
  static Value Get(const M (&field)[N]) {
    Value value;
    std::copy_n(field, N, value.begin());
    return value;
  }
  static void Set(M (&field)[N], const Value& value) {
    std::copy(value.begin(), value.end(), field);
  }
};

// The name of a member and the member, so that no member can be given the name of another.
#define XATTN_FIELD(Struct, name) #name, &Struct::name

// The Python class of a struct S of params.
template <class S>
class ParamsClass {
 public:
  ParamsClass(py::module_& m, const char* name) : name_(name), class_(m, name) {
    class_.def(py::init([name](const py::kwargs& values) {
      S params{};
      for (const auto& [field, value] : values) {
        const auto setter = Setters().find(py::cast<std::string_view>(field));
        if (setter == Setters().end())
          throw py::type_error(std::string(name) + " has no field '" +
                               py::cast<std::string>(field) + "'");
        setter->second(params, value);
      }
      return params;
    }));
  }

  template <class M>
  ParamsClass& Field(const char* field, M S::* member) {
    using Value = typename FieldOf<M>::Value;
    class_.def_property(
        field, [=](S& params) -> decltype(auto) { return FieldOf<M>::Get(params.*member); },
        [=](S& params, const Value& value) { FieldOf<M>::Set(params.*member, value); });
    Setters()[field] = [=, name = name_](S& params, py::handle value) {
      try {
        FieldOf<M>::Set(params.*member, py::cast<Value>(value));
      } catch (const py::cast_error&) {
        throw py::type_error(std::string(name) + "." + field + " cannot be " +
                             py::cast<std::string>(py::repr(value)));
      }
    };
    return *this;
  }

 private:
  using Setter = std::function<void(S&, py::handle)>;
  // The constructor looks fields up here, so that it needs no Python object for `params`.
  static std::map<std::string, Setter, std::less<>>& Setters() {
    static std::map<std::string, Setter, std::less<>> setters;
    return setters;
  }

  const char* name_;
  py::class_<S> class_;
};

void DefineTensors(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);
  ParamsClass<Numbers>(m, "Numbers")
      .Field(XATTN_FIELD(Numbers, data))
      .Field(XATTN_FIELD(Numbers, dtype));
}

void DefineGatedResidual(py::module_& m) {
  m.attr("MAX_ROW_DIMS") = kMaxRowDims;
  py::enum_<Norm>(m, "Norm")
      .value("none", Norm::kNone)
      .value("layer", Norm::kLayer)
      .value("rms", Norm::kRms);
  ParamsClass<RowTensor>(m, "RowTensor")
      .Field(XATTN_FIELD(RowTensor, data))
      .Field(XATTN_FIELD(RowTensor, strides));
  ParamsClass<RowSizes>(m, "RowSizes")
      .Field(XATTN_FIELD(RowSizes, rows))
      .Field(XATTN_FIELD(RowSizes, sizes));
  using Shape = GatedResidualShape;
  ParamsClass<Shape>(m, "GatedResidualShape")
      .Field(XATTN_FIELD(Shape, rows))
      .Field(XATTN_FIELD(Shape, dim))
      .Field(XATTN_FIELD(Shape, x_dtype))
      .Field(XATTN_FIELD(Shape, h_dtype))
      .Field(XATTN_FIELD(Shape, norm))
      .Field(XATTN_FIELD(Shape, eps))
      .Field(XATTN_FIELD(Shape, gate_is_vector));
  using Forward = GatedResidualForwardParams;
  ParamsClass<Forward>(m, "GatedResidualForwardParams")
      .Field(XATTN_FIELD(Forward, y))
      .Field(XATTN_FIELD(Forward, normed))
      .Field(XATTN_FIELD(Forward, x))
      .Field(XATTN_FIELD(Forward, h))
      .Field(XATTN_FIELD(Forward, row_mask))
      .Field(XATTN_FIELD(Forward, gate))
      .Field(XATTN_FIELD(Forward, weight))
      .Field(XATTN_FIELD(Forward, bias))
      .Field(XATTN_FIELD(Forward, shape));
  using Backward = GatedResidualBackwardParams;
  ParamsClass<Backward>(m, "GatedResidualBackwardParams")
      .Field(XATTN_FIELD(Backward, dx))
      .Field(XATTN_FIELD(Backward, dh))
      .Field(XATTN_FIELD(Backward, dgate))
      .Field(XATTN_FIELD(Backward, dweight))
      .Field(XATTN_FIELD(Backward, dbias))
      .Field(XATTN_FIELD(Backward, gate_parts))
      .Field(XATTN_FIELD(Backward, weight_parts))
      .Field(XATTN_FIELD(Backward, bias_parts))
      .Field(XATTN_FIELD(Backward, dy))
      .Field(XATTN_FIELD(Backward, dnormed))
      .Field(XATTN_FIELD(Backward, h))
      .Field(XATTN_FIELD(Backward, y))
      .Field(XATTN_FIELD(Backward, row_mask))
      .Field(XATTN_FIELD(Backward, gate))
      .Field(XATTN_FIELD(Backward, weight))
      .Field(XATTN_FIELD(Backward, shape));
  m.def("gated_residual_parts", &GatedResidualParts);
  m.def("widest_normed_row", &WidestNormedRow);
  DefineOp<Forward>(m, "gated_residual_forward", &GatedResidualForward);
  DefineOp<Backward>(m, "gated_residual_backward", &GatedResidualBackward);
}

void DefineCrossAttention(py::module_& m) {
  ParamsClass<HeadTensor>(m, "HeadTensor")
      .Field(XATTN_FIELD(HeadTensor, data))
      .Field(XATTN_FIELD(HeadTensor, strides));
  ParamsClass<RowBounds>(m, "RowBounds")
      .Field(XATTN_FIELD(RowBounds, data))
      .Field(XATTN_FIELD(RowBounds, strides));
  ParamsClass<PairTensor>(m, "PairTensor")
      .Field(XATTN_FIELD(PairTensor, data))
      .Field(XATTN_FIELD(PairTensor, strides))
      .Field(XATTN_FIELD(PairTensor, dtype));
  using Shape = CrossAttentionShape;
  ParamsClass<Shape>(m, "CrossAttentionShape")
      .Field(XATTN_FIELD(Shape, B))
      .Field(XATTN_FIELD(Shape, Hq))
      .Field(XATTN_FIELD(Shape, Hkv))
      .Field(XATTN_FIELD(Shape, Nq))
      .Field(XATTN_FIELD(Shape, Nk))
      .Field(XATTN_FIELD(Shape, D))
      .Field(XATTN_FIELD(Shape, Dv))
      .Field(XATTN_FIELD(Shape, dtype));
  // `aligned` is not a property, because the launchers set it.
  using Call = CrossAttentionCall;
  ParamsClass<Call>(m, "CrossAttentionCall")
      .Field(XATTN_FIELD(Call, q))
      .Field(XATTN_FIELD(Call, k))
      .Field(XATTN_FIELD(Call, v))
      .Field(XATTN_FIELD(Call, start))
      .Field(XATTN_FIELD(Call, stop))
      .Field(XATTN_FIELD(Call, mask))
      .Field(XATTN_FIELD(Call, bias))
      .Field(XATTN_FIELD(Call, scales))
      .Field(XATTN_FIELD(Call, scale_stride))
      .Field(XATTN_FIELD(Call, seed))
      .Field(XATTN_FIELD(Call, threshold))
      .Field(XATTN_FIELD(Call, scale))
      .Field(XATTN_FIELD(Call, softcap))
      .Field(XATTN_FIELD(Call, keep_scale))
      .Field(XATTN_FIELD(Call, shape))
      .Field(XATTN_FIELD(Call, mask_is_bits));
  using Forward = CrossAttentionForwardParams;
  ParamsClass<Forward>(m, "CrossAttentionForwardParams")
      .Field(XATTN_FIELD(Forward, out))
      .Field(XATTN_FIELD(Forward, lse))
      .Field(XATTN_FIELD(Forward, lse_low))
      .Field(XATTN_FIELD(Forward, entropy))
      .Field(XATTN_FIELD(Forward, max_probability))
      .Field(XATTN_FIELD(Forward, parts))
      .Field(XATTN_FIELD(Forward, call))
      .Field(XATTN_FIELD(Forward, n_splits));
  using Backward = CrossAttentionBackwardParams;
  ParamsClass<Backward>(m, "CrossAttentionBackwardParams")
      .Field(XATTN_FIELD(Backward, dq))
      .Field(XATTN_FIELD(Backward, dk))
      .Field(XATTN_FIELD(Backward, dv))
      .Field(XATTN_FIELD(Backward, dscale))
      .Field(XATTN_FIELD(Backward, dbias))
      .Field(XATTN_FIELD(Backward, out))
      .Field(XATTN_FIELD(Backward, dout))
      .Field(XATTN_FIELD(Backward, lse))
      .Field(XATTN_FIELD(Backward, lse_low))
      .Field(XATTN_FIELD(Backward, dlse))
      .Field(XATTN_FIELD(Backward, dentropy))
      .Field(XATTN_FIELD(Backward, entropy))
      .Field(XATTN_FIELD(Backward, parts))
      .Field(XATTN_FIELD(Backward, call))
      .Field(XATTN_FIELD(Backward, dq_splits))
      .Field(XATTN_FIELD(Backward, dkdv_splits))
      .Field(XATTN_FIELD(Backward, dbias_splits))
      .Field(XATTN_FIELD(Backward, bias_sizes));
  m.def("cross_attention_forward_splits", &CrossAttentionForwardSplits);
  m.def("cross_attention_backward_splits", &CrossAttentionBackwardSplits);
  m.def("cross_attention_forward_parts", &CrossAttentionForwardParts);
  m.def("cross_attention_backward_parts", &CrossAttentionBackwardParts);
  DefineOp<Forward>(m, "cross_attention_forward", &CrossAttentionForward);
  DefineOp<Backward>(m, "cross_attention_backward", &CrossAttentionBackward);
}

void DefineTopKAttention(py::module_& m) {
  using Selection = TopKSelectionParams;
  ParamsClass<Selection>(m, "TopKSelectionParams")
      .Field(XATTN_FIELD(Selection, bits))
      .Field(XATTN_FIELD(Selection, call))
      .Field(XATTN_FIELD(Selection, top_k));
  using Indices = TopKIndicesParams;
  ParamsClass<Indices>(m, "TopKIndicesParams")
      .Field(XATTN_FIELD(Indices, indices))
      .Field(XATTN_FIELD(Indices, bits))
      .Field(XATTN_FIELD(Indices, rows))
      .Field(XATTN_FIELD(Indices, Nk))
      .Field(XATTN_FIELD(Indices, top_k))
      .Field(XATTN_FIELD(Indices, to_bits));
  DefineOp<Selection>(m, "topk_selection", &TopKSelection);
  DefineOp<Indices>(m, "topk_indices", &TopKIndices);
}

}  // namespace
}  // namespace xattn

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Launchers of the CUDA kernels in csrc/.";
  m.attr("CUDA_VERSION") = CUDART_VERSION;
  m.def("driver_version", &xattn::DriverVersion);
  m.attr("MOST_ATTENTION_ROWS") = xattn::kMostRows;
  m.attr("OLDEST_ARCH") = XATTN_OLDEST_ARCH;
  m.attr("MOST_STATIC_SHARED") = xattn::kMostStaticShared;
  m.def("check",
        [](int error, const char* what) { xattn::Check(static_cast<cudaError_t>(error), what); });
  xattn::DefineTensors(m);
  xattn::DefineGatedResidual(m);
  xattn::DefineCrossAttention(m);
  xattn::DefineTopKAttention(m);
}
