"""mergekit's methods with awd_fast's operators give what mergekit gives, through mergekit's entry points."""

import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_state_dicts, merge_tensors
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod, GeneralizedTaskArithmeticMerge
from mergekit.merge_methods.linear import linear_merge
from mergekit.options import MergeOptions
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from awd_fast import ops
from awd_fast.integrations import mergekit as integration
from awd_fast.integrations import mergekit_accelerate
from awd_fast.ops import backends
from tests.integrations.families import WEIGHTS, Family, make, same, tensors, written
from tests.test_cli import run

DETERMINISTIC = ("linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
QUIET = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    yield
    integration.restore()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The results of the operator, each of which was not mergekit's."""
    found: list[Tensor] = []
    operator = ops.sparse_merge

    def noted(*arguments: object, **options: object) -> Tensor:
        found.append(operator(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(ops, "sparse_merge", noted)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make(tmp_path_factory.mktemp("llama"), "llama", torch.float32, False)


def states(dtype: torch.dtype = torch.float32, count: int = 3) -> list[State]:
    """A base and models near it, none of whose magnitudes in float32 tie."""
    g = torch.Generator().manual_seed(0)
    shapes = {"matrix": (40, 56), "same shape": (40, 56), "vector": (77,), "conv": (6, 5, 3), "scalar": ()}
    base = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    models = [{n: t + 0.1 * torch.randn(t.shape, generator=g).double() for n, t in base.items()} for _ in range(count)]
    return [{name: tensor.to(dtype) for name, tensor in state.items()} for state in (base, *models)]


def parameters(method: str, **others: object) -> dict[str, object]:
    """Of all options a value that is not the default."""
    if method == "linear":
        return {"weight": [1.0, 0.5, 1.5, 0.25]} | others
    given: dict[str, object] = {"weight": list(WEIGHTS), "density": [0.5, 0.3, 1.0], "lambda": 0.7}
    if "breadcrumbs" in method:
        given["gamma"] = [0.1, 0.05, 0.2]
    if "della" in method:
        given["epsilon"] = [0.1, 0.2, 0.3]
    return given | others


def both(work: Callable[[], object]) -> tuple[object, object]:
    """What is made with mergekit's arithmetic, and with ours."""
    integration.restore()
    theirs = work()
    integration.accelerate()
    return theirs, work()


def merged(method: str, given: list[State], **options: object) -> State:
    return merge_state_dicts(given, method, base=0, parameters=parameters(method, **options))


def wrong(found: State, exact: State) -> float:
    """The share of elements that are not the exact result, rounded once."""
    differing = [(tensor != exact[name].to(tensor.dtype)).flatten() for name, tensor in found.items()]
    return float(torch.cat(differing).double().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"normalize": True, "rescale": True, "int8_mask": True}], ids=["plain", "all"])
@pytest.mark.parametrize("method", DETERMINISTIC)
def test_deterministic_methods(method: str, options: dict, dtype: torch.dtype, calls: list[Tensor]) -> None:
    if method == "linear":
        options = {"normalize": not options}
    theirs, ours = both(lambda: merged(method, states(dtype), **options))
    same(ours, theirs, 4)
    assert len(calls) == len(theirs)


@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_nearer_to_the_truth(method: str, dtype: torch.dtype, calls: list[Tensor]) -> None:
    """In float64 mergekit orders magnitudes by float32, as the operators do, so that what is kept is the same."""
    given = states(dtype)
    integration.restore()
    exact = merged(method, [{name: tensor.double() for name, tensor in state.items()} for state in given])
    theirs, ours = both(lambda: merged(method, given))
    if method == "linear":  # which mergekit sums in float32 as well
        assert wrong(ours, exact) < 0.005
    else:  # breadcrumbs may keep others among equal magnitudes
        assert wrong(ours, exact) < 0.2 * wrong(theirs, exact)
    assert len(calls) == len(given[0])


@pytest.mark.parametrize("density", [0.0, 0.001, 0.37, 0.999, 1.0, 1.5])
def test_ties_keeps_exactly_as_many(density: float) -> None:
    """Of 16-bit models, where so many magnitudes tie that which of them mergekit keeps is chance."""
    g = torch.Generator().manual_seed(1)
    base = torch.zeros(100, 100, dtype=torch.bfloat16)
    model = (torch.randint(1, 40, base.shape, generator=g) / 8).to(torch.bfloat16)
    for method in ("ties", "breadcrumbs"):
        given = {"weight": 1.0, "density": density}
        theirs, ours = both(lambda m=method, p=given: merge_tensors([base, model], m, base_index=0, parameters=p))
        assert ours.count_nonzero() == theirs.count_nonzero()
        assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values)


