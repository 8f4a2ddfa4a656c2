"""A database in the forms that other programs read: RETRO-pytorch's, Megatron-LM's, Hugging Face's.

One module (or package) a format, each an ``export_<format>(database, out, ...)`` that returns an `Exported`. What a
format cannot hold is counted there, and refused where it would come out wrong. docs/export.md says what is exact.

An export is written shard by shard under a temporary name and appears whole or not at all.
"""

from retrodb.export.huggingface import export_huggingface
from retrodb.export.megatron import export_megatron
from retrodb.export.retro_pytorch import export_retro_pytorch
from retrodb.export.target import Exported

__all__ = ["Exported", "export_huggingface", "export_megatron", "export_retro_pytorch"]
