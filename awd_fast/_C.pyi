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
def multi_dot(
    dtype: int,
    base: int,
    models: list[int],
    rows: int,
    columns: int,
    by_column: bool,
    gradient: int,
    gradient_dtype: int,
    out: int,
    threads: int,
) -> None: ...

class Sgd:
    def __init__(self, lr: float, momentum: float, weight_decay: float, nesterov: bool, iterations: int) -> None: ...

class Converge:
    def __init__(self, tolerance: float, max_iterations: int) -> None: ...

def descend(
    gram: int,
    groups: int,
    k: int,
    similarity: str,
    penalty: str,
    alpha: float,
    eps: float,
    sgd: Sgd | None,
    converge: Converge | None,
    coefficients: int,
    history: int,
    threads: int,
) -> int: ...
def merge_rows(
    dtype: int,
    base: int,
    models: list[int],
    rows: int,
    columns: int,
    by_column: bool,
    factors: list[float],
    similarity: str,
    penalty: str,
    alpha: float,
    eps: float,
    sgd: Sgd | None,
    converge: Converge | None,
    out_dtype: int,
    out: int,
    gram: int,
    coefficients: int,
    history: int,
    threads: int,
) -> int: ...
def adam_rows(
    dtype: int,
    base: int,
    models: list[int],
    rows: int,
    columns: int,
    by_column: bool,
    similarity: str,
    penalty: str,
    alpha: float,
    eps: float,
    optimizer: dict[str, object],
    iterations: int,
    shift: int,
    history: int,
    gram: int,
    inner: int,
    square: int,
    threads: int,
) -> None: ...
def adam_step(
    dtype: int,
    base: int,
    models: list[int],
    size: int,
    optimizer: dict[str, object],
    step: int,
    slope: int,
    shift: int,
    velocity: int,
    square: int,
    moments: int,
    threads: int,
) -> None: ...
def converge_history_size(max_iterations: int) -> int: ...
def cpu_isa() -> str: ...
def choose_cpu_isa(name: str) -> None: ...
def build_info() -> dict[str, object]: ...
def cuda_why_not() -> str: ...
def cuda_why_not_on(device: int) -> str: ...
def triad(a: int, b: int, c: int, scale: float, count: int, streaming: bool, threads: int) -> None: ...