@pytest.mark.parametrize("options", [{}, {"rescale": False}, {"normalize": False}], ids=["plain", "unscaled", "sums"])
@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_in_distribution(method: str, options: dict, calls: list[Tensor]) -> None:
    """Means, spreads and shares of elements over many draws of one tensor, by rows of equal task vectors."""
    rise = torch.linspace(0.5, 1.5, 50)
    base = torch.full((4000, 50), 2.0)
    models = [base + rise, base - 0.6 * rise, base + 0.3 * rise]

    def draw() -> Tensor:
        torch.manual_seed(3)
        given = parameters(method, **options)
        return merge_tensors([base, *models], method, base_index=0, parameters=given) - base

    theirs, ours = both(draw)
    assert len(calls) == 1
    assert not torch.equal(ours, theirs)
    spread = theirs.std(dim=0)
    assert bool(((ours.mean(dim=0) - theirs.mean(dim=0)).abs() <= 5 * spread * (2 / 4000) ** 0.5 + 1e-6).all())
    torch.testing.assert_close(ours.std(dim=0), spread, rtol=0.15, atol=1e-6)
    for found in (ours, theirs):
        found[found.abs() < 1e-6] = 0.0
    zeros = ((found == 0).double().mean(dim=0) for found in (ours, theirs))
    torch.testing.assert_close(*zeros, rtol=0, atol=0.05)


@pytest.mark.parametrize("method", RANDOM)
def test_seeds(tmp_path: Path, llama: Family, method: str) -> None:
    """--random-seed makes runs the same, and other seeds and tensors other choices."""
    config = llama.config(method, parameters={"density": 0.5, "rescale": False, "weight": 1.0})
    integration.accelerate()
    found = []
    for index, seed in enumerate((1, 1, 2)):
        options = QUIET.model_copy(update={"random_seed": seed})
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / str(index)), options)
        found.append(tensors(tmp_path / str(index)))
    same(found[1], found[0])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[2][name], found[0][name])
    integration.restore()
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "theirs"), QUIET)
    ratio = [(state[name] - tensors(llama.base)[name]).norm() for state in (found[0], tensors(tmp_path / "theirs"))]
    assert float(ratio[0] / ratio[1]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_folders(tmp_path: Path, llama: Family, method: str, calls: list[Tensor]) -> None:
    """With parameters by layer and by name, through the planner."""
    settings = {"density": [0.2, 0.9], "lambda": [{"filter": "mlp", "value": 0.5}, {"value": 1.2}]}
    config = llama.config(method, parameters=settings)
    if method == "linear":
        del config["base_model"], config["parameters"]

    def work() -> State:
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / str(integration.accelerated())), QUIET)
        return tensors(tmp_path / str(integration.accelerated()))

    theirs, ours = both(work)
    same(ours, theirs, 4)
    assert len(calls) == len(theirs)


def test_the_command(tmp_path: Path, llama: Family, calls: list[Tensor]) -> None:
    config = written(tmp_path, llama.config("ties", parameters={"density": 0.4}))
    for flags in ([], ["--accelerate"]):
        options = ["--quiet", "--no-write-model-card", "--no-copy-tokenizer", *flags]
        assert run("mergekit", config, tmp_path / f"out{len(flags)}", *options) == (0, "", "")
        assert bool(calls) == bool(flags)
    same(tensors(tmp_path / "out1"), tensors(tmp_path / "out0"), 4)
    assert not integration.accelerated()
    code, out, _ = run("mergekit", "--help")
    assert code == 0
    assert "--accelerate" in out


def test_raw_checkpoints(tmp_path: Path, llama: Family, calls: list[Tensor]) -> None:
    from mergekit.scripts.merge_raw_pytorch import main

    files = [str(folder / "model.safetensors") for folder in (llama.base, *llama.models)]
    models = [{"model": file, "parameters": {"weight": 0.5}} for file in files[1:]]
    path = written(tmp_path, {"merge_method": "ties", "base_model": files[0], "models": models})

    def work() -> State:
        out = tmp_path / str(integration.accelerated())
        main.main([str(path), str(out), "--quiet"], standalone_mode=False)
        return tensors(out)

    theirs, ours = both(work)
    same(ours, theirs, 4)
    assert calls


