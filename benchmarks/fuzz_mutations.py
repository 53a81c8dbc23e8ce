"""Ways to spoil JSON, YAML and bytes: the generator of `benchmarks.fuzz`.

A document is a tree of lists, `Pairs` (an object, whose keys may stand twice) and leaves; `Raw` is text that no encoder
would write. All choices come from the `random.Random` that is given, so that a case can be made again.
"""

import copy
import json
from random import Random
from typing import Any


class Raw(str):
    """A piece of a document, as it is to be written."""


class Pairs(list[list[Any]]):
    """An object: keys and values, in order."""


DTYPES = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"),
    *("U16", "U32", "U64", "C64", "C128", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("f32", "float32", "F32 ", "Q4_0", "", "F32\x00"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 4, 7, 8, 12, 16, 48, 64, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**53 + 1),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30, 0.0, -0.0, 1.0, 1.5, 1e-6, 1e308),
)
RAW = tuple(
    Raw(text)
    for text in (
        *("NaN", "Infinity", "-Infinity", "1e400", "-0", "00", "1.", "+1", "0x10", "1_000", "'x'", "undefined", ""),
        *('"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\uD83D\\uDE00"', '"\\x41"', '"', "[", "}", ",", "{}", "[]"),
        *("1" * 5000, "-" + "9" * 400, '{"a":1,"a":2}', '"' + "\\n" * 40 + '"', "[1,]", '{"F32":null}', "/**/1"),
    )
)
TEXTS = (
    *(
        "",
        "a",
        "a.weight",
        "b.weight",
        "../x",
        "/etc/passwd",
        "x\ny",
        "\x00",
        "\x1b[31m",
        "\u202e",
        "é",
        "😀",
        "..",
        "~",
    ),
    *("~nobody-here/x", "nul\x00.safetensors", "a/b", "model.safetensors", "null", "true", "*", "[", "[!", "(a+)+b"),
    *("." * 300, "x" * 300, "x" * 3000, "a.b." * 800, "F32", "pt", "float16", "LORA", "owner/model", "-", "%s", "{0}"),
)


def tree(value: Any) -> Any:
    """A document of plain values as one that can be spoilt."""
    if isinstance(value, dict):
        return Pairs([key, tree(each)] for key, each in value.items())
    return [tree(each) for each in value] if isinstance(value, list) else value


def text(node: Any, random: Random | None = None) -> str:
    """The JSON of a document; with a generator, of one of many looks."""
    gap = random.choice(("", "", " ", "\n", "\t ", " " * 50)) if random else ""
    ascii_only = random.random() < 0.5 if random else True

    def write(part: Any) -> str:
        if isinstance(part, Raw):
            return str(part)
        if isinstance(part, Pairs):
            return "{" + f",{gap}".join(f"{write(key)}:{gap}{write(value)}" for key, value in part) + "}"
        if isinstance(part, list):
            return "[" + f",{gap}".join(map(write, part)) + "]"
        return json.dumps(part, ensure_ascii=ascii_only)

    return write(node)


def strange(random: Random) -> Any:
    """A value that hardly belongs where it will stand."""
    kind = random.randrange(9)
    if kind == 0:
        return random.choice(RAW)
    if kind == 1:
        return random.choice(TEXTS)
    if kind == 2:
        return random.choice(DTYPES)
    if kind == 3:
        return random.choice((None, True, False))
    if kind == 4:
        return [random.choice(NUMBERS) for _ in range(random.choice((0, 1, 2, 2, 3, 70, 300)))]
    if kind == 5:
        return Pairs([random.choice(TEXTS), random.choice(NUMBERS)] for _ in range(random.choice((0, 1, 2))))
    if kind == 6 and random.random() < 0.3:
        depth = random.choice((3, 60, 130, 400, 900, 990, 1500, 20_000))
        return Raw(random.choice(("[", '{"a":')) * depth + random.choice(("1", "", '"x"')) + "]" * depth)
    if kind == 7 and random.random() < 0.3:
        depth = random.choice((100, 300, 480, 600, 900))
        return Raw('{"dtype":' * depth + '"float32"' + "}" * depth)
    return random.choice(NUMBERS)


def places(node: Any) -> list[tuple[Any, int]]:
    """Every value of a document: what holds it, and where in it."""
    found: list[tuple[Any, int]] = []
    for index, part in enumerate(node) if isinstance(node, list) else ():
        found.append((node, index))
        found += places(part[1] if isinstance(node, Pairs) else part)
    return found


def spoil(node: Any, random: Random) -> None:
    """Changes one thing, in place."""
    where = places(node)
    if not where:
        return
    holder, index = random.choice(where)
    mapping = isinstance(holder, Pairs)
    value = _get(holder, index)
    choice = random.randrange(12)
    if choice <= 2:
        _put(holder, index, strange(random))
    elif choice == 3:
        del holder[index]
    elif choice == 4:
        other = strange(random) if random.random() < 0.5 else copy.deepcopy(value)
        holder.insert(random.randrange(len(holder) + 1), [holder[index][0], other] if mapping else other)
    elif choice == 5:
        holder.insert(index, [random.choice(TEXTS), strange(random)] if mapping else strange(random))
    elif choice == 6 and mapping:
        holder[index][0] = random.choice((*TEXTS, random.choice(RAW), holder[index][0] + random.choice("x.\n é")))
    elif choice == 7:
        _put(holder, index, [value])
    elif choice == 8 and isinstance(value, Pairs):
        _put(holder, index, [each for _, each in value])  # serde takes a list for a struct
    elif choice == 9:
        random.shuffle(holder)
    elif choice == 10:
        other_holder, other_index = random.choice(where)
        first, second = copy.deepcopy(value), copy.deepcopy(_get(other_holder, other_index))
        _put(holder, index, second)
        _put(other_holder, other_index, first)  # of two of which one holds the other, one is lost
    elif isinstance(value, int) and not isinstance(value, bool):
        _put(holder, index, value + random.choice((-8, -4, -1, 1, 4, 8, 2**32, 2**64)))
    else:
        _put(holder, index, strange(random))


