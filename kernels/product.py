"""One product with a frozen weight: its shape, and how the weight is stored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_jax.quantization import QuantizationConfig

NF4 = QuantizationConfig()


@dataclasses.dataclass(frozen=True)
class Product:
    """x [M, K] @ W^T or, transposed, x [M, N] @ W, with a weight W [N, K].

    Attributes:
        m: rows of x, at least 1.
        n, k: shape of the weight.
        transposed: multiply by W (the gradient of the other product), not by W^T.
        storage: of the weight; None for any, in records that do not say.
    """

    m: int
    n: int
    k: int
    transposed: bool = False
    storage: QuantizationConfig | None = NF4

    @property
    def contracted(self) -> int:
        """Elements that are summed over: columns of x."""
        return self.n if self.transposed else self.k

    @property
    def n_out(self) -> int:
        """Columns of the output."""
        return self.k if self.transposed else self.n

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, those of the storage among them."""
        shape = {"m": self.m, "n": self.n, "k": self.k, "transposed": self.transposed}
        return shape if self.storage is None else {**shape, **dataclasses.asdict(self.storage)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], absent: QuantizationConfig | None) -> "Product":
        """Return the product of `to_json`.

        Args:
            entry: may have other keys.
            absent: storage of an entry that says none.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        storage = absent
        if "quant_type" in entry:
            fields = entry["quant_type"], entry["block_size"], entry["double_quant"]
            if [type(field) for field in fields] != [str, int, bool]:
                raise TypeError(f"{entry}")
            storage = QuantizationConfig(*fields)
        product = cls(entry["m"], entry["n"], entry["k"], entry["transposed"], storage)
        sizes = (product.m, product.n, product.k)
        if type(product.transposed) is not bool or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
            raise ValueError(f"{entry}")
        return product
