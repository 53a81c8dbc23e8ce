"""The weights that are merged: the 2-D linear weights of real encoders, without embeddings, and K models of each."""

from dataclasses import dataclass

from awd_fast.bench import Parameters, synthetic


@dataclass(frozen=True)
class Shape:
    """`layers` layers with weights [rows, columns] of these sizes, and `tasks` fine-tuned models."""

    weights: tuple[tuple[int, int], ...]
    layers: int
    tasks: int

    @property
    def elements(self) -> int:
        """Of one model."""
        return self.layers * sum(rows * columns for rows, columns in self.weights)

    def parameters(self, tasks: int | None = None, device: str = "cpu") -> Parameters:
        """Synthetic values on a device, for `tasks` models instead of the shape's."""
        return synthetic(self.weights, self.layers, tasks or self.tasks, device=device)


def transformer(width: int, inner: int) -> tuple[tuple[int, int], ...]:
    """Query, key, value and output, and the two weights of the block between."""
    return ((width, width),) * 4 + ((inner, width), (width, inner))


LLAMA = ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192))

SHAPES = {
    "minilm_x8": Shape(transformer(384, 1536), layers=6, tasks=8),
    "bert_base_x8": Shape(transformer(768, 3072), layers=12, tasks=8),
    "vit_b32_x8": Shape(transformer(768, 3072), layers=12, tasks=8),
    "vit_l14_x8": Shape(transformer(1024, 4096), layers=24, tasks=8),
    "llama_1b_x4": Shape(LLAMA, layers=1, tasks=4),
    "tiny_x3": Shape(transformer(24, 40), layers=2, tasks=3),
}
"""float32 sizes of the base and the models: minilm 0.4 GB, bert and vit_b32 3.1 GB, vit_l14 10.9 GB, llama 1.2 GB."""
