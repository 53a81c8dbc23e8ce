"""What operators take beside tensors, numpy arrays, and what they refuse by name: tensors that hide their elements."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import awd_fast
from awd_fast import ops
from awd_fast.errors import InputError
from awd_fast.objective import SGD, Adam, Objective
from tests.test_native import models_like

AWD = torch.ops.awd_fast
GIVEN = {
    "gram": lambda base, models, more: ops.gram(base, models),
    "combine": lambda base, models, more: ops.combine(base, models, more(torch.ones(1, 2))),
    "multi_dot": lambda base, models, more: ops.multi_dot(base, models, more(torch.ones(4, 6))),
    "merge_rows": lambda base, models, more: ops.merge_rows(base, models, more(torch.ones(2)), Objective(), SGD()),
    "descend": lambda base, models, more: ops.descend(more(torch.eye(2).double()[None]), Objective(), SGD()),
    "descend_elements": lambda base, models, more: ops.descend_elements(more(torch.ones(3, 2, 4)), Objective(), Adam()),
    "adam_rows": lambda base, models, more: ops.adam_rows(base, models, Objective(), Adam(iterations=2)),
    "gram_many": lambda base, models, more: ops.gram_many([(base, models)]),
    "combine_many": lambda base, models, more: ops.combine_many([(base, models)], [more(torch.ones(1, 2))]),
    "multi_dot_many": lambda base, models, more: ops.multi_dot_many([(base, models)], [more(torch.ones(4, 6))]),
    "merge_rows_many": lambda base, models, more: ops.merge_rows_many(
        [(base, models)], more(torch.ones(2)), Objective(), SGD()
    ),
    "trim": lambda base, models, more: [*vars(ops.trim(base, models, [(0, 5)] * 2)).values()],
    "sparse_norms": lambda base, models, more: ops.sparse_norms(base, models, ops.Bernoulli((0.5, 0.5))),
    "sparse_merge": lambda base, models, more: ops.sparse_merge(base, models, [0.5, 0.7], ops.Bernoulli((0.5, 0.5))),
}


def read_only(tensor):
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("name", GIVEN)
def test_arrays_give_what_tensors_give(name):
    for dtype in (torch.float16, torch.float32, torch.float64):
        base, models = models_like((4, 6), 2, dtype, 0)
        expected = GIVEN[name](base, models, lambda tensor: tensor)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = GIVEN[name](read_only(base), [read_only(model) for model in models], read_only)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)  # cuts of rank 0 are NaN


def test_arrays_are_read_where_they_lie(tmp_path):
    base, models = models_like((6, 8), 2, torch.float32, 0)
    np.save(tmp_path / "base.npy", base.numpy())
    mapped = np.load(tmp_path / "base.npy", mmap_mode="r")
    for view in (lambda array: array, lambda array: array[1:, ::2], lambda array: array.T):
        given = ops.inputs.given("base", view(mapped))
        assert given.data_ptr() == view(mapped).__array_interface__["data"][0]
        tensors = torch.from_numpy(view(base.numpy())), [torch.from_numpy(view(model.numpy())) for model in models]
        assert torch.equal(ops.gram(view(mapped), [view(model.numpy()) for model in models]), ops.gram(*tensors))
    state, slope = np.zeros((6, 8), np.float32), np.ones(3)
    ops.adam_step(base.numpy(), models, state, state * 0, state * 0, slope, Adam(), 1)
    assert state.any()


def test_an_array_lives_as_long_as_its_tensor():
    tensor = ops.inputs.given("base", read_only(torch.arange(1000.0)))
    np.zeros(1000, np.float32)
    assert torch.equal(tensor, torch.arange(1000.0))


def test_arrays_in_a_compiled_function():
    def gram(base, model):
        return ops.gram(base, [model])

    base, model = torch.randn(2, 3, 4).numpy()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(gram, fullgraph=True, backend="aot_eager")(base, model), gram(base, model))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((4, 6), np.int32), r"^base is a numpy array of i4 \(int32\); expected float16, float32 or float64"),
        (np.ones((4, 6), ">f4"), r"^base is a numpy array of >f4 .* byte order"),
        (np.ones((4, 6), np.float32)[::-1], r"^base is a numpy array with strides of \[-24, 4\] bytes; .*ascontiguous"),
        (np.ma.masked_array(np.ones((4, 6), np.float32)), "^base is a masked array"),
        (np.ones((4, 6), [("a", "u1"), ("b", "f4")])["b"], r"^base is a numpy array with strides of \[30, 5\] bytes"),
    ],
)
def test_other_arrays_are_refused_by_the_argument(array, words):
    model = torch.ones(4, 6)
    for call in (lambda: ops.gram(array, [model]), lambda: ops.sparse_merge(array, [model], [1.0])):
        with pytest.raises(InputError, match=words):
            call()
    with pytest.raises(InputError, match=words.replace("^base", "^parameter 1: base")):
        ops.gram_many([(model, [model]), (array, [model])])
    state = read_only(model * 0)
    with pytest.raises(InputError, match=r"^velocity is a read-only numpy array"):
        ops.adam_step(model, [model], model * 0, state, model * 0, torch.ones(2).double(), Adam(), 1)


DIRECT = {
    "gram": lambda base, model: AWD.gram(base, [model]),
    "combine": lambda base, model: AWD.combine(base, [model], torch.ones(1, 1)),
    "merge_rows": lambda base, model: AWD.merge_rows.sgd(base, [model], torch.ones(1)),
    "adam_rows": lambda base, model: AWD.adam_rows.adam(base, [model]),
    "multi_dot": lambda base, model: AWD.multi_dot(base, [model], base),
    "gram_many": lambda base, model: AWD.gram_many([base], [model], 1),
    "combine_many": lambda base, model: AWD.combine_many([base], [model], [torch.ones(1, 1)], 1),
    "trim": lambda base, model: AWD.trim([base], [model], [0, 1], 1),
    "sparse_merge": lambda base, model: AWD.sparse_merge(base, [model], [1.0], [1.0], None, None, [], [], 0),
}
ODD = {
    "sparse_coo": (lambda tensor: tensor.to_sparse(), r"torch.sparse_coo on cpu; .* give its .to_dense\(\)"),
    "sparse_csr": (lambda tensor: tensor.to_sparse_csr(), r"torch.sparse_csr on cpu; .* give its .to_dense\(\)"),
    "quantised": (
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        r"quantised \(torch.qint8\); .* give its .dequantize\(\)",
    ),
    "nested": (lambda tensor: torch.nested.nested_tensor(list(tensor)), r"nested tensor, .* its .unbind\(\)"),
    "jagged": (
        lambda tensor: torch.nested.nested_tensor(list(tensor), layout=torch.jagged),
        r"NestedTensor, .* its .unbind\(\)",
    ),
    "masked": (lambda tensor: torch.masked.masked_tensor(tensor, tensor > 0), r"MaskedTensor, .* its .to_tensor"),
}


OLD = not hasattr(torch.library, "register_torch_dispatch")
"""PyTorch before 2.6, which refuses its own classes itself where `torch.ops` is called."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in ODD if not (OLD and kind in ("jagged", "masked"))])
def test_tensors_that_hide_their_elements_are_refused_by_kind(kind):
    odd, words = ODD[kind]
    base, model = (odd(tensor) for tensor in torch.randn(2, 4, 6))
    for call in DIRECT.values():
        with pytest.raises(InputError, match=words):
            call(base, model)
    for call in (
        lambda: ops.gram(base, [model]),
        lambda: ops.sparse_merge(base, [model], [1.0]),
        lambda: ops.gram_many([(base, [model])]),
        lambda: awd_fast.merge({"w": base}, [{"w": model}]),
    ):
        with pytest.raises(InputError, match=rf"(base is|'w' is) (a )?{words}"):
            call()
    if kind != "masked":
        with pytest.raises(InputError, match=rf"weights is (a )?{words}"):
            ops.combine(torch.ones(4, 6), [torch.ones(4, 6)], base)