def test_embeddings_of_other_sizes(tmp_path: Path, llama: Family, calls: list[Tensor]) -> None:
    """Cut to the smallest, they are views with gaps or none."""
    from safetensors.torch import save_file

    from tests.integrations.families import copied

    larger = copied(llama.models[0], tmp_path / "larger")
    own = tensors(larger)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        own[name] = torch.cat([own[name], own[name][:8]])
    save_file(own, larger / "model.safetensors", {"format": "pt"})
    config = Family(llama.base, (larger, *llama.models[1:])).config("ties", parameters={"density": 0.5})
    options = QUIET.model_copy(update={"unsafe_truncate_embeddings": True})

    def work() -> State:
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / str(integration.accelerated())), options)
        return tensors(tmp_path / str(integration.accelerated()))

    theirs, ours = both(work)
    same(ours, theirs, 4)
    assert len(calls) == len(theirs)


def test_tensors_that_a_model_lacks() -> None:
    """Then the others' weights, densities and their sum count; and alone, the base is what mergekit returns."""
    base, one, _, _ = states()
    method = merge_methods.get("ties")
    for given in ([base["matrix"], one["matrix"]], [base["matrix"]]):
        options = {"weight": [0.5] * (len(given) - 1), "density": 0.5}
        theirs, ours = both(lambda g=given, o=options: merge_tensors(g, method, base_index=0, parameters=o))
        torch.testing.assert_close(ours, theirs)
        assert (ours is base["matrix"]) == (theirs is base["matrix"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", [name for name in DETERMINISTIC if name != "linear"])
@pytest.mark.parametrize(
    "weights", [[1.0, -1.0, 0.0], [0.3, -0.1, -0.2], [0.0, 0.0, 0.0], [-1.0, 0.5, 1.0], [1e-9, 0, 0]]
)
def test_weights_that_cancel(method: str, weights: list[float], dtype: torch.dtype) -> None:
    """What mergekit divides by is then 0, which it takes for 1, or what rounding left of it."""
    given = states(dtype)
    theirs, ours = both(lambda: merged(method, given, weight=weights, normalize=True))
    same(ours, theirs, 4 if dtype != torch.bfloat16 else 16)


def test_linear_weights_that_cancel(calls: list[Tensor]) -> None:
    for weights in ([1.0, -1.0, 0.0, 0.0], [0.3, -0.1, -0.2, 0.0], [0.0] * 4):
        theirs, ours = both(lambda w=weights: merged("linear", states(), weight=w))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, equal_nan=True)
    assert not calls


@pytest.mark.parametrize("method", ["ties", *RANDOM])
def test_densities_at_their_ends(method: str) -> None:
    given = states()
    for density in (0.0, 1.0, [0.0, 1.0, 2.0]):
        theirs, ours = both(lambda d=density: merged(method, given, density=d))
        same(ours, theirs, 4)


def matrices() -> list[Tensor]:
    return [state["matrix"] for state in states()]


def one(method: str, given: list[Tensor], **options: object) -> Tensor:
    return merge_tensors(given, method, base_index=0, parameters=parameters(method, **options))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_ties"])
def test_gradients_are_left_to_mergekit(method: str, calls: list[Tensor]) -> None:
    given = [tensor.requires_grad_() for tensor in matrices()]
    _, ours = both(lambda: one(method, given).sum())
    ours.backward()
    assert not calls
    assert all(tensor.grad is not None for tensor in given)
    with torch.no_grad():
        one(method, given)
    assert len(calls) == 1


def test_other_tensors_are_left_to_mergekit(calls: list[Tensor]) -> None:
    """On another device, of no elements, of a dtype that there is no kernel for."""
    integration.accelerate()
    group = TensorGroup.from_tensors([tensor.to("meta") for tensor in matrices()], base_index=0)
    options = {"weight": dict(enumerate((0.0, *WEIGHTS))), "normalize": False, "int8_mask": False, "lambda": 1.0}
    assert merge_methods.get("task_arithmetic").merge_group(group, **options).device.type == "meta"
    for method in ("linear", "ties"):
        theirs, ours = both(lambda m=method: one(m, [tensor[:0] for tensor in matrices()]))
        assert theirs.shape == ours.shape == (0, 56)
        for work in (integration.restore, integration.accelerate):
            work()
            with pytest.raises(RuntimeError, match="Float8"):
                one(method, [tensor.to(torch.float8_e5m2) for tensor in matrices()])
    assert not calls


def test_infinite_norms_are_left_to_mergekit(calls: list[Tensor]) -> None:
    given = matrices()
    given[1] = torch.full_like(given[1], torch.inf)
    for method in RANDOM:
        _, ours = both(lambda m=method: one(m, given))
        assert bool(ours.isnan().any())
    assert not calls


@pytest.mark.parametrize(
    ("method", "options", "shape", "words"),
    [
        ("dare_ties", {"density": -0.5}, (6, 5), "p_in"),
        ("della", {"epsilon": 0.9}, (6, 5), "Epsilon must be chosen"),
        ("della", {"density": 0.1}, (6, 5), "Epsilon must be chosen"),
        ("della", {}, (), "Dimension out of range"),
        ("della", {}, (9, 1), "p_in"),
        ("ties", {"nonsense": 1}, (6, 5), "Unknown parameter"),
        ("ties", {"weight": [1.0]}, (6, 5), "expects 3 values"),
        ("linear", {"weight": "much"}, (6, 5), "valid number"),
    ],
)
def test_errors_are_mergekits(method: str, options: dict, shape: tuple[int, ...], words: str) -> None:
    given = [torch.ones(shape) * (index + 1) for index in range(4)]
    integration.accelerate()
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError), match=words):
        one(method, given, **options)


