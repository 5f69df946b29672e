"""SAEs of other libraries, read and written.

[`load`] finds the format by looking. What a format means is in its module: which axis is which, whether `b_dec` is
subtracted from the input, in which units thresholds are. What an SAE here cannot express is refused with the reason.
"""

from typing import TYPE_CHECKING

from ..common.lazy import imports_on_use
from . import formats as _folder  # noqa: F401  (before the function, which has its name)
from .names import formats


if TYPE_CHECKING:
    from .loading import load, save
    from .places import SAEPlace, saes_in
    from .registry import able_to_write
    from .saebench import SAEBenchAdapter, to_saebench


__all__ = [
    "SAEBenchAdapter",
    "SAEPlace",
    "able_to_write",
    "formats",
    "load",
    "saes_in",
    "save",
    "to_saebench",
]

__getattr__, __dir__ = imports_on_use(__name__)