SHARDED = """
import sys
from awd_fast import ops
assert "torch.distributed.tensor" not in sys.modules  # so that it is not slow to import
import torch, torch.distributed
import awd_fast
from awd_fast.errors import InputError
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from tests.test_inputs import DIRECT

torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
plain = torch.randn(4, 6)
base, model = (distribute_tensor(torch.randn(4, 6), mesh, [Shard(0)]) for _ in range(2))
weights = distribute_tensor(torch.ones(1, 1), mesh, [Replicate()])

def linear(weight):
    module = torch.nn.Linear(6, 4, bias=False)
    module.weight = torch.nn.Parameter(weight)
    return module

calls = {name: lambda call=call: call(base, model) for name, call in DIRECT.items()}
calls |= {f"{name} mixed": lambda call=call: call(plain, model) for name, call in DIRECT.items()}
calls["weights"] = lambda: torch.ops.awd_fast.combine(plain, [plain], weights)
calls["learned weights"] = lambda: torch.ops.awd_fast.combine(plain, [plain], weights.requires_grad_())
calls["ops.gram"] = lambda: ops.gram(plain, [model])
calls["ops.combine"] = lambda: ops.combine(plain, [plain], weights)
calls["ops.gram_many"] = lambda: ops.gram_many([(plain, [plain]), (base, [model])])
calls["merge"] = lambda: awd_fast.merge({"w": base}, [{"w": model}])
calls["merge_models"] = lambda: awd_fast.merge_models(linear(base), [linear(model)])
calls["disentangle"] = lambda: awd_fast.disentangle([base, model])
for name, call in calls.items():
    try:
        call()
    except InputError as error:
        print(name, "|", error)
torch.distributed.destroy_process_group()
print(len(calls))
"""


@pytest.mark.skipif(not hasattr(torch.library, "register_torch_dispatch"), reason="PyTorch refuses them itself")
def test_sharded_tensors_are_refused_by_everything_that_takes_tensors(tmp_path):
    """In a process of its own, where DTensor is imported after the operators, as a file's sorted imports have it."""
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *said, count = done.stdout.splitlines()
    assert len(said) == int(count), done.stdout + done.stderr
    assert all("DTensor" in line and "sharded among processes" in line for line in said), done.stdout
    assert all(".full_tensor()" in line for line in said), done.stdout
    assert any(line.startswith("ops.gram_many | parameter 1: base is a DTensor") for line in said)
    assert any(line.startswith("merge | base: 'w' is a DTensor") for line in said)
