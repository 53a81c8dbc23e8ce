"""Merging state dicts: against an independent float64 evaluation, and every option that decides over a tensor."""

import pytest
import torch

import awd_fast
from awd_fast import InputError
from awd_fast.objective import make_optimizer
from tests import oracle
from tests.conftest import tiny_state, tuned

QUERY = "encoder.layer.0.attention.self.query.weight"
OUTPUT = "encoder.layer.0.output.dense.weight"
EMBEDDING = "embeddings.word_embeddings.weight"
BIAS = "encoder.layer.0.output.dense.bias"
NORM = "encoder.layer.0.output.LayerNorm.weight"
IDS = "embeddings.position_ids"
WEIGHTS = (QUERY, OUTPUT)
FLOATING = (QUERY, OUTPUT, EMBEDDING, BIAS, NORM)


def redundant(vectors, groups, optimizer, **objective):
    """d by autograd SGD on the loss written out pair by pair, float64."""

    def make(parameters):
        return torch.optim.SGD(
            parameters, lr=optimizer.lr, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
        )

    return oracle.trajectory(vectors, make, optimizer.iterations, groups, **objective)[0][-1]


def expected_merge(base, models, scale, weights, optimizer, groups="row", **objective):
    """base + scale * sum_i w_i (t_i - d) for the weights to disentangle, with d = 0 for the others; float64."""
    result = {}
    for name in FLOATING:
        vectors = [model[name].double() - base[name].double() for model in models]
        d = redundant(vectors, groups, optimizer, **objective) if name in WEIGHTS else 0.0
        result[name] = base[name].double() + scale * sum(w * (t - d) for w, t in zip(weights, vectors, strict=True))
    return result


@pytest.mark.parametrize("groups", ["row", "column", "tensor"])
def test_awd_equals_the_formulas_in_float64(base_state, model_states, groups):
    optimizer = awd_fast.SGD(lr=2e-3, momentum=0.9, weight_decay=1e-4, iterations=40)
    options = {"similarity": "squared", "alpha": 1e-3}
    weights = (1.0, 0.5, -0.25)
    merged = awd_fast.merge(
        base_state, model_states, scale=0.7, weights=weights, groups=groups, optimizer=optimizer, **options
    )
    expected = expected_merge(
        base_state, model_states, 0.7, weights, optimizer, groups, similarity="squared", alpha=1e-3
    )
    plain = expected_merge(base_state, model_states, 0.7, weights, awd_fast.SGD(iterations=0))
    for name in FLOATING:
        # Sums of four float32 numbers below 4, each rounded once.
        torch.testing.assert_close(merged[name].double(), expected[name], rtol=0, atol=16 * 2.0**-24 * 4)
    for name in WEIGHTS:
        assert (expected[name] - plain[name]).abs().max() > 1e-3  # d matters at this tolerance
    assert torch.equal(merged[IDS], base_state[IDS])


def test_awd_with_the_absolute_similarity_is_within_one_percent_of_the_update(base_state, model_states):
    optimizer = awd_fast.SGD(lr=2e-4, iterations=60)
    merged = awd_fast.merge(base_state, model_states, scale=1.0, similarity="absolute", optimizer=optimizer)
    expected = expected_merge(base_state, model_states, 1.0, (1.0, 1.0, 1.0), optimizer)
    for name in WEIGHTS:
        update = expected[name] - base_state[name].double()
        assert (merged[name].double() - expected[name]).norm() <= 0.01 * update.norm()


def test_awd_lowers_the_similarity_that_it_reports(base_state, model_states):
    reports = []
    awd_fast.merge(base_state, model_states, optimizer=awd_fast.Converge(), on_report=reports.append)
    report = reports[0]
    assert report.similarity_after < 0.5 * report.similarity_before
    values = [
        oracle.cosines([m[name].double() - base_state[name].double() for m in model_states], torch.zeros(()), "row")
        for name in WEIGHTS
    ]
    assert report.similarity_before == pytest.approx(float(torch.cat(values).abs().mean()), rel=1e-6)


