"""Hints for unknown keys: names that other programs use, and options that have no key here."""

from __future__ import annotations

from mae_scale.errors import did_you_mean

# Names that other programs have for each key.
_NAMES = {
    "optim.base_lr": "lr learning_rate blr",
    "optim.weight_decay": "wd",
    "optim.clip_grad": "clip_grad_norm max_grad_norm gradient_clipping",
    "train.global_batch_size": "batch_size total_batch_size",
    "train.micro_batch_size": "batch_size_per_gpu",
    "train.max_steps": "steps iters",
    "train.epochs": "num_epochs",
    "data.train": "data_path data.path data_dir train_data dataset",
    "data.val": "val_data",
    "data.workers": "num_workers",
    "run_dir": "output_dir output out out_dir work_dir log_dir save_dir",
    "weights": "finetune pretrained checkpoint",
    "model.img_size": "input_size image_size",
    "model.num_heads": "heads",
    "model.embed_dim": "hidden_size",
    "model.name": "arch model_name",
    "train.precision": "bf16 amp fp16",
    "train.activation_checkpointing": "gradient_checkpointing",
    "deepspeed": "zero_stage",
    "checkpoint.every_steps": "save_every save_freq",
    "train.log_every": "print_freq",
    "optim.ema_decay": "ema",
    "augment.label_smoothing": "smoothing",
    "augment.erasing": "reprob",
    "augment.rand_augment": "aa",
}
HABITS = {name: key for key, names in _NAMES.items() for name in names.split()}
# Explanation for each option of other programs that has no key here.
EXPLAINED = {
    "gpu": "the launcher says how many processes there are; --gpu belongs to mae-scale plan",
    "gpus": "the launcher says how many processes there are; --gpus belongs to mae-scale plan",
    "nodes": "the launcher (torchrun, srun) says how many processes there are",
    "nproc_per_node": "it belongs to torchrun, before -m mae_scale",
    "device": "a GPU is used where there is one; MAE_SCALE_DEVICE=cpu computes on the CPU",
    "resume": "the same command with the same run_dir continues by itself",
    "accum_iter": "accumulation follows from train.global_batch_size, train.micro_batch_size and "
    "the number of processes",
    "num_classes": "the number of classes follows from the training shards",
    "optimizer": "the task decides it: LARS for linprobe, AdamW for all others",
    "wandb": "curves are in RUN/tensorboard, and mae-scale report draws them",
    "eval": "mae-scale evaluate measures a trained run",
}
# Name in EXPLAINED for each other name of the same option.
_SAME = {"gradient_accumulation_steps": "accum_iter", "accumulate_grad_batches": "accum_iter",
         "nb_classes": "num_classes", "auto_resume": "resume", "opt": "optimizer",
         "use_wandb": "wandb", "wandb_project": "wandb", "project": "wandb", "gpu_ids": "gpus",
         "n_gpus": "gpus", "ngpus": "gpus", "devices": "gpus", "num_gpus": "gpus",
         "num_nodes": "nodes"}  # fmt: skip


def hint_for(key: str, known: list[str]) -> str:
    """Give a hint for an unknown key, for the end of a message.

    It names the key for which other programs use that name, or else a key with the same last part.
    Otherwise it explains an option that has no key here, or names the nearest key.

    Args:
        key: the unknown key as it was typed, without dashes before it.
        known: all keys of the config, dotted.
    """
    key = key.replace("-", "_")
    leaf = key.rpartition(".")[2]
    habit = HABITS.get(key, HABITS.get(leaf))
    if habit in known:
        if habit == "train.global_batch_size":
            return (
                f"did you mean '{habit}' (images of a step, all processes together) or "
                "'train.micro_batch_size' (of one process at a time)?"
            )
        return f"did you mean '{habit}'?"
    same = [other for other in known if other.rpartition(".")[2] == leaf]
    if same:
        return f"did you mean '{same[0]}'?"
    explained = EXPLAINED.get(_SAME.get(leaf, leaf))
    return explained or did_you_mean(key, known, "--help lists the known ones")
