"""What everything else stands on: errors, concepts, names, atomic files. Needs neither torch nor a database."""

from __future__ import annotations

__version__ = "0.1.0"