def test_task_arithmetic_is_awd_without_a_redundant_vector(base_state, model_states):
    plain = awd_fast.merge(base_state, model_states, method="task_arithmetic", scale=0.4)
    zero = awd_fast.merge(base_state, model_states, scale=0.4, optimizer=awd_fast.SGD(iterations=0))
    awd = awd_fast.merge(base_state, model_states, scale=0.4, optimizer=awd_fast.Converge())
    for name in FLOATING:
        total = sum(m[name].double() - base_state[name].double() for m in model_states)
        torch.testing.assert_close(plain[name].double(), base_state[name].double() + 0.4 * total, rtol=0, atol=2e-6)
        assert torch.equal(plain[name], zero[name])
    assert not torch.equal(plain[QUERY], awd[QUERY])
    assert torch.equal(plain[EMBEDDING], awd[EMBEDDING])


def test_average_is_the_weighted_mean_whatever_the_scale(base_state, model_states):
    merged = awd_fast.merge(base_state, model_states, method="average", weights=(1, 2, 5), scale=99.0)
    for name in FLOATING:
        mean = sum(w * m[name].double() for w, m in zip((1, 2, 5), model_states, strict=True)) / 8
        torch.testing.assert_close(merged[name].double(), mean, rtol=0, atol=2e-6)


def test_a_negative_weight_forgets(base_state, model_states):
    one = awd_fast.merge(base_state, model_states[:1], weights=[-1.0], scale=0.5)
    for name in FLOATING:  # one model has no pairs, so d = 0
        expected = base_state[name].double() - 0.5 * (model_states[0][name].double() - base_state[name].double())
        torch.testing.assert_close(one[name].double(), expected, rtol=0, atol=2e-6)


def actions(base, models, **options):
    reports = []
    awd_fast.merge(base, models, on_report=reports.append, optimizer=awd_fast.SGD(iterations=1), **options)
    return {r.step.name: r.step.action for r in reports[0].tensors}


def test_by_default_two_dimensional_weights_are_disentangled_and_nothing_else(base_state, model_states):
    found = actions(base_state, model_states)
    assert {name for name, action in found.items() if action == "awd"} == set(WEIGHTS)
    assert {name for name, action in found.items() if action == "task_arithmetic"} == {EMBEDDING, BIAS, NORM}
    assert found[IDS] == "base"


@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.word_embeddings.weight",
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "shared.weight",
        "pooler.dense.weight",
        "bert.pooler.dense.weight",
        "classifier.weight",
        "lm_head.weight",
        "score.weight",
        "head.weight",
        "classification_head.dense.weight",
        "qa_outputs.weight",
        "cls.predictions.transform.dense.weight",
        "vision_model.embeddings.patch_embedding.weight",
        "encoder.layer.0.norm.weight",
        "h.0.ln_1.weight",
    ],
)
def test_embeddings_norms_pooler_and_heads_are_excluded(name, base_state, model_states):
    extra = torch.ones(2, 2)
    found = actions(base_state | {name: extra}, [m | {name: extra + 0.1 * i} for i, m in enumerate(model_states)])
    assert found[name] == "task_arithmetic"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "encoder.layers.3.self_attn.in_proj_weight",
        "multihead_attn.out_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "h.0.attn.c_attn.weight",
        "visual_projection.weight",
    ],
)
def test_linear_weights_of_common_models_are_disentangled(name, base_state, model_states):
    generator = torch.Generator().manual_seed(0)
    new = [torch.randn(3, 4, generator=generator) for _ in range(4)]
    found = actions(base_state | {name: new[0]}, [m | {name: t} for m, t in zip(model_states, new[1:], strict=True)])
    assert found[name] == "awd"


def test_include_and_exclude_patterns_choose(base_state, model_states):
    found = actions(base_state, model_states, include=["*query*", "*bias"], exclude=["*LayerNorm*"])
    assert {name for name, action in found.items() if action == "awd"} == {QUERY, BIAS}
    found = actions(base_state, model_states, include="*", exclude=("*query*", "*embed*"))
    assert {name for name, action in found.items() if action == "awd"} == {OUTPUT, BIAS, NORM}


