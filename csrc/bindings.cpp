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

  // Takes the name and the member of one field after the other.
  template <class M, class... Rest>
  void Define(const char* field, M S::* member, Rest... rest) {
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
    if constexpr (sizeof...(Rest) > 0) Define(rest...);
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

// Defines the Python class of a struct with these fields, under their names in C++.
#define XATTN_PARAMS(m, Struct, ...) \
  ParamsClass<Struct>(m, #Struct).Define(XATTN_RESCAN(XATTN_FIELDS(Struct, __VA_ARGS__)))

// #a, &Struct::a, #b, &Struct::b and so on. A macro is not expanded inside itself, so the one for
// the other fields is only named, and each rescan expands one more of them.
#define XATTN_FIELDS(Struct, name, ...) \
  #name, &Struct::name __VA_OPT__(, XATTN_MORE_FIELDS XATTN_NO_ARGUMENTS(Struct, __VA_ARGS__))
#define XATTN_MORE_FIELDS() XATTN_FIELDS
#define XATTN_NO_ARGUMENTS ()
#define XATTN_RESCAN(...) XATTN_RESCAN_4(XATTN_RESCAN_4(XATTN_RESCAN_4(__VA_ARGS__)))
#define XATTN_RESCAN_4(...) XATTN_RESCAN_2(XATTN_RESCAN_2(XATTN_RESCAN_2(__VA_ARGS__)))
#define XATTN_RESCAN_2(...) XATTN_RESCAN_1(XATTN_RESCAN_1(XATTN_RESCAN_1(__VA_ARGS__)))
#define XATTN_RESCAN_1(...) __VA_ARGS__

void DefineTensors(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);
  XATTN_PARAMS(m, Numbers, data, dtype);
}

void DefineGatedResidual(py::module_& m) {
  m.attr("MAX_ROW_DIMS") = kMaxRowDims;
  py::enum_<Norm>(m, "Norm")
      .value("none", Norm::kNone)
      .value("layer", Norm::kLayer)
      .value("rms", Norm::kRms);
  XATTN_PARAMS(m, RowTensor, data, strides);
  XATTN_PARAMS(m, RowSizes, rows, sizes);
  XATTN_PARAMS(m, GatedResidualShape, rows, dim, x_dtype, h_dtype, norm, eps, gate_is_vector);
  XATTN_PARAMS(m, GatedResidualForwardParams, y, normed, x, h, row_mask, gate, weight, bias, shape);
  XATTN_PARAMS(m, GatedResidualBackwardParams, dx, dh, dgate, dweight, dbias, gate_parts,
               weight_parts, bias_parts, dy, dnormed, h, y, row_mask, gate, weight, shape);
  m.def("gated_residual_parts", &GatedResidualParts);
  m.def("widest_normed_row", &WidestNormedRow);
  DefineOp(m, "gated_residual_forward", &GatedResidualForward);
  DefineOp(m, "gated_residual_backward", &GatedResidualBackward);
}

void DefineCrossAttention(py::module_& m) {
  XATTN_PARAMS(m, HeadTensor, data, strides);
  XATTN_PARAMS(m, RowBounds, data, strides);
  XATTN_PARAMS(m, PairTensor, data, strides, dtype);
  XATTN_PARAMS(m, CrossAttentionShape, B, Hq, Hkv, Nq, Nk, D, Dv, dtype);
  // `aligned` is not a property, because the launchers set it.
  XATTN_PARAMS(m, CrossAttentionCall, q, k, v, start, stop, mask, bias, scales, scale_stride, seed,
               threshold, scale, softcap, keep_scale, shape, mask_is_bits);
  XATTN_PARAMS(m, CrossAttentionForwardParams, out, lse, lse_low, entropy, max_probability, parts,
               call, n_splits);
  XATTN_PARAMS(m, CrossAttentionBackwardParams, dq, dk, dv, dscale, dbias, out, dout, lse, lse_low,
               dlse, dentropy, entropy, parts, call, dq_splits, dkdv_splits, dbias_splits,
               bias_sizes);
  m.def("cross_attention_forward_splits", &CrossAttentionForwardSplits);
  m.def("cross_attention_backward_splits", &CrossAttentionBackwardSplits);
  m.def("cross_attention_forward_parts", &CrossAttentionForwardParts);
  m.def("cross_attention_backward_parts", &CrossAttentionBackwardParts);
  DefineOp(m, "cross_attention_forward", &CrossAttentionForward);
  DefineOp(m, "cross_attention_backward", &CrossAttentionBackward);
}

void DefineTopKAttention(py::module_& m) {
  XATTN_PARAMS(m, TopKSelectionParams, bits, call, top_k);
  XATTN_PARAMS(m, TopKIndicesParams, indices, bits, rows, Nk, top_k, to_bits);
  DefineOp(m, "topk_selection", &TopKSelection);
  DefineOp(m, "topk_indices", &TopKIndices);
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
