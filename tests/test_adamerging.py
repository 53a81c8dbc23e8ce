"""AdaMerging: the same descent as autograd through the merge written out, and what it does to the model it is given."""

import pytest
import torch
from torch import nn

import awd_fast
from awd_fast import ROWS, InputError, adamerge
from tests.ada_cases import make, plain_descent, plain_entropy
from tests.test_docs import run_python

SMOOTH = {"similarity": "squared", "optimizer": awd_fast.SGD(lr=1e-2, iterations=20)}
WAYS = [("task_arithmetic", "row")] + [("awd", groups) for groups in ("row", "column", "tensor", "global")]


@pytest.mark.parametrize("per", ["task", "tensor"])
@pytest.mark.parametrize(("method", "groups"), WAYS)
@pytest.mark.parametrize("name", ["mlp", "conv", "bert"])
def test_the_descent_is_that_of_autograd(name, method, groups, per):
    case = make(name)
    options = SMOOTH | {"groups": groups}
    found = adamerge(
        case.model, case.base, case.models, case.batches, method=method, per=per, steps=4, lr=0.05, **options
    )
    start = torch.full_like(found.coefficients, 0.3)
    expected, history = plain_descent(case, start, method, options, 4, 0.05)
    torch.testing.assert_close(found.history.sum(dim=1), torch.tensor(history, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.coefficients, expected, rtol=1e-6, atol=1e-7)
    assert (found.coefficients - start).abs().max() > 0.01


@pytest.mark.parametrize(("penalty", "optimizer"), [("l2", awd_fast.Adam(iterations=5)), ("l1", awd_fast.SGD())])
@pytest.mark.parametrize("groups", ["row", "column", "tensor", "global"])
def test_descents_on_elements(groups, penalty, optimizer):
    case = make("mlp")
    options = {"groups": groups, "penalty": penalty, "optimizer": optimizer, "similarity": "squared", "alpha": 1e-3}
    found = adamerge(case.model, case.base, case.models, case.batches, steps=3, lr=0.05, **options)
    expected, _ = plain_descent(case, torch.full_like(found.coefficients, 0.3), "awd", options, 3, 0.05)
    torch.testing.assert_close(found.coefficients, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "groups"), WAYS)