def test_others_base_keeps_the_remaining_tensors(base_state, model_states):
    for method in ("awd", "task_arithmetic", "average"):
        merged = awd_fast.merge(base_state, model_states, method=method, others="base")
        for name in (EMBEDDING, BIAS, NORM):
            assert torch.equal(merged[name], base_state[name])
        assert not torch.equal(merged[QUERY], base_state[QUERY])


def test_the_global_group_is_one_vector_over_all_tensors(base_state, model_states):
    optimizer = awd_fast.SGD(lr=1e-3, iterations=30, momentum=0.5, weight_decay=0.0)
    merged = awd_fast.merge(
        base_state, model_states, groups="global", similarity="squared", scale=1.0, optimizer=optimizer
    )
    flat = [
        torch.cat([(m[n].double() - base_state[n].double()).flatten() for n in WEIGHTS])[None] for m in model_states
    ]
    d = redundant(flat, "global", optimizer, similarity="squared")
    parts = d[0].split([base_state[name].numel() for name in WEIGHTS])
    for name, part in zip(WEIGHTS, parts, strict=True):
        total = sum(m[name].double() - base_state[name].double() for m in model_states)
        expected = base_state[name].double() + total - 3 * part.reshape(total.shape)
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("groups", ["row", "column", "tensor", "global"])
@pytest.mark.parametrize(
    "options",
    [
        {"similarity": "absolute", "optimizer": awd_fast.Adam(lr=1e-3, iterations=15)},
        {"similarity": "absolute", "optimizer": awd_fast.SGD(), "penalty": "l1"},
        {"penalty": "l1"},
    ],
    ids=str,
)
def test_elementwise_optimisers_merge_too(base_state, model_states, groups, options):
    reports = []
    merged = awd_fast.merge(base_state, model_states, groups=groups, on_report=reports.append, scale=1.0, **options)
    plain = awd_fast.merge(base_state, model_states, method="task_arithmetic", scale=1.0)
    assert reports[0].overall.loss_after < reports[0].overall.loss_before
    for name in WEIGHTS:
        d = (plain[name] - merged[name]) / 3  # every task vector loses d
        assert 0 < d.norm() < (model_states[0][name] - base_state[name]).norm()


def test_presets_can_be_passed_whole(base_state, model_states):
    paper = actions(base_state, model_states, **{k: v for k, v in awd_fast.PAPER.items() if k != "optimizer"})
    assert {name for name, action in paper.items() if action == "awd"} == set(FLOATING)
    for preset in (awd_fast.PAPER, awd_fast.ROWS):
        assert set(awd_fast.merge(base_state, model_states, **preset)) == set(base_state)
        vectors = [m[QUERY] - base_state[QUERY] for m in model_states]
        assert awd_fast.disentangle(vectors, **preset).redundant.shape == (6, 6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float64])
def test_dtype_is_that_of_the_result(base_state, model_states, dtype):
    merged = awd_fast.merge(base_state, model_states, dtype=dtype)
    exact = awd_fast.merge(base_state, model_states)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    for name in FLOATING:
        assert merged[name].dtype == wanted
        torch.testing.assert_close(merged[name], exact[name].to(wanted), rtol=1e-6, atol=1e-6)
    assert merged[IDS].dtype == torch.int64


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float64])
def test_other_storage_dtypes_merge_in_wider_arithmetic(storage):
    base = tiny_state(dtype=storage)
    models = [tuned(base, seed) for seed in range(3)]
    merged = awd_fast.merge(base, models, method="task_arithmetic", scale=0.4)
    for name in FLOATING:
        assert merged[name].dtype == storage
        exact = base[name].double() + 0.4 * sum(m[name].double() - base[name].double() for m in models)
        step = torch.finfo(storage).eps
        torch.testing.assert_close(merged[name].double(), exact, rtol=step, atol=8 * 2.0**-24)


