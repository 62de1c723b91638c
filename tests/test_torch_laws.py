"""Every law that PyTorch's own suite has for an optimizer, run over SGDSaI: the list, and updates.

The laws are those of ``test/test_optim.py`` and ``test/optim/test_optim.py`` in PyTorch's
repository; the bodies are ours. They run over the configurations of ``torch_cases.py``.

Law there                                    Here
-------------------------------------------  ---------------------------------------------------
optim_infos_do_not_specify_global_cliquey_   test_inputs_leave_the_implementation_to_the_laws
  kwargs
errors                                       test_wrong_inputs_are_refused
forloop_goes_right_direction                 test_forloop_goes_the_right_way,
                                             test_forloop_goes_the_right_way_with_schedulers
param_group_with_lrscheduler_goes_right_...  test_groups_with_schedulers_go_the_right_way
tensor_lr                                    test_tensor_lr_equals_float_lr,
                                             test_tensor_lr_equals_float_lr_with_a_scheduler
complex                                      test_complex_equals_reals
complex_2d                                   test_complex_equals_real_and_imaginary_part (with one
                                             gain for all: a block has one gain, two blocks two)
param_groups_weight_decay                    test_groups_with_their_own_decay
param_groups_lr                              test_groups_with_their_own_lr
step_is_noop_when_params_have_no_grad        test_no_gradient_no_change
step_is_noop_for_zero_grads                  test_zero_gradient_no_change_but_decay
grads_are_never_inplaced_into                test_gradients_are_never_written
optimizer_can_be_printed                     test_can_be_printed
non_empty_state                              test_state_is_not_empty

In test_torch_laws_paths.py:
foreach_matches_forloop                      test_foreach_equals_forloop
mixed_device_dtype                           test_foreach_equals_forloop_on_mixed_dtypes (dtypes
                                             only: devices need two GPUs)
set_default_dtype_works_with_foreach         test_foreach_equals_forloop_under_another_default_dtype
peak_memory_foreach                          test_foreach_needs_at_most_one_intermediate
foreach_large_tensor                         test_foreach_takes_a_large_tensor_in_slices (2 ** 21
                                             elements; 2 ** 32 need 72 GB on a GPU)
defaults_changed_to_foreach                  test_default_is_foreach_where_torch_has_it_so
optimizers_differentiable_wrt_params         test_differentiable_in_parameter_gradient_and_momentum,
                                             test_gain_is_a_constant_to_autograd
differentiable_lr                            test_differentiable_in_lr (there without momentum, here
                                             with and without)
compiled optimizers, correctness             test_compiled_step_equals_eager,
                                             test_compiled_step_equals_eager_through_aot,
                                             test_compiled_step_with_a_scheduler_equals_eager,
                                             test_compiled_step_guards_on_missing_gradients

In test_torch_laws_state.py:
state_dict_deterministic                     test_state_dict_is_deterministic
can_load_older_state_dict                    test_older_state_dict_loads,
                                             test_released_state_dict_loads
can_load_from_to_named_state_dict            test_named_and_unnamed_state_dicts_load_each_other
save_load_equality_with_weights_only         test_saved_and_loaded_are_equal
load_nontensor_step                          test_gain_that_is_no_tensor_loads
state_dict_cross_device, cpu_load_state_     test_state_goes_to_its_parameters_device_and_dtype,
  dict, state_dict_with_cuda_params          (onto the meta device, into other dtypes; onto a GPU
                                             where there is one)
state_dict_pre_hook, .._post_hook,           test_state_dict_hooks
  .._pre_post_hook
load_state_dict_pre_hook_and_prepend,        test_load_state_dict_pre_hooks_in_order,
  .._post_hook, .._pre_post_hook             test_load_state_dict_post_hook_sees_the_loaded_state
step_pre_hook, step_post_hook                test_step_hooks
step_all_hooks                               test_step_hooks_of_all_optimizers
deepcopy_copies_all_public_attrs             test_deepcopy_and_pickle_go_on_as_the_original,
                                             test_optimizer_with_any_mapping_of_gains_can_be_copied

Left out:
forloop_goes_right_direction_multigpu        needs two GPUs
rosenbrock_sparse                            sparse gradients are refused: see errors
fused_matches_forloop, fused_error_on_       no fused kernel yet: fused=True is refused, see errors
  params_on_meta, fused_large_tensor,
  fused_does_not_step_if_foundinf, fused_
  cpu_matches_device, fused_mixed_precision_*
capturable, CUDA graphs                      need a GPU, and an argument that SGDSaI has no need of
TestLRScheduler, TestSWAUtils                of schedulers and averages, not of optimizers
differentiable_weight_decay, differentiable_ the decay is a number here; a tensor is refused
  weight_decay_and_lr
adamw_serialization                          of Adam and AdamW alone
second_order_optims_return_consistent_types, of LBFGS alone
  step_iteration
"""

import re

import pytest
import torch
from torch.testing import assert_close
from torch.testing._internal.common_optimizers import OptimizerErrorEnum
from torch_cases import (
    INFO,
    INPUTS,
    MORE_SCHEDULERS,
    SCHEDULERS,
    arguments,
    configurations,
    descend,
    fill_gradients,
    linear_problem,
    over_configurations,
    over_inputs,
)