def test_equal_coefficients_are_a_merge(method, groups, dtype):
    case = make("bert")
    base, *models = [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in s.items()} for s in [case.base, *case.models]
    ]
    options = SMOOTH | {"groups": groups, "method": method}
    expected = awd_fast.merge(base, models, scale=0.25, **options)
    model = case.model.to(dtype)
    found = adamerge(model, base, models, case.batches, initial=0.25, steps=0, **options)
    assert found.state_dict.keys() == expected.keys()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance)
        assert torch.equal(found.state_dict[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_entropy_falls(dtype):
    case = make("mlp")
    states = [{k: v.to(dtype) for k, v in s.items()} for s in [case.base, *case.models]]
    batches = [[batch.to(dtype) for batch in stream] for stream in case.batches]
    found = adamerge(case.model.to(dtype), states[0], states[1:], batches, steps=60, lr=0.02)
    totals = found.history.sum(dim=1)
    assert totals[-2:].mean() < 0.8 * totals[:2].mean()
    assert found.coefficients.dtype == torch.float64


def test_a_narrow_model_of_wide_state_dicts_and_the_other_way():
    case = make("mlp")
    wide = adamerge(case.model, case.base, case.models, case.batches, steps=3, lr=0.05, **ROWS)
    halves = [{k: v.bfloat16() for k, v in s.items()} for s in [case.base, *case.models]]
    found = adamerge(case.model, halves[0], halves[1:], case.batches, steps=3, lr=0.05, **ROWS)
    assert found.state_dict["0.weight"].dtype == torch.float64
    torch.testing.assert_close(found.coefficients, wide.coefficients, rtol=0.05, atol=0.02)
    narrow = [[batch.float() for batch in stream] for stream in case.batches]
    found = adamerge(case.model.float(), case.base, case.models, narrow, steps=3, lr=0.05, **ROWS)
    assert found.state_dict["0.weight"].dtype == torch.float32
    torch.testing.assert_close(found.coefficients, wide.coefficients, rtol=1e-3, atol=1e-3)


def test_a_result_goes_on_where_it_ended():
    case = make("mlp")
    arguments = (case.model, case.base, case.models, case.batches)
    seen = []
    whole = adamerge(*arguments, steps=3, on_step=lambda *given: seen.append(given))
    assert [number for number, *_ in seen] == [0, 1, 2]
    assert [entropy for _, entropy, _ in seen] == whole.history.sum(dim=1).tolist()
    again = adamerge(*arguments, steps=1, initial=seen[2][2])
    assert torch.equal(again.history[0], whole.history[2])
    once = adamerge(*arguments, steps=0, initial=whole.coefficients)
    assert all(torch.equal(once.state_dict[name], tensor) for name, tensor in whole.state_dict.items())
    per_task = adamerge(*arguments, steps=0, initial=[0.1, 0.2, 0.3])
    assert torch.equal(per_task.coefficients, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)[:, None].expand(3, 6))


def test_results_are_the_same_to_the_bit():
    case = make("conv")
    first, second = (adamerge(case.model, case.base, case.models, case.batches, steps=5) for _ in range(2))
    assert torch.equal(first.coefficients, second.coefficients)
    assert torch.equal(first.history, second.history)


def test_bounds_are_those_of_the_authors_code():
    case = make("mlp")
    bounds = (0.2, 0.35)
    found = adamerge(case.model, case.base, case.models, case.batches, steps=40, lr=0.05, bounds=bounds)
    assert found.coefficients.min() == 0.2
    assert found.coefficients.max() == 0.35
    raw = torch.full((3, 6), 0.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=0.05)
    for number in range(40):
        adam.zero_grad()
        plain_entropy(case, raw.clamp(*bounds), "awd", {"groups": "row"}, number).backward()
        adam.step()
    torch.testing.assert_close(found.coefficients, raw.detach().clamp(*bounds), rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5, bias=False)
        self.second = nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.arange(3))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def tied_case():
    torch.manual_seed(1)
    model = Tied()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    models = []
    for _ in range(2):
        weight = base["first.weight"] + 0.3 * torch.randn(5, 5)
        models.append(base | {"first.weight": weight, "second.weight": weight.clone()})
    return model, base, models, [[torch.randn(8, 5)]] * 2


def test_tied_parameters_are_one_tensor():
    model, base, models, batches = tied_case()
    found = adamerge(model, base, models, batches, steps=3)
    assert found.names == ("first.weight",)
    assert found.coefficients.shape == (2, 1)
    assert model.first.weight is model.second.weight
    assert torch.equal(found.state_dict["second.weight"], model.first.weight)
    models[1]["second.weight"] += 1.0
    with pytest.raises(InputError, match=r"ties 'first.weight' and 'second.weight', but models\[1\] has different"):
        adamerge(model, base, models, batches, steps=1)


def test_the_base_may_be_the_model_itself():
    case = make("mlp")
    own = case.model.state_dict()
    before = {name: tensor.clone() for name, tensor in own.items()}
    found = adamerge(case.model, own, case.models, case.batches, steps=2)
    assert all(torch.equal(own[name], tensor) for name, tensor in before.items())
    assert not torch.equal(found.state_dict["0.weight"], before["0.weight"])
    assert torch.equal(case.model[0].weight, found.state_dict["0.weight"])