def test_inputs_are_not_changed_and_the_result_shares_no_memory(base_state, model_states):
    copies = [{name: t.clone() for name, t in state.items()} for state in (base_state, *model_states)]
    merged = awd_fast.merge(base_state, model_states, others="base")
    for tensor in merged.values():
        tensor.zero_()
    for state, copy in zip((base_state, *model_states), copies, strict=True):
        for name, tensor in state.items():
            assert torch.equal(tensor, copy[name])


def test_tensors_that_some_models_lack_are_kept_on_request(base_state, model_states):
    del model_states[1][QUERY]
    model_states[2]["classifier.weight"] = torch.ones(2, 6)
    merged = awd_fast.merge(base_state, model_states, missing="base")
    assert torch.equal(merged[QUERY], base_state[QUERY])
    assert set(merged) == set(base_state)


def test_a_model_that_equals_the_base_is_defined(base_state, model_states):
    merged = awd_fast.merge(base_state, [base_state, model_states[0], base_state], optimizer=awd_fast.Converge())
    assert all(torch.isfinite(t).all() for t in merged.values())


def test_overflow_of_the_output_dtype_is_an_error(base_state, model_states):
    with pytest.raises(InputError, match=r"'encoder.*query.*' overflows float16"):
        awd_fast.merge(base_state, model_states, scale=1e6, dtype="float16", others="base")


@pytest.mark.parametrize(
    "options",
    [{}, {"similarity": "absolute"}, {"groups": "column"}, {"groups": "tensor"}, awd_fast.PAPER, {"method": "average"}],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "converge"])
def test_every_way_names_the_tensor_with_nan(options, optimizer):
    """Inputs are searched only where a result is not finite, so that every way must show one."""
    base = {"a.weight": torch.randn(70, 5), "b.weight": torch.randn(4, 5)}
    models = [{name: t + 0.1 * torch.randn_like(t) for name, t in base.items()} for _ in range(3)]
    models[1]["b.weight"][2, 3] = torch.inf
    with pytest.raises(InputError, match=r"models\[1\]: tensor 'b.weight' holds 1 NaN or Inf"):
        awd_fast.merge(base, models, **{**options, "optimizer": make_optimizer(optimizer)})


@pytest.mark.parametrize("groups", ["row", "column", "tensor", "global"])
def test_blocks_of_one_row_are_parts_of_their_tensor(monkeypatch, groups):
    """The last block of a tensor may be a single row."""
    base = {"w": torch.randn(5, 6, generator=torch.Generator().manual_seed(3))}
    models = [tuned(base, seed) for seed in range(3)]
    options = {"groups": groups, "similarity": "squared", "optimizer": awd_fast.SGD(lr=1e-3, iterations=30)}
    whole = awd_fast.merge(base, models, **options)
    monkeypatch.setattr("awd_fast.blocks.NUMBERS", 80)  # two rows in a block
    torch.testing.assert_close(awd_fast.merge(base, models, **options), whole)


def test_a_group_that_iterates_on_elements_says_how_much_memory_it_needs(base_state, model_states):
    for groups, what in (
        ("tensor", f"tensor {QUERY!r}"),
        ("column", f"tensor {QUERY!r}"),
        ("global", "the global group"),
    ):
        options = {"groups": groups, "optimizer": awd_fast.Adam(iterations=2)}
        expected = awd_fast.merge(base_state, model_states, **options)
        found = awd_fast.merge(base_state, model_states, memory=0.1, **options)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("awd_fast.blocks.NUMBERS", 40)
            with pytest.raises(
                InputError, match=f"Adam with penalty l2 keeps {what} in memory, which takes .* GB where"
            ):
                awd_fast.merge(base_state, model_states, memory=1e-6, **options)


def test_tensors_that_lie_in_memory_in_any_order(base_state, model_states, monkeypatch):
    monkeypatch.setattr("awd_fast.blocks.NUMBERS", 40)

    def strided(state):
        return {name: t.T.contiguous().T if t.ndim == 2 else t for name, t in state.items()}

    expected = awd_fast.merge(base_state, model_states)
    for _ in range(20):  # readers must not meet
        found = awd_fast.merge(strided(base_state), list(map(strided, model_states)))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
