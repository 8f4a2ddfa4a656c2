"""Reads a Retro project with Megatron-LM's own trainer code and saves what a training step would get.

    python megatron_reader.py PROJECT CACHE OUT.npz

A process of its own: megatron-core changes warnings and wants a process group. The settings come from ``config.json``
as ``load_retro_args`` takes them, the numbers of samples as ``get_train_valid_test_num_samples`` counts them.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.retro.query.multi_split_gpt_dataset import MultiSplitGPTDataset, MultiSplitGPTDatasetConfig
from megatron.core.datasets.retro.query.retro_dataset import get_retro_datasets
from megatron.core.datasets.utils import get_blend_from_list

EOD = 50_256


def main(project: Path, cache: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{cache}-group", rank=0, world_size=1)
    config = json.loads((project / "config.json").read_text())
    batch, length = config["retro_gpt_global_batch_size"], config["retro_gpt_seq_length"]
    rounds = config["retro_gpt_train_samples"] // batch // config["retro_gpt_eval_interval"] + 1
    samples = (config["retro_gpt_train_samples"], rounds * config["retro_gpt_eval_iters"] * batch, 0)
    tokenizer = SimpleNamespace(vocab_size=EOD + 1, eod=EOD, pad=EOD, unique_identifiers={"class": "gpt2"})
    data = MultiSplitGPTDatasetConfig(
        random_seed=config["retro_gpt_seed"],
        sequence_length=length,
        blend=get_blend_from_list([str(project / "data" / prefix) for prefix in config["retro_gpt_data_path"]]),
        blend_per_split=[None, None, None],
        split=config["retro_gpt_split"],
        split_preprocessing=config["retro_gpt_split"],
        path_to_cache=cache,
        return_document_ids=False,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
    )
    texts = BlendedMegatronDatasetBuilder(MultiSplitGPTDataset, samples, lambda: True, data).build()
    retro = SimpleNamespace(
        retro_project_dir=str(project),
        retro_chunk_length=config["retro_gpt_chunk_length"],
        retro_neighbor_dirs=config["retro_neighbor_dirs"],
        retro_block_size=config["retro_block_size"],
        retro_verify_neighbor_count=True,
        retro_num_neighbors=2,
        retro_num_retrieved_chunks=2,
    )
    named = dict(zip(("train", "valid", "test"), zip(texts, samples, strict=True), strict=True))
    arrays = {}
    for name, dataset in zip(named, get_retro_datasets(retro, named, length, EOD), strict=True):
        if dataset is not None:
            rows = [dataset[i] for i in range(named[name][1])]
            arrays[f"{name}_text"] = np.stack([row["text"] for row in rows])
            arrays[f"{name}_neighbours"] = np.stack([row["neighbor_tokens"] for row in rows])
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    os._exit(0)  # its worker threads would be waited for