def test_heads_in_the_callable_and_other_numbers_of_streams():
    case = make("mlp")
    heads = [nn.Linear(4, classes).double() for classes in (3, 7)]
    asked = []

    def logits(model, batch, index):
        asked.append(index)
        return heads[index](model(batch))

    found = adamerge(case.model, case.base, case.models, case.batches[:2], logits=logits, steps=3)
    assert asked == [0, 1] * 3
    assert found.history.shape == (3, 2)
    assert all(parameter.grad is None for head in heads for parameter in head.parameters())


def test_what_the_model_alone_has_stays():
    case = make("mlp")
    model = nn.Sequential(*case.model, nn.Linear(4, 2).double())
    head = model[5].weight.clone()
    found = adamerge(model, case.base, case.models, case.batches, steps=2)
    assert torch.equal(model[5].weight, head)
    assert "5.weight" not in found.state_dict


def test_others_that_are_kept():
    case = make("conv")
    with torch.no_grad():
        case.model[1].running_mean += 1.0
        case.model[1].num_batches_tracked += 5
    found = adamerge(case.model, case.base, case.models, case.batches, steps=2, others="base")
    assert found.names == ("5.weight",)
    for name in ("0.weight", "1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(case.model.state_dict()[name], case.base[name])
        assert case.model.state_dict()[name].data_ptr() != case.base[name].data_ptr()


def test_gradients_and_flags_are_the_callers():
    case = make("mlp")
    case.model[0].weight.requires_grad_(False)
    case.model[2].weight.grad = torch.ones_like(case.model[2].weight)
    with torch.no_grad():
        adamerge(case.model, case.base, case.models, case.batches, steps=2)
    assert not case.model[0].weight.requires_grad
    assert torch.equal(case.model[2].weight.grad, torch.ones_like(case.model[2].weight))
    assert case.model[0].bias.grad is None


def test_an_exception_gives_the_model_back():
    case = make("conv")
    with torch.no_grad():
        for tensor in case.model.parameters():
            tensor += 1.0
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in case.model.state_dict().items()}

    def stop(number, entropy, coefficients):
        if number == 1:
            raise KeyboardInterrupt

    for others in ("task_arithmetic", "base"):
        with pytest.raises(KeyboardInterrupt):
            adamerge(case.model, case.base, case.models, case.batches, steps=3, on_step=stop, others=others)
        for name, tensor in case.model.state_dict().items():
            assert tensor.data_ptr() == before[name][0]
            assert torch.equal(tensor, before[name][1])
        assert all(parameter.grad is None for parameter in case.model.parameters())


def test_a_tensor_that_the_loss_does_not_see_keeps_its_coefficient():
    case = make("mlp")
    found = adamerge(
        case.model,
        case.base,
        case.models,
        case.batches,
        logits=lambda model, batch, _: model[0](batch),
        steps=3,
        lr=0.05,
    )
    assert torch.equal(found.coefficients[:, 2:], torch.full((3, 4), 0.3, dtype=torch.float64))
    assert (found.coefficients[:, :2] != 0.3).all()


def test_data_loaders_and_lists_of_one_tensor():
    case = make("mlp")
    data = [torch.utils.data.TensorDataset(torch.cat(stream)) for stream in case.batches]
    loaders = [torch.utils.data.DataLoader(own, batch_size=7) for own in data]
    found = adamerge(case.model, case.base, case.models, loaders, steps=3)
    expected = adamerge(case.model, case.base, case.models, case.batches, steps=3)
    assert torch.equal(found.coefficients, expected.coefficients)


X = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
REFUSED = {
    "model": ({"model": "net"}, "model is str; expected a torch.nn.Module"),
    "other names": ({"model": nn.Sequential(nn.Sequential(nn.Linear(2, 2)))}, "no parameter or buffer '0.weight'"),
    "shape": (
        {"model": nn.Sequential(nn.Linear(3, 2))},
        r"model's '0.weight' is float32 \[2, 3\]; expected float32 \[2, 2\]",
    ),
    "meta": ({"model": nn.Sequential(nn.Linear(2, 2, device="meta"))}, "'0.weight' is on meta"),
    "missing": ({"models": [{"0.weight": torch.zeros(2, 2)}]}, r"models\[0\] lacks the tensor '0.bias'"),
    "no models": ({"models": []}, "no model was given"),
    "NaN": ({"models": [{"0.weight": torch.eye(2), "0.bias": X[0] * torch.nan}]}, r"'0.bias' holds 2 NaN"),
    "no streams": ({"batches": []}, "batches is empty"),
    "one tensor": ({"batches": X}, "batches is Tensor; expected a list of iterables"),
    "no iterable": ({"batches": [3]}, r"batches\[0\] is int; expected an iterable"),
    "empty stream": ({"batches": [[X], []]}, r"batches\[1\] has no batch$"),
    "iterator": ({"batches": [iter([X])]}, r"batches\[0\] has no batch left; expected an iterable that can begin anew"),
    "labels": ({"batches": [[(X, X)]]}, r"batches\[0\] gives a tuple; expected a tensor or a mapping, or logits"),
    "1-D logits": ({"logits": lambda m, b, i: m(b)[0]}, r"step 0: the logits of batches\[0\] are torch.float32 \[2\]"),
    "no logits": ({"logits": lambda m, b, i: None}, r"step 0: the logits of batches\[0\] are NoneType"),
    "empty batch": ({"batches": [[X[:0]]]}, r"are torch.float32 \[0, 2\]"),
    "constant": ({"logits": lambda m, b, i: b}, "do not depend on the merged tensors"),
    "entropy": ({"logits": lambda m, b, i: m(b) * torch.inf}, r"step 0: the entropy of batches\[0\] is nan"),
    "later": ({"batches": [[X, X * torch.inf]]}, r"step 1: the entropy of batches\[0\] is nan"),
    "too few": ({"initial": [0.3, 0.2]}, r"initial has the shape \[2\]; expected a number, \[1\], .* or \[1, 2\]"),
    "of tasks": (
        {"initial": torch.ones(1, 2), "per": "task"},
        r"initial has the shape \[1, 2\]; expected a number, \[1\]",
    ),
    "no numbers": ({"initial": "much"}, "initial is str; expected a number"),
    "not finite": ({"initial": [float("nan")]}, "initial holds NaN or Inf"),
    "per": ({"per": "layer"}, "per is 'layer'; expected one of task, tensor"),
    "method": ({"method": "average"}, "method is 'average'; expected one of awd, task_arithmetic"),
    "steps": ({"steps": -1}, "steps is -1"),
    "lr": ({"lr": float("nan")}, "lr is nan"),
    "bounds": ({"bounds": (1.0, 0.0)}, "expected the lower one first"),
    "one bound": ({"bounds": 1.0}, "bounds is 1.0; expected two numbers"),
    "nothing": ({"method": "task_arithmetic", "exclude": "*", "others": "base"}, "no parameter of the model is merged"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_said_in_one_sentence(what):
    changes, message = REFUSED[what]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {"model": model, "models": [{k: v + 0.1 for k, v in base.items()}], "batches": [[X]], "steps": 2} | changes
    with pytest.raises(InputError, match=message) as caught:
        adamerge(given.pop("model"), base, given.pop("models"), given.pop("batches"), **given)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def test_a_merge_that_overflows_at_the_end():
    model = nn.Sequential(nn.Linear(2, 2)).half()
    base = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    models = [{name: tensor + 6e4 for name, tensor in base.items()}]
    with pytest.raises(InputError, match=r"'0.weight' overflows float16"):
        adamerge(model, base, models, [[X.half()]], steps=0, initial=2.0)


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_python("adamerging.md")
    totals = names["found"].history.sum(dim=1)
    assert totals[-8:].mean() < totals[:8].mean()
    assert all(share > 0.85 for share in names["accuracies"](names["encoder"]))
    assert torch.load(tmp_path / "merged.pt").keys() == names["base"].keys()
