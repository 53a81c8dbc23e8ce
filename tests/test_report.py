"""The figures of a report against an independent float64 evaluation, and the pictures' and cards' use of them."""

import pytest
import torch

import awd_fast
from awd_fast import plots
from tests import oracle
from tests.test_merge import WEIGHTS

WEIGHTED = (1.0, 0.5, -0.25)
OPTIMIZERS = {
    "span": awd_fast.SGD(lr=1e-3, iterations=40),
    "converge": awd_fast.Converge(),
    "elements": awd_fast.Adam(lr=2e-3, iterations=20),
}


def merged_with_report(base, models, **options):
    reports = []
    merged = awd_fast.merge(base, models, on_report=reports.append, **options)
    return merged, reports[0]


def found_redundant(base, models, merged, scale, weights, name):
    """d of one tensor, from nothing but the merged model: merged = base + scale * (sum w t - (sum w) d)."""
    total = sum(w * (m[name].double() - base[name].double()) for w, m in zip(weights, models, strict=True))
    return (total - (merged[name].double() - base[name].double()) / scale) / sum(weights), total


@pytest.mark.parametrize("groups", ["row", "column", "tensor", "global"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_figure_follows_from_the_merged_model(base_state, model_states, groups, kind):
    base = {name: t.double() if t.is_floating_point() else t for name, t in base_state.items()}
    models = [{n: t.double() if t.is_floating_point() else t for n, t in m.items()} for m in model_states]
    options = {"groups": groups, "optimizer": OPTIMIZERS[kind], "weights": WEIGHTED, "scale": 0.5}
    options["similarity"] = "absolute"
    merged, report = merged_with_report(base, models, **options)
    parts = {name: found_redundant(base, models, merged, 0.5, WEIGHTED, name) for name in WEIGHTS}
    if groups == "global":
        tensors = {"all": [torch.cat([(m[n] - base[n]).flatten() for n in WEIGHTS]) for m in models]}
        redundant = {"all": torch.cat([parts[n][0].flatten() for n in WEIGHTS])}
    else:
        tensors = {n: [m[n] - base[n] for m in models] for n in WEIGHTS}
        redundant = {n: parts[n][0] for n in WEIGHTS}

    def matrix(disentangled: bool) -> torch.Tensor:
        sums, count = torch.zeros(3, 3, dtype=torch.float64), 0
        for name, vectors in tensors.items():
            d = redundant[name] if disentangled else torch.zeros_like(redundant[name])
            shifted = [oracle.matrix(t - d, groups) for t in vectors]
            count += len(shifted[0])
            for i in range(3):
                for j in range(3):
                    if i != j:
                        sums[i, j] += oracle.cosine(shifted[i], shifted[j], 1e-8).abs().sum()
        return sums / count

    before, after = matrix(disentangled=False), matrix(disentangled=True)
    torch.testing.assert_close(report.overall.matrix(after=False), before, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(report.overall.matrix(after=True), after, rtol=1e-5, atol=1e-6)
    assert report.similarity_before == pytest.approx(float(before.sum()) / 6, rel=1e-9)
    assert report.similarity_after == pytest.approx(float(after.sum()) / 6, rel=1e-5, abs=1e-6)
    plain = torch.cat([parts[name][1].flatten() for name in WEIGHTS])
    awd = torch.cat([((merged[name] - base[name]) / 0.5).flatten() for name in WEIGHTS])
    expected = float(plain @ awd / (plain.norm() * awd.norm()))
    assert expected < 0.9999
    assert report.update_cosine == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("groups", ["row", "global"])
def test_adam_merges_with_unequal_weights(base_state, model_states, groups):
    options = {"groups": groups, "similarity": "absolute", "optimizer": OPTIMIZERS["elements"], "scale": 0.5}
    one, _ = merged_with_report(base_state, model_states, weights=(1.0, 0.0, 0.0), **options)
    two, _ = merged_with_report(base_state, model_states, weights=(3.0, 1.0, -1.5), **options)
    for name in WEIGHTS:
        first, _ = found_redundant(base_state, model_states, one, 0.5, (1.0, 0.0, 0.0), name)
        second, _ = found_redundant(base_state, model_states, two, 0.5, (3.0, 1.0, -1.5), name)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)  # d does not depend on the weights
        assert first.abs().max() > 1e-3


def test_heat_maps_show_before_on_the_left_and_after_beside_it(tmp_path, base_state, model_states, monkeypatch):
    _, report = merged_with_report(base_state, model_states, optimizer=awd_fast.Converge())
    shown = []
    plt = plots.require_matplotlib()
    monkeypatch.setattr(plt.Axes, "imshow", lambda axes, matrix, **kw: shown.append(matrix) or plt.cm.ScalarMappable())
    monkeypatch.setattr(plt.Figure, "savefig", lambda *args, **kwargs: None)
    plots.plot_report(report, tmp_path / "p.png")
    for picture, after in zip(shown, (False, True), strict=True):
        assert torch.equal(torch.as_tensor(picture), report.overall.matrix(after=after))


def test_a_rising_loss_is_a_warning(base_state, model_states):
    _, good = merged_with_report(base_state, model_states, optimizer=awd_fast.Converge())
    _, bad = merged_with_report(base_state, model_states, optimizer=awd_fast.SGD(lr=10.0, iterations=50))
    assert good.warning() is None
    assert bad.warning().startswith("the loss rose from")


def test_nothing_disentangled_has_no_figures(base_state, model_states):
    _, report = merged_with_report(base_state, model_states, method="average")
    assert report.overall is report.similarity_before is report.update_cosine is report.summary() is None
    assert report.to_json()["overall"] is None
