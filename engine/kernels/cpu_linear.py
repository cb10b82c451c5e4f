"""Linear layers on the CPU: oneDNN's packed weights, proven row-invariant on the machine that runs them."""

from torch import Tensor
