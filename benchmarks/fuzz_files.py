"""The good files that `benchmarks.fuzz` spoils, and spoilt safetensors files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save, save_file

from benchmarks.fuzz_mutations import DTYPES, TEXTS, Pairs, garble, spoil, text, tree

State = dict[str, torch.Tensor]
SHAPES = {
    "h.0.q.weight": (3, 4),
    "h.0.v.weight": (4, 4),
    "h.0.v.bias": (4,),
    "embed.weight": (5, 2),
    "norm.weight": (4,),
}
ADAPTED = {"h.0.q": (3, 4), "h.0.v": (4, 4)}
RANK = 2
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_WIDTHS |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8, "F8_E8M0": 1}
_LIES = (
    0,
    1,
    2,
    7,
    8,
    2**16,
    99_999_999,
    100_000_000,
    100_000_001,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def state(seed: int) -> State:
    """A model of five tensors and an integer one, the same to the last number for all seeds above 0 but for noise."""
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    noise = torch.Generator().manual_seed(100 + seed)
    if seed:
        tensors = {name: t + 0.1 * torch.randn(t.shape, generator=noise) for name, t in tensors.items()}
    return {**tensors, "ids": torch.arange(3)}


def adapter() -> State:
    """The factors of two modules, under PEFT's names, and an embedding stored whole."""
    generator, found = torch.Generator().manual_seed(9), {}
    for module, (outputs, inputs) in ADAPTED.items():
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator)
        found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator)
    return {**found, "base_model.model.embed.weight": torch.randn(5, 2, generator=generator)}


ADAPTER_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "owner/base",
    "task_type": None,
    "r": RANK,
    "lora_alpha": 4,
    "target_modules": ["q", "v"],
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "rank_pattern": {"h.0.q": RANK, r"h\.\d+\.v": RANK},
    "alpha_pattern": {r".*\.q": 3.5},
    "modules_to_save": None,
    "init_lora_weights": True,
    "layer_replication": None,
}
CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "torch_dtype": "float32",
    "text_config": {"dtype": "float32", "layers": [1, 2, {"dtype": None, "torch_dtype": "bfloat16"}]},
    "quantization_config": None,
}


