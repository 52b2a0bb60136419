"""Deltas with residual bits, as importing an edited weight gives them, from any delta and what it shall come to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import dtype_name
from overpaint.patches.compose import Term, plan
from overpaint.patches.delta import BadDelta, Delta, Sum, Xor, residual


@own_torch_settings()
def exactly(base: Base, delta: Delta, wanted: Mapping[str, Tensor]) -> Delta:
    """A delta that, alone on the base, gives `wanted` bit for bit: `delta` itself where it does, else with residual bits.

    `wanted` has the edited values by canonical name, in the base's shapes and dtypes, for every tensor that `delta`
    changes and for others if there are any. Raises BadDelta when one is missing or differs in shape or dtype.
    """
    planned = plan(base, [Term("", delta)])
    if missing := sorted(set(planned.names) - set(wanted)):
        raise BadDelta(f"the change reaches {missing[0]}, but no edited value of it is known; import that tensor too")
    bits = {}
    for name, value in wanted.items():
        composed = planned.tensor(name) if name in planned.pieces else base.tensor(name)
        if (composed.shape, composed.dtype) != (value.shape, value.dtype):
            raise BadDelta(
                f"{name} is {dtype_name(composed.dtype)} {list(composed.shape)} in the base and "
                f"{dtype_name(value.dtype)} {list(value.shape)} in the import; convert the import to the base's dtype"
            )
        if (left := residual(composed, value)) is not None:
            bits[name] = left
    return Sum((*delta.parts, Xor(bits))) if bits else delta
