from typing import Any


class PlacementGroupSchedulingStrategy:
    def __init__(self, reserved: Any, placement_group_bundle_index: int) -> None:
        self.index = placement_group_bundle_index