@dataclass(frozen=True)
class Good:
    """The good files in a folder: base, m0, m1 in one file each, sharded in two with an index, adapter.

    spoilt: the path and the bytes of what is spoilt at the moment, or was last.
    """

    folder: Path
    states: dict[str, State]
    index: dict[str, Any]
    recipe: dict[str, Any]
    spoilt: list[tuple[Path, bytes]] = field(default_factory=list)

    @contextmanager
    def spoil(self, file: Path, data: bytes) -> Iterator[None]:
        """Other bytes in a file, for as long as this lasts."""
        self.spoilt[:] = [(file.relative_to(self.folder), data)]
        before = file.read_bytes()
        file.write_bytes(data)
        try:
            yield
        finally:
            file.write_bytes(before)

    @classmethod
    def make(cls, folder: Path) -> "Good":
        states = {"base": state(0), "m0": state(1), "m1": state(2), "sharded": state(3), "adapter": adapter()}
        for name, tensors in states.items():
            (folder / name).mkdir()
            if name not in ("sharded", "adapter"):
                save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
                (folder / name / "config.json").write_text(json.dumps(CONFIG))
        weight_map = {}
        for number in range(2):
            part = {name: states["sharded"][name] for name in list(states["sharded"])[number::2]}
            file = f"model-0000{number + 1}-of-00002.safetensors"
            save_file(part, folder / "sharded" / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
        save_file(states["adapter"], folder / "adapter" / "adapter_model.safetensors")
        (folder / "merge.yml").touch()
        recipe = {
            "merge_method": "awd",
            "base_model": str(folder / "base"),
            "models": ["m0", {"model": "m1", "parameters": {"weight": 0.5}}],
            "parameters": {"scale": 0.4, "iterations": 3, "optimizer": "sgd", "exclude": ["*bias", "embed*"]},
            "dtype": "float32",
        }
        return cls(folder, states, index, recipe)


def safetensors(tensors: State, random: Random) -> bytes:
    """A file of these tensors that is spoilt, or only unusual."""
    whole = save(tensors, metadata={"format": "pt"})
    if random.random() < 0.1:
        return garble(whole, random)
    length = int.from_bytes(whole[:8], "little")
    document, data = tree(json.loads(whole[8 : 8 + length])), whole[8 + length :]
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        data = _rearrange(document, data, random)
    if random.random() < 0.5:
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            spoil(document, random)
    written = text(document, random)
    if random.random() < 0.02:
        written = _large(written, random)
    header = written.encode("utf-8", "surrogatepass")
    if random.random() < 0.08:
        header = garble(header, random)
    if random.random() < 0.2:
        header += random.choice((b" ", b"\x00", b"\n", b"\xff")) * random.choice((1, 7, 8, 100))
    claimed = len(header)
    if random.random() < 0.07:
        claimed = random.choice((*_LIES, len(header) - 1, len(header) + 1, len(header) + len(data), len(header) // 2))
    if random.random() < 0.07:
        data = random.choice((data[: random.randrange(len(data) + 1)], data + bytes(random.choice((1, 8, 5000))), b""))
    result = max(claimed, 0).to_bytes(8, "little") + header + data
    return result if random.random() < 0.95 else result[: random.randrange(len(result) + 1)]


def _rearrange(document: Pairs, data: bytes, random: Random) -> bytes:
    """Changes a good file so that it is good still, or nearly: other dtypes, shapes, names, orders and numbers."""
    entries = [pair for pair in document if pair[0] != "__metadata__"]
    if not entries:
        return data
    entry = random.choice(entries)
    fields = dict(entry[1])
    begin, end = fields["data_offsets"]
    choice = random.randrange(9)
    if choice == 0:
        random.shuffle(document)
    elif choice == 1:
        dtype = random.choice(list(_WIDTHS))
        entry[1][:] = _entry(dtype, [(end - begin) // _WIDTHS[dtype]], begin, end)
    elif choice == 2:
        dtype, count = fields["dtype"], (end - begin) // _WIDTHS.get(fields["dtype"], 1)
        shapes = (
            [count],
            [1, count],
            [count, 1, 1],
            [2, count // 2],
            [1] * random.choice((6, 63, 64, 65, 300)) + [count],
        )
        entry[1][:] = _entry(dtype, list(random.choice(shapes)), begin, end)
    elif choice == 3:
        entry[0] = random.choice((*TEXTS, "model." + entry[0], entry[0] + "é", entry[0].upper(), "h.1.q.weight"))
    elif choice == 4 and data:
        spoilt = bytearray(data)
        for _ in range(random.choice((1, 3, 20))):
            spoilt[random.randrange(len(spoilt))] = random.choice((0, 0x7F, 0x80, 0xFF, random.randrange(256)))
        return bytes(spoilt)
    elif choice == 5:
        at = random.choice((begin, end))
        zeros = random.choice(
            ([0], [0, 3], [3, 0], [2**40, 2**40, 0], [0, 2**63], [2**63 - 1, 0], [0] * 70, [2**62, 0, 4])
        )
        document.insert(0, [random.choice(TEXTS), _entry(random.choice(DTYPES), list(zeros), at, at)])
    elif choice == 6:
        document.append(["extra.weight", _entry("U8", [5], len(data), len(data) + 5)])
        return data + random.randbytes(5)
    elif choice == 7:
        for pair in document:
            if pair[0] == "__metadata__":
                pair[1] = tree({random.choice(TEXTS): random.choice(TEXTS) for _ in range(3)})
    elif end == len(data):
        document.remove(entry)
        return data[:begin]
    return data


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> Pairs:
    return Pairs([["dtype", dtype], ["shape", shape], ["data_offsets", [begin, end]]])


def _large(header: str, random: Random) -> str:
    """A header of up to megabytes."""
    many = [{"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 0]}]
    extra = random.choice(
        (
            " " * 4_000_000,
            '"x":' + "[" * 200_000 + "]" * 200_000 + ",",
            f'"__metadata__":{{"a":"{"x" * 1_000_000}"}},',
            f'"{"x" * 200_000}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},',
            f'"{"a." * 50_000}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},',
            f'"big":{{"dtype":"F32","shape":[{"1," * 50_000}0],"data_offsets":[0,0]}},',
            f'"bad":{{"dtype":"F32","shape":[{"1," * 50_000}1],"data_offsets":[0,4]}},',
            "".join(f'"t{i}.weight":{json.dumps(many[0] | {"shape": [0, 4]})},' for i in range(4000)),
            "".join(f'"t{i}.weight":{json.dumps(many[0])},' for i in range(2000)),
        )
    )
    return header.replace("{", "{" + extra, 1)
