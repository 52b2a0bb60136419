"""Other tools' files: read into patches, and written from patches, with what is lost in numbers.

`dialects` has a section for each, which says how it names layers and what its tensors mean.
"""

from __future__ import annotations
