# The compiled module; csrc/kernels.h says what each operator does. Pointers are integers, 0 where there is no tensor.

def gram(
    dtype: int, base: int, models: list[int], rows: int, columns: int, by_column: bool, out: int, threads: int
) -> None: ...
def combine(
    dtype: int,
    base: int,
    models: list[int],
    rows: int,
    columns: int,
    by_column: bool,
    weights: int,
    out_dtype: int,
    out: int,
    threads: int,
) -> None: ...
def descend_sgd(
    gram: int,
    groups: int,
    k: int,
    similarity: str,
    penalty: str,
    alpha: float,
    eps: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    iterations: int,
    coefficients: int,
    history: int,
    threads: int,
) -> None: ...
def descend_converge(
    gram: int,
    groups: int,
    k: int,
    similarity: str,
    penalty: str,
    alpha: float,
    eps: float,
    tolerance: float,
    max_iterations: int,
    coefficients: int,
    history: int,
    threads: int,
) -> int: ...
def converge_history_size(max_iterations: int) -> int: ...
def cpu_isa() -> str: ...
def choose_cpu_isa(name: str) -> None: ...
def build_info() -> dict[str, object]: ...
def triad(a: int, b: int, c: int, scale: float, count: int, streaming: bool, threads: int) -> None: ...
