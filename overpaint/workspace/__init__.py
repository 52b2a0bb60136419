"""What needs several rooms: the object that `overpaint.open` returns, and its use cases."""

from __future__ import annotations
