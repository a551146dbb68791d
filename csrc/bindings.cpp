// The Python module braze._C. The only file that includes pybind11.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include "cpu/instruction_set.h"
#include "ops/batch_norm.h"
#include "ops/clip.h"
#include "ops/conv.h"
#include "ops/device_backend.h"
#include "ops/dropout.h"
#include "ops/fingerprint.h"
#include "ops/new_like.h"
#include "ops/optim/step_plan.h"
#include "plan/interface.h"

namespace py = pybind11;

namespace {

// The plan holds Python objects, so the garbage collector must see through it.
void enable_gc(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    return py::cast<braze::StepPlan&>(py::handle(self)).traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) {
      py::cast<braze::StepPlan&>(py::handle(self)).reset();
    }
    return 0;
  };
}

}  // namespace

namespace braze {

void throw_python_error() { throw python_error(); }

const at::Tensor* tensor_in(PyObject* object) {
  return THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}

PyObject* to_python(const at::Tensor& tensor) { return THPVariable_Wrap(tensor); }

}  // namespace braze

PYBIND11_MODULE(_C, m) {
  m.doc() = "braze's compiled CPU operators";
  const std::string mismatch =
      braze::interface_mismatch("libbraze_kernels", braze::kernels_interface());
  if (!mismatch.empty()) throw py::import_error(mismatch);
  m.attr("TORCH_VERSION") = TORCH_VERSION;

  py::class_<braze::StepPlan>(m, "StepPlan", py::custom_type_setup(enable_gc))
      .def(py::init<const std::string&, std::string>(), py::arg("rule"), py::arg("owner"))
      .def(
          "step",
          [](braze::StepPlan& plan, py::handle groups, py::handle state, double grad_scale,
             double window_weight, bool mean, bool counts,
             const std::optional<at::Tensor>& loss_scale,
             const std::optional<at::Tensor>& found_inf, double max_norm, bool find_overflow,
             bool refuse_overflow, bool statistics, double average_weight, bool device_counts) {
            braze::StepScalars scalars;
            scalars.grad_scale = grad_scale;
            scalars.amp = {loss_scale ? &*loss_scale : nullptr, found_inf ? &*found_inf : nullptr};
            scalars.window_weight = window_weight;
            scalars.mean = mean;
            scalars.counts = counts;
            scalars.max_norm = max_norm;
            scalars.find_overflow = find_overflow;
            scalars.refuse_overflow = refuse_overflow;
            scalars.statistics = statistics;
            scalars.average_weight = average_weight;
            scalars.device_counts = device_counts;
            return plan.step(groups.ptr(), state.ptr(), scalars);
          },
          py::arg("groups"), py::arg("state"), py::arg("grad_scale") = 1.0,
          py::arg("window_weight") = -1.0, py::arg("mean") = false, py::arg("counts") = false,
          py::arg("loss_scale") = py::none(), py::arg("found_inf") = py::none(),
          py::arg("max_norm") = -1.0, py::arg("find_overflow") = false,
          py::arg("refuse_overflow") = false, py::arg("statistics") = false,
          py::arg("average_weight") = -1.0, py::arg("device_counts") = false)
      .def(
          "fold",
          [](braze::StepPlan& plan, py::handle groups, py::handle state, double weight,
             bool into_state) { return plan.fold(groups.ptr(), state.ptr(), weight, into_state); },
          py::arg("groups"), py::arg("state"), py::arg("weight"), py::arg("into_state"))
      .def_property_readonly("norm",
                             [](const braze::StepPlan& plan) -> std::optional<at::Tensor> {
                               if (!plan.norm().defined()) return std::nullopt;
                               return plan.norm();
                             })
      .def_property_readonly("found_inf",
                             [](const braze::StepPlan& plan) -> std::optional<at::Tensor> {
                               if (!plan.found_inf().defined()) return std::nullopt;
                               return plan.found_inf();
                             })
      .def("statistics",
           [](braze::StepPlan& plan) {
             py::list result;
             for (const auto& s : plan.statistics()) {
               const braze::GradientSums& sums = s.sums;
               result.append(py::make_tuple(
                   py::reinterpret_borrow<py::object>(s.parameter),
                   std::sqrt(sums.squares) * s.scale, sums.largest * s.scale,
                   static_cast<double>(sums.zeros) /
                       static_cast<double>(std::max<int64_t>(s.numel, 1)),
                   sums.non_finite, std::sqrt(sums.update_squares / sums.param_squares)));
             }
             return result;
           })
      .def("reset", &braze::StepPlan::reset)
      .def_property_readonly("rebuilds", &braze::StepPlan::rebuilds);

  // "one", "two" or "curved" by name, in the order of the activations' numbers.
  py::dict slopes;
#define BRAZE_ITEM(name, slope, torch) slopes[#name] = #slope;
  BRAZE_ACTIVATIONS(BRAZE_ITEM)
#undef BRAZE_ITEM
  m.attr("ACTIVATION_SLOPES") = slopes;

  // Tensor operations, past torch.ops' slower door. The GIL is not held.
  const auto op = [&m](const char* name, auto function) {
    m.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  op("batch_norm_act", braze::batch_norm_act);
  op("batch_norm_act_fork", braze::batch_norm_act_fork);
  op("batch_norm_add_act", braze::batch_norm_add_act);
  op("batch_norm_add_act_fork", braze::batch_norm_add_act_fork);
  op("batch_norm_act_backward", braze::batch_norm_act_backward);
  op("batch_norm_moments", braze::batch_norm_moments);
  op("batch_norm_combine", braze::batch_norm_combine);
  op("batch_norm_apply", braze::batch_norm_apply);
  op("batch_norm_reduce", braze::batch_norm_reduce);
  op("batch_norm_apply_grad", braze::batch_norm_apply_grad);
  op("batch_norm_input_grad", braze::batch_norm_input_grad);
  op("conv_norm_forward", braze::conv_norm_forward);
  op("conv_norm_input_grad", braze::conv_norm_input_grad);
  op("conv_norm_weight_grad", braze::conv_norm_weight_grad);
  op("clip_to_norm", braze::clip_to_norm);
  op("clip_to_value", braze::clip_to_value);
  op("dropout", braze::dropout);
  op("dropout_", braze::dropout_);
  op("dropout_apply", braze::dropout_apply);
  op("dropout_add", braze::dropout_add);
  op("act_dropout", braze::act_dropout);
  op("act_dropout_", braze::act_dropout_);

  m.def(
      "register_backend",
      [](const py::capsule& backend) {
        TORCH_CHECK(std::string(backend.name()) == braze::DeviceBackend::kCapsuleName,
                    "braze's extensions are of different builds (", backend.name(),
                    "): rebuild both");
        braze::register_backend(backend.get_pointer<braze::DeviceBackend>());
      },
      py::arg("backend"));
  m.def("backends", [] {
    std::vector<std::string> names;
    for (const braze::DeviceBackend* backend : braze::backends())
      names.emplace_back(backend->name());
    return names;
  });
  m.def("dropout_takes", &braze::dropout_takes);
  m.def("dropout_terms", [](double p, bool alpha) {
    const auto terms = braze::dropout_terms_of(p, alpha);
    return std::make_tuple(terms.scale, terms.shift, terms.dropped);
  });
  m.def("fingerprint", &braze::fingerprint, py::arg("tensors"),
        py::call_guard<py::gil_scoped_release>());
  m.def("set_memory_reuse", &braze::set_memory_reuse, py::arg("on"));
  m.def("memory_reuse", &braze::memory_reuse);
  m.def("memory_kept", &braze::memory_kept);
  m.def("empty_memory_cache", &braze::empty_memory_cache);
  m.def("available_instruction_sets", &braze::cpu::available_instruction_sets);
  m.def("instruction_set", &braze::cpu::instruction_set);
  m.def("set_instruction_set", &braze::cpu::set_instruction_set, py::arg("name"));
}
