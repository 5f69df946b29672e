"""What a run costs before it is started: memory, traffic and time of every layout on some devices."""

from typing import TYPE_CHECKING

from ..common.lazy import imports_on_use


if TYPE_CHECKING:
    from .counts import Mesh
    from .devices import Device, find_device
    from .plan import LayoutPlan, Plan, make_plan
    from .workload import Workload, read_workload


__all__ = ["Device", "LayoutPlan", "Mesh", "Plan", "Workload", "find_device", "make_plan", "read_workload"]

__getattr__, __dir__ = imports_on_use(__name__)
