"""Small modules with everything that a merge of loaded models must keep, and copies of them that were fine-tuned."""

import copy

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A tied head, a batch norm, an LSTM (whose parameters are listed a second time), a mask, and a head to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.mix = nn.Linear(5, 6, bias=False)
        self.decoder = nn.Linear(6, 11)
        self.decoder.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(11))
        self.register_buffer("positions", torch.arange(4), persistent=False)

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        hidden = self.mix(self.lstm(self.embed(tokens))[0])
        return self.decoder(hidden).sum(1) * self.mask + self.norm(self.conv(images)).mean()


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """In eval mode, but for one layer; with a parameter that is not trained, and a gradient."""
    torch.manual_seed(seed)
    made = Net().to(dtype).eval()
    made.mix.train()
    made.lstm.bias_hh_l0.requires_grad_(False)
    made.mix.weight.grad = torch.ones_like(made.mix.weight)
    return made


def tuned(module: nn.Module, seed: int, size: float = 0.1) -> nn.Module:
    """A copy with other parameters and buffers, a part of which all seeds have in common."""
    own, common = torch.Generator().manual_seed(1000 + seed), torch.Generator().manual_seed(77)
    made = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=own) + 0.5 * torch.randn(parameter.shape, generator=common)
            parameter.add_((size * noise).to(parameter.dtype))
        for buffer in made.buffers():
            buffer.add_(1)
    return made


def state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters under the first of their names."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """All values of a module, to see whether they changed."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
