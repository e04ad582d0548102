// The Python module: params in, launches on a stream or a list of them out. Pointers and streams
// are integers, as nothing here knows who owns the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "cross_attention.h"
#include "gated_residual.h"
#include "topk_attention.h"

namespace py = pybind11;

namespace xattn {
namespace {

// Of CUDA, 1000 times the major version plus 10 times the minor one; 0 without a driver.
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
  cudaGetLastError();  // the next call starts without it
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

// Makes `device` current, and what was current before when it ends.
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

// m.name(params, device, stream) launches; m.name_plan(params) lists the launches.
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

void DefineTensors(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);
  py::class_<Numbers>(m, "Numbers")
      .def(py::init([](uintptr_t data, DType dtype) {
             return Numbers{reinterpret_cast<void*>(data), dtype};
           }),
           py::arg("data") = 0, py::arg("dtype") = DType::kFloat32);
  py::class_<RowTensor>(m, "RowTensor")
      .def(py::init([](uintptr_t data, std::array<int64_t, kMaxRowDims> strides) {
             RowTensor t{reinterpret_cast<void*>(data), {}};
             std::copy(strides.begin(), strides.end(), t.strides);
             return t;
           }),
           py::arg("data") = 0, py::arg("strides") = std::array<int64_t, kMaxRowDims>{});
}

void DefineGatedResidual(py::module_& m) {
  m.attr("MAX_ROW_DIMS") = kMaxRowDims;
  py::enum_<Norm>(m, "Norm")
      .value("none", Norm::kNone)
      .value("layer", Norm::kLayer)
      .value("rms", Norm::kRms);
  using Shape = GatedResidualShape;
  py::class_<Shape>(m, "GatedResidualShape")
      .def(py::init([](uint32_t rows, std::array<int32_t, kMaxRowDims> sizes, int32_t dim,
                       DType x_dtype, DType h_dtype, Norm norm, float eps, bool gate_is_vector) {
        Shape shape{{rows, {}}, dim, x_dtype, h_dtype, norm, eps, gate_is_vector};
        std::copy(sizes.begin(), sizes.end(), shape.rows.sizes);
        return shape;
      }));
  using Forward = GatedResidualForwardParams;
  py::class_<Forward>(m, "GatedResidualForwardParams")
      .def(py::init([](RowTensor y, RowTensor normed, RowTensor x, RowTensor h, RowTensor row_mask,
                       Numbers gate, Numbers weight, Numbers bias, Shape shape) {
        return Forward{y, normed, x, h, row_mask, gate, weight, bias, shape};
      }));
  using Backward = GatedResidualBackwardParams;
  const auto floats = [](uintptr_t data) { return reinterpret_cast<float*>(data); };
  py::class_<Backward>(m, "GatedResidualBackwardParams")
      .def(py::init([=](RowTensor dx, RowTensor dh, Numbers dgate, Numbers dweight, Numbers dbias,
                        uintptr_t gate_parts, uintptr_t weight_parts, uintptr_t bias_parts,
                        RowTensor dy, RowTensor dnormed, RowTensor h, RowTensor y,
                        RowTensor row_mask, Numbers gate, Numbers weight, Shape shape) {
        return Backward{dx,
                        dh,
                        dgate,
                        dweight,
                        dbias,
                        floats(gate_parts),
                        floats(weight_parts),
                        floats(bias_parts),
                        dy,
                        dnormed,
                        h,
                        y,
                        row_mask,
                        gate,
                        weight,
                        shape};
      }));
  m.def("gated_residual_parts", &GatedResidualParts);
  m.def("widest_normed_row", &WidestNormedRow);
  DefineOp<Forward>(m, "gated_residual_forward", &GatedResidualForward);
  DefineOp<Backward>(m, "gated_residual_backward", &GatedResidualBackward);
}

void DefineCrossAttention(py::module_& m) {
  py::class_<HeadTensor>(m, "HeadTensor")
      .def(py::init([](uintptr_t data, std::array<int64_t, 3> strides) {
             return HeadTensor{reinterpret_cast<void*>(data), {strides[0], strides[1], strides[2]}};
           }),
           py::arg("data") = 0, py::arg("strides") = std::array<int64_t, 3>{});
  py::class_<RowBounds>(m, "RowBounds")
      .def(py::init([](uintptr_t data, std::array<int64_t, 2> strides) {
             return RowBounds{reinterpret_cast<const int32_t*>(data), {strides[0], strides[1]}};
           }),
           py::arg("data") = 0, py::arg("strides") = std::array<int64_t, 2>{});
  py::class_<PairTensor>(m, "PairTensor")
      .def(py::init([](uintptr_t data, std::array<int64_t, 4> strides, DType dtype) {
             PairTensor t{reinterpret_cast<const void*>(data), {}, dtype};
             std::copy(strides.begin(), strides.end(), t.strides);
             return t;
           }),
           py::arg("data") = 0, py::arg("strides") = std::array<int64_t, 4>{},
           py::arg("dtype") = DType::kFloat32);
  using Shape = CrossAttentionShape;
  py::class_<Shape>(m, "CrossAttentionShape")
      .def(py::init([](int32_t B, int32_t Hq, int32_t Hkv, int32_t Nq, int32_t Nk, int32_t D,
                       int32_t Dv,
                       DType dtype) { return Shape{B, Hq, Hkv, Nq, Nk, D, Dv, dtype}; }));
  using Call = CrossAttentionCall;
  py::class_<Call>(m, "CrossAttentionCall")
      .def(py::init([](HeadTensor q, HeadTensor k, HeadTensor v, RowBounds start, RowBounds stop,
                       PairTensor mask, PairTensor bias, Numbers scales, int64_t scale_stride,
                       uintptr_t seed, uint64_t threshold, float scale, float softcap,
                       float keep_scale, Shape shape, bool mask_is_bits) {
        return Call{q,
                    k,
                    v,
                    start,
                    stop,
                    mask,
                    bias,
                    scales,
                    scale_stride,
                    reinterpret_cast<const int64_t*>(seed),
                    threshold,
                    scale,
                    softcap,
                    keep_scale,
                    shape,
                    mask_is_bits,
                    false};
      }));
  const auto floats = [](uintptr_t data) { return reinterpret_cast<float*>(data); };
  using Forward = CrossAttentionForwardParams;
  py::class_<Forward>(m, "CrossAttentionForwardParams")
      .def(
          py::init([=](HeadTensor out, std::array<uintptr_t, 4> rows, Call call, int32_t n_splits) {
            return Forward{
                out,  floats(rows[0]), floats(rows[1]), floats(rows[2]), floats(rows[3]), nullptr,
                call, n_splits};
          }))
      .def_property("parts", nullptr, [=](Forward& p, uintptr_t data) { p.parts = floats(data); });
  using Backward = CrossAttentionBackwardParams;
  py::class_<Backward>(m, "CrossAttentionBackwardParams")
      .def(py::init([=](HeadTensor dq, HeadTensor dk, HeadTensor dv, HeadTensor out,
                        HeadTensor dout, std::array<uintptr_t, 5> rows, Call call,
                        std::array<int32_t, 4> bias_sizes) {
        Backward p{dq,
                   dk,
                   dv,
                   nullptr,
                   nullptr,
                   out,
                   dout,
                   floats(rows[0]),
                   floats(rows[1]),
                   floats(rows[2]),
                   floats(rows[3]),
                   floats(rows[4]),
                   nullptr,
                   call,
                   1,
                   1,
                   1,
                   {}};
        std::copy(bias_sizes.begin(), bias_sizes.end(), p.bias_sizes);
        return p;
      }))
      .def_readwrite("dq_splits", &Backward::dq_splits)
      .def_readwrite("dkdv_splits", &Backward::dkdv_splits)
      .def_readwrite("dbias_splits", &Backward::dbias_splits)
      .def_property("dscale", nullptr,
                    [=](Backward& p, uintptr_t data) { p.dscale = floats(data); })
      .def_property("dbias", nullptr, [=](Backward& p, uintptr_t data) { p.dbias = floats(data); })
      .def_property("parts", nullptr, [=](Backward& p, uintptr_t data) { p.parts = floats(data); });
  m.def("cross_attention_forward_splits", &CrossAttentionForwardSplits);
  m.def("cross_attention_backward_splits", &CrossAttentionBackwardSplits);
  m.def("cross_attention_forward_parts", &CrossAttentionForwardParts);
  m.def("cross_attention_backward_parts", &CrossAttentionBackwardParts);
  DefineOp<Forward>(m, "cross_attention_forward", &CrossAttentionForward);
  DefineOp<Backward>(m, "cross_attention_backward", &CrossAttentionBackward);
}

void DefineTopKAttention(py::module_& m) {
  using Selection = TopKSelectionParams;
  py::class_<Selection>(m, "TopKSelectionParams")
      .def(py::init([](uintptr_t bits, CrossAttentionCall call, int32_t top_k) {
        return Selection{reinterpret_cast<uint32_t*>(bits), call, top_k};
      }));
  using Indices = TopKIndicesParams;
  py::class_<Indices>(m, "TopKIndicesParams")
      .def(py::init([](uintptr_t indices, uintptr_t bits, int64_t rows, int32_t Nk, int32_t top_k,
                       bool to_bits) {
        return Indices{reinterpret_cast<int32_t*>(indices),
                       reinterpret_cast<uint32_t*>(bits),
                       rows,
                       Nk,
                       top_k,
                       to_bits};
      }));
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