@pytest.mark.parametrize(("density", "gamma"), [(-0.2, 0.1), (0.5, -0.1), (0.5, 1.5), (0.0, 0.0), (0.3, 1.0)])
def test_bands_at_their_ends(density: float, gamma: float) -> None:
    theirs, ours = both(lambda: one("breadcrumbs", matrices(), density=density, gamma=gamma))
    torch.testing.assert_close(ours, theirs)


def test_a_method_of_a_users_own() -> None:
    """Any `GeneralizedTaskArithmeticMerge` is faster; signs may be counted."""
    kind = GeneralizedTaskArithmeticMerge(
        ConsensusMethod.count, SparsificationMethod.magnitude, True, True, "mine", None, None
    )
    theirs, ours = both(lambda: merge_state_dicts(states(), kind, base=0, parameters=parameters("ties")))
    same(ours, theirs, 4)


def test_out_dtype_and_storage_that_differs() -> None:
    base, *models = states(torch.bfloat16)
    models[0] = {name: tensor.half() for name, tensor in models[0].items()}
    for method in ("linear", "task_arithmetic"):
        options = {"base": 0, "parameters": parameters(method), "out_dtype": torch.float64}
        theirs, ours = both(lambda m=method, o=options: merge_state_dicts([base, *models], m, **o))
        assert all(tensor.dtype == torch.float64 for tensor in ours.values())
        same({n: t.float() for n, t in ours.items()}, {n: t.float() for n, t in theirs.items()}, 4)


def test_inputs_are_not_changed_or_returned(calls: list[Tensor]) -> None:
    before, after = states(), states()
    integration.accelerate()
    for method in (*DETERMINISTIC, *RANDOM):
        given = [{n: t for n, t in state.items() if n != "scalar"} for state in after]  # which DELLA has no row of
        result = merged(method, given)
        assert all(result[n].data_ptr() != state[n].data_ptr() for state in after for n in result)
    for one, other in zip(before, after, strict=True):
        same(one, other)
    assert calls


def test_twice_is_as_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before = vars(GeneralizedTaskArithmeticMerge)["merge_group"], dict(vars(linear_merge))
    integration.restore()
    for _ in range(2):
        integration.accelerate()
        replaced = GeneralizedTaskArithmeticMerge.merge_group, linear_merge._execute
        integration.accelerate()
        importlib.reload(mergekit_accelerate).accelerate()
        assert (GeneralizedTaskArithmeticMerge.merge_group, linear_merge._execute) == replaced
        assert integration.accelerated()
        integration.restore()
        integration.restore()
        assert (vars(GeneralizedTaskArithmeticMerge)["merge_group"], dict(vars(linear_merge))) == before
    monkeypatch.setattr(backends, "unavailable", lambda name: f"there is no {name}")
    with caplog.at_level(logging.WARNING, "awd_fast.mergekit"):
        same(*both(lambda: merged("ties", states())))
    assert "stay as they are: there is no native" in caplog.text
