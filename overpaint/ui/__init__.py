"""`overpaint ui`: a page over a registry, in a browser. Needs Gradio, the extra `overpaint[ui]`."""

from __future__ import annotations
