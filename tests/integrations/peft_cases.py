"""Small real models with LoRA adapters of PEFT, whose factors are random, and what these adapters mean."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)


def bert() -> tuple[nn.Module, list[dict[str, Any]]]:
    """With a head that is stored whole, which PEFT sees to itself; and adapters of different modules and forms."""
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20,
    )  # fmt: skip
    adapters = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
        {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["query", "dense"]},
        {"r": 3, "lora_alpha": 6, "target_modules": ["query"], "rank_pattern": {"0.attention.self.query": 5},
         "alpha_pattern": {"1.attention.self.query": 1}},
    ]  # fmt: skip
    return BertForSequenceClassification(config), [{"task_type": "SEQ_CLS", **each} for each in adapters]


def llama() -> tuple[nn.Module, list[dict[str, Any]]]:
    """With tied embeddings, of which one adapter changes the input's."""
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=20, tie_word_embeddings=True,
    )  # fmt: skip
    adapters = [
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"]},
        {"r": 2, "lora_alpha": 4, "target_modules": r".*\.1\..*(k|v)_proj", "modules_to_save": ["norm"]},
    ]
    return LlamaForCausalLM(config), [{"task_type": "CAUSAL_LM", **each} for each in adapters]


def gpt2() -> tuple[nn.Module, list[dict[str, Any]]]:
    """Whose weights are stored [inputs, outputs]."""
    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=20)
    return GPT2LMHeadModel(config), [
        {"r": rank, "lora_alpha": 5, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
        for rank in (2, 3, 4)
    ]


class Plain(nn.Module):
    """No model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(nn.functional.one_hot(input_ids, 6).to(self.first.weight.dtype)).tanh())


def plain() -> tuple[nn.Module, list[dict[str, Any]]]:
    return Plain(), [{"r": rank, "target_modules": ["first", "second"]} for rank in (2, 3, 4)]


MODELS: dict[str, Callable[[], tuple[nn.Module, list[dict[str, Any]]]]] = {
    "bert": bert,
    "llama": llama,
    "gpt2": gpt2,
    "plain": plain,
}
NAMES = ["one", "two", "three"]


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives all factors and what is stored whole random values; the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return model.eval()


def adapted(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A base, and a PeftModel around a copy of it with three adapters, the first of which is active."""
    torch.manual_seed(0)
    base, configs = MODELS[name]()
    base = base.to(dtype).eval()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**configs[0]), adapter_name=NAMES[0])
    for adapter, config in zip(NAMES[1:], configs[1:], strict=True):
        model.add_adapter(adapter, peft.LoraConfig(**config))
    return base, filled(model).to(dtype)


def alone(base: nn.Module, model: Any, adapter: str) -> nn.Module:
    """The full model that an adapter means: PEFT's own merge of it into the base, which no other adapter is near."""
    config = copy.deepcopy(model.peft_config[adapter])
    made = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    peft.set_peft_model_state_dict(made, state)
    return made.merge_and_unload()


def saved(base: nn.Module, model: Any, folder: Path) -> tuple[Path, list[Path]]:
    """The base and the adapters, in folders."""
    from safetensors.torch import save_file

    (folder / "base").mkdir(parents=True)
    if hasattr(base, "save_pretrained"):
        base.save_pretrained(folder / "base")
    else:
        save_file(base.state_dict(), folder / "base" / "model.safetensors")
    model.save_pretrained(folder, selected_adapters=NAMES)
    return folder / "base", [folder / name for name in NAMES]


def fingerprint(model: Any) -> tuple[Any, ...]:
    """All that adding an adapter must leave as it was."""
    return (
        {name: (id(p), p.requires_grad, p.dtype, p.detach().double().sum().item()) for name, p in every(model)},
        {name: module.training for name, module in model.named_modules()},
        list(model.active_adapters),
        {name: str(config) for name, config in model.peft_config.items()},
    )


def every(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