from nomadam import SGDSaI

ALL_SCHEDULERS = SCHEDULERS | MORE_SCHEDULERS
ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)


def test_inputs_leave_the_implementation_to_the_laws():
    implementations = {"foreach", "fused", "differentiable"}
    assert not any(implementations & kwargs.keys() for kwargs in INPUTS.values())
    assert len(configurations()) == 3 * len(INPUTS)


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.optimizer_error_input.desc)
def test_wrong_inputs_are_refused(case):
    params = case.optimizer_error_input.params
    kwargs = case.optimizer_error_input.kwargs
    if case.error_on == OptimizerErrorEnum.STEP_ERROR:
        optimizer = SGDSaI(params, **kwargs)
        before = [param.detach().clone() for param in params]
        with pytest.raises(case.error_type, match=case.error_regex):
            optimizer.step()
        assert all(map(torch.equal, params, before)) and not optimizer.state
    elif issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=re.compile(case.error_regex, re.DOTALL)):
            SGDSaI(params, **kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            SGDSaI(params, **kwargs)


def right_way(kwargs, first, last):
    return last > first if kwargs.get("maximize") else last < first


@pytest.mark.parametrize("contiguous", [True, False])
@over_configurations(skip=("differentiable",))
def test_forloop_goes_the_right_way(configuration, contiguous):
    kwargs = arguments(configuration)
    weight, bias, loss = linear_problem(contiguous=contiguous)
    optimizer = SGDSaI([weight, bias], **kwargs)
    losses = descend(optimizer, loss, 20)
    assert right_way(kwargs, losses[0], losses[-1])


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("contiguous", [True, False])
@over_inputs()
def test_forloop_goes_the_right_way_with_schedulers(configuration, contiguous, schedule):
    kwargs = arguments(configuration)
    weight, bias, loss = linear_problem(contiguous=contiguous)
    optimizer = SGDSaI([weight, bias], **kwargs)
    schedulers = [make(optimizer) for make in SCHEDULERS[schedule]]
    losses = descend(optimizer, loss, 20, schedulers)
    assert right_way(kwargs, losses[0], losses[-1])


@pytest.mark.parametrize("schedule", ALL_SCHEDULERS)
@pytest.mark.parametrize("foreach", [False, True])
def test_groups_with_schedulers_go_the_right_way(foreach, schedule):
    weight, bias, loss = linear_problem()
    groups = [{"params": [weight]}, {"params": [bias], "lr": 1e-3}]
    optimizer = SGDSaI(groups, foreach=foreach)
    schedulers = [make(optimizer) for make in ALL_SCHEDULERS[schedule]]
    losses = descend(optimizer, loss, 20, schedulers)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dimensions", [0, 1, 2])
@over_configurations(skip=("differentiable",))
def test_tensor_lr_equals_float_lr(configuration, dimensions):
    kwargs = arguments(configuration)
    weight, bias, loss = linear_problem()
    start = [weight.detach().clone(), bias.detach().clone()]
    kwargs["lr"] = 1e-3
    descend(SGDSaI([weight, bias], **kwargs), loss, 5)
    with_float = [weight.detach().clone(), bias.detach().clone()]
    with torch.no_grad():
        weight.copy_(start[0])
        bias.copy_(start[1])
    lr = torch.tensor(1e-3).reshape([1] * dimensions)
    descend(SGDSaI([weight, bias], **{**kwargs, "lr": lr}), loss, 5)
    assert lr.shape == (1,) * dimensions and lr.item() == torch.tensor(1e-3).item()
    assert_close([weight.detach(), bias.detach()], with_float)


@pytest.mark.parametrize("schedule", ALL_SCHEDULERS)
@pytest.mark.parametrize("foreach", [False, True])
def test_tensor_lr_equals_float_lr_with_a_scheduler(foreach, schedule):
    results = []
    for lr in (1e-3, torch.tensor(1e-3), torch.tensor([1e-3])):
        torch.manual_seed(1)
        weight, bias, loss = linear_problem()
        optimizer = SGDSaI([weight, bias], lr=lr, foreach=foreach)
        schedulers = [make(optimizer) for make in ALL_SCHEDULERS[schedule]]
        descend(optimizer, loss, 12, schedulers)
        assert isinstance(optimizer.param_groups[0]["lr"], type(lr))
        results.append([weight.detach(), bias.detach()])
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


@over_configurations(skip=("differentiable",))
def test_complex_equals_reals(configuration):
    shapes = [(10, 5), (10,), ()]
    complex_params = [torch.randn(s, dtype=torch.complex64, requires_grad=True) for s in shapes]
    complex_params.append(torch.randn(10, 5, requires_grad=True))  # the two kinds may be mixed
    reals = [
        (torch.view_as_real(p) if p.is_complex() else p).detach().clone().requires_grad_()
        for p in complex_params
    ]
    complex_optimizer = SGDSaI(complex_params, **arguments(configuration))
    real_optimizer = SGDSaI(reals, **arguments(configuration))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        fill_gradients(complex_params, generator)
        for param, real in zip(complex_params, reals, strict=True):
            grad = param.grad
            real.grad = (torch.view_as_real(grad) if grad.is_complex() else grad).clone()
        complex_optimizer.step()
        real_optimizer.step()
        for param, real in zip(complex_params, reals, strict=True):
            found = torch.view_as_real(param) if param.is_complex() else param
            assert_close(found.detach(), real.detach(), rtol=0, atol=0)
    assert complex_optimizer.gains() == real_optimizer.gains()


@over_configurations(skip=("differentiable",))
def test_complex_equals_real_and_imaginary_part(configuration):
    kwargs = arguments(configuration, gain=2.0)
    z = torch.randn(2, dtype=torch.complex64, requires_grad=True)
    a, b = (part.detach().clone().requires_grad_() for part in (z.real, z.imag))
    one, two = SGDSaI([z], **kwargs), SGDSaI([a, b], **kwargs)

    def rosenbrock(x, y):
        return ((1 - x) ** 2 + (y - x**2) ** 2).abs()

    for _ in range(3):
        one.zero_grad()
        two.zero_grad()
        rosenbrock(*z).backward()
        rosenbrock(*torch.complex(a, b)).backward()
        assert_close(z.grad, torch.complex(a.grad, b.grad))
        one.step()
        two.step()
        assert_close(z.detach(), torch.complex(a, b).detach())


@over_configurations(skip=("differentiable",))
def test_groups_with_their_own_decay(configuration):
    kwargs = arguments(configuration)
    x = torch.randn(5)
    weights = [torch.nn.Parameter(torch.randn(10, 5)) for _ in range(2)]
    groups = [{"params": [weights[0]], **kwargs}, {"params": [weights[1]], **kwargs}]
    groups[1]["weight_decay"] = 0.0
    optimizer = SGDSaI(groups)
    losses = descend(optimizer, lambda: sum(w.mv(x) for w in weights).square().mean(), 20)
    assert right_way(kwargs, losses[0], losses[-1])
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
    before = [w.detach().clone() for w in weights]
    for state, weight in zip(optimizer.state.values(), weights, strict=True):
        if "momentum_buffer" in state:
            state["momentum_buffer"].zero_()
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    decay = kwargs.get("weight_decay", 1e-2)
    assert_close(weights[0].detach(), before[0] * (1 - 1e-2 * decay))
    assert_close(weights[1].detach(), before[1], rtol=0, atol=0)


@over_configurations(skip=("differentiable",))
def test_groups_with_their_own_lr(configuration):
    kwargs = arguments(configuration)
    weight, bias, loss = linear_problem()
    still = torch.nn.Parameter(torch.randn(2, 2))
    still.grad = torch.rand_like(still)
    before = still.detach().clone()
    kwargs.setdefault("lr", 1e-3)
    optimizer = SGDSaI([{"params": [weight, bias], **kwargs}, {"params": [still]}], lr=1e-28)
    first = loss().item()
    for _ in range(20):
        weight.grad = bias.grad = None
        loss().backward()
        optimizer.step()
    assert right_way(kwargs, first, loss().item())
    assert_close(still.detach(), before, rtol=0, atol=0)


@over_configurations()
def test_no_gradient_no_change(configuration):
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [param.clone() for param in params]
    optimizer = SGDSaI(params, **arguments(configuration))
    assert optimizer.step(lambda: 7) == 7
    optimizer.step()
    assert all(map(torch.equal, params, before)) and not optimizer.state


@over_configurations()
def test_zero_gradient_no_change_but_decay(configuration):
    kwargs = arguments(configuration)
    param = torch.randn(5, 1)
    param.grad = torch.zeros_like(param)
    optimizer = SGDSaI([param], **kwargs)
    expected = param.clone()
    for _ in range(2):
        optimizer.step()
        expected *= 1 - float(kwargs.get("lr", 1e-2)) * kwargs.get("weight_decay", 1e-2)
    exactly = {"rtol": 0, "atol": 0} if kwargs.get("weight_decay") == 0.0 else {}
    assert_close(param, expected, **exactly)


@over_configurations()
def test_gradients_are_never_written(configuration):
    param = torch.randn(5, 1)
    param.grad = torch.randn(5, 1)
    before, version = param.grad.clone(), param.grad._version
    optimizer = SGDSaI([param], **arguments(configuration))
    for _ in range(5):
        optimizer.step()
    assert param.grad._version == version and torch.equal(param.grad, before)


@over_configurations()
def test_can_be_printed(configuration):
    optimizer = SGDSaI([torch.randn(2, 3)], **arguments(configuration))
    text = repr(optimizer)
    assert text.startswith("SGDSaI (") and "momentum:" in text


@over_inputs()
def test_state_is_not_empty(configuration):
    model = torch.nn.Linear(5, 5)
    optimizer = SGDSaI(model.parameters(), **arguments(configuration))
    model(torch.rand(2, 5)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2 and all(optimizer.state.values())