def _get(holder: list[Any], index: int) -> Any:
    return holder[index][1] if isinstance(holder, Pairs) else holder[index]


def _put(holder: list[Any], index: int, value: Any) -> None:
    if isinstance(holder, Pairs):
        holder[index][1] = value
    else:
        holder[index] = value


def garble(data: bytes, random: Random) -> bytes:
    """Flips, cuts, doubles, or replaces bytes."""
    spoilt = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 5, 30))):
        at = random.randrange(len(spoilt) + 1)
        choice = random.randrange(6)
        if choice <= 1 and at < len(spoilt):
            spoilt[at] ^= 1 << random.randrange(8)
        elif choice == 2:
            spoilt[at : at + 1] = random.choice(
                (b"\x00", b"\xff", b"\xc3", b'"', b"{", b"[", b"\\", b"9", b"\r\n", b"-")
            )
        elif choice == 3:
            end = at + random.choice((1, 2, 8, 100))
            del spoilt[at:end]
        elif choice == 4:
            end = at + random.choice((1, 8, 40))
            to = random.randrange(len(spoilt) + 1)
            spoilt[to:to] = spoilt[at:end]
        elif random.random() < 0.3:
            del spoilt[at:]
        else:
            spoilt[at:at] = random.randbytes(random.choice((1, 4, 64)))
    return bytes(spoilt)


YAML = (
    *(
        "!!bool x",
        "!!int ''",
        "!!int _",
        "!!int 0b",
        "!!float x",
        "!!float ''",
        "!!timestamp x",
        "!!null x",
        "!!binary x",
    ),
    *(
        "!!map x",
        "!!map [a]",
        "!!seq {a: 1}",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!pairs [a: 1]",
        "!!str [a]",
        "!!merge x",
    ),
    *("!!python/object/apply:os.system ['true']", "!x y", "2024-13-45", "2024-01-01", "1:60:60", "0o17", "=", "<<"),
    *("&a [*a]", "&a {x: *a}", "*missing", "? [a, b]\n: c", "{[a]: b}", "{{a: 1}: b}", "- - - -", "a: b: c", "\t", "%"),
    *(
        "{<<: {scale: 1}}",
        "{<<: [1, 2]}",
        "{<<: x}",
        "&b {<<: *b}",
        '"\\ud800"',
        '"\\0"',
        '"\\x"',
        "'a\n\n b'",
        "|\n  x",
    ),
    *("---\n", "...\n", "%YAML 9.9\n---\n", "\ufeff", "\x85", "@x", "`", "# c", ".inf", ".nan", "-.Inf", "1e400", "~"),
    *(
        "0x" + "f" * 300,
        "9" * 5000,
        "190:20:30.15",
        "!!timestamp 2024-01-01T00:00:00+99:99",
        "9999-12-31T23:59:59-24:00",
    ),
    *(
        "!<tag:yaml.org,2002:int> 3",
        "!!int 1__0",
        "0999",
        "{? a}",
        "[a: b, ? c]",
        '"' + "x" * 2000 + '"',
        "!!float 1:x",
    ),
    "[" * 500 + "]" * 500,
    "{a: " * 300 + "1" + "}" * 300,
    "[&a [x, x], &b [*a, *a, *a, *a, *a, *a, *a, *a], &c [*b, *b, *b, *b, *b, *b, *b, *b], "
    "&d [*c, *c, *c, *c, *c, *c, *c, *c], &e [*d, *d, *d, *d, *d, *d, *d, *d], &f [*e, *e, *e, *e, *e, *e, *e, *e], "
    "&g [*f, *f, *f, *f, *f, *f, *f, *f], &h [*g, *g, *g, *g, *g, *g, *g, *g], [*h, *h, *h, *h, *h, *h, *h, *h]]",
    "[&a {x: 1}, &b {<<: [*a, *a, *a, *a, *a, *a, *a, *a]}, &c {<<: [*b, *b, *b, *b, *b, *b, *b, *b]}, "
    "&d {<<: [*c, *c, *c, *c, *c, *c, *c, *c]}, &e {<<: [*d, *d, *d, *d, *d, *d, *d, *d]}, "
    "&f {<<: [*e, *e, *e, *e, *e, *e, *e, *e]}, &g {<<: [*f, *f, *f, *f, *f, *f, *f, *f]}, "
    "&h {<<: [*g, *g, *g, *g, *g, *g, *g, *g]}, {<<: [*h, *h, *h, *h, *h, *h, *h, *h]}]",
)
"""Pieces of YAML that loaders have failed on, two bombs among them."""


def garble_yaml(document: str, random: Random) -> str:
    """A YAML text with a strange piece in place of a value, a line, or somewhere."""
    piece = random.choice(YAML)
    lines = document.split("\n")
    at = random.randrange(len(lines))
    head, colon, _ = lines[at].partition(": ")
    choice = random.randrange(4)
    if choice <= 1 and colon:
        lines[at] = f"{head}: {piece}"
    elif choice == 2:
        lines.insert(at, piece)
    else:
        cut = random.randrange(len(document) + 1)
        return document[:cut] + piece + document[cut:]
    return "\n".join(lines)
