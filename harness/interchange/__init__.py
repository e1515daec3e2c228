"""Reads weights of other programs, and writes weights for them.

``export_model`` writes the weights of a checkpoint as safetensors or as a ``.pth``. ``read_foreign`` reads the forms in
which weights are found in the wild. ``load_into`` starts a model from them, ``import_run`` writes them as a checkpoint.
"""

from harness.interchange.export import export_model
from harness.interchange.foreign import Foreign, read_foreign
from harness.interchange.start import import_run, load_into

__all__ = ["Foreign", "export_model", "import_run", "load_into", "read_foreign"]
