"""Other tools' files: read into patches, and written from patches, with what is lost in numbers.

Each dialect of a file has one module that says how it names layers and what its tensors mean; `tables` lists them.
"""

from __future__ import annotations
