"""The shape of one product with a frozen weight."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Product:
    """x [M, K] @ W^T or, transposed, x [M, N] @ W, with a weight W [N, K].

    Attributes:
        m: rows of x, at least 1.
        n, k: shape of the weight.
        transposed: multiply by W (the gradient of the other product), not by W^T.
    """

    m: int
    n: int
    k: int
    transposed: bool = False

    @property
    def contracted(self) -> int:
        """Elements that are summed over: columns of x."""
        return self.n if self.transposed else self.k

    @property
    def n_out(self) -> int:
        """Columns of the output."""
        return self.k if self.transposed else self.n
