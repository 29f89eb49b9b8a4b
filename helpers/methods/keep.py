"""Leave a linear in 16 bits."""

from dataclasses import dataclass
from typing import ClassVar

from helpers.models.method import Method


@dataclass(frozen=True)
class Keep(Method):
    """No quantization."""

    name: ClassVar[str] = "fp16"
    stays: ClassVar[bool] = True
