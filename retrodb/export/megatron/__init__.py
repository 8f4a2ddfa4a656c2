"""A Retro project folder of Megatron-LM, as its trainer (``pretrain_retro.py``) reads it.

The fields are those of ``megatron/core/datasets/retro`` at the parent of commit fc6969fbb3, which removed it:

* ``config.json``: the data settings, which the trainer takes from here;
* ``data/documents``: the documents (``.bin``, ``.idx``), each ended by the end-of-document token (EOD);
* ``data/sequences``: the text that is trained on, one sequence of n tokens a document of the file;
* ``db/merged/train.hdf5``, ``valid.hdf5``: the chunk databases, uint32 ``[rows, 5]`` (dataset, document, first token,
  one past the last, BERT length), and ``db/indexed_dataset_infos.json``;
* ``query/train``, ``query/valid``: neighbours, int64 ``[rows, k]``, in files named by the range of their rows.

The reader takes chunk row + 1 (modulo the rows) for a continuation wherever a document ends, takes -1 for a row as any
other, and masks nothing. So each document is followed by an empty chunk, which reads as EOD alone, and an empty chunk
is the first: -1 then reads as the last row and the first, both empty.
"""

from retrodb.export.megatron.project import export_megatron

__all__ = ["export_megatron"]
