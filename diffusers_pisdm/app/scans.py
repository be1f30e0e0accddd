"""The scan paths, as the page shows them."""

from __future__ import annotations

from typing import Any

from ..ops import SCAN_DIRECTIONS, scan_path
from .models import Model


GRID_SIZE = 8  # of the first stage of the published model


def scans_of(model: Model) -> dict[str, Any]:
    """The order of the tokens in each direction, and the layers of the first stage that scan in it."""
    directions = []
    for direction in SCAN_DIRECTIONS:
        axis, vertical, horizontal = direction.split("_")
        layers = [str(i) for i, own in enumerate(model.pipe.stages[0].layer_directions, 1) if own == direction]
        directions.append(
            {
                "name": f"{axis.capitalize()}s, from {vertical} {horizontal}",
                "note": f"Layer{'s' * (len(layers) > 1)} {', '.join(layers)}" if layers else "Not used by this model",
            }
        )
    paths = {
        name: [scan_path(GRID_SIZE, GRID_SIZE, direction, snake).tolist() for direction in SCAN_DIRECTIONS]
        for name, snake in (("rasters", False), ("snakes", True))
    }
    return {"size": GRID_SIZE, "directions": directions, **paths}
