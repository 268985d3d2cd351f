"""What is kept of a photograph, which kept patch stands for each, and which slot each belongs to: a picture.

Needs pillow and numpy only; tensors on the CPU are welcome wherever an array is.
"""

from __future__ import annotations

from ocvtp.visualize.colours import FILL_COLOUR, PICK_COLOUR, palette
from ocvtp.visualize.grid import slot_picks
from ocvtp.visualize.mass import mass_panel
from ocvtp.visualize.page import overlay
from ocvtp.visualize.panels import kept_panel, slot_panel
from ocvtp.visualize.pixels import unnormalize

__all__ = [
    "FILL_COLOUR",
    "PICK_COLOUR",
    "kept_panel",
    "mass_panel",
    "overlay",
    "palette",
    "slot_panel",
    "slot_picks",
    "unnormalize",
]
