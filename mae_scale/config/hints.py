"""Hints for unknown keys: names that other programs use, and options that have no key here."""

from __future__ import annotations

from mae_scale.errors import did_you_mean

# Key for each name that other programs have for it.
HABITS = {
    "lr": "optim.base_lr",
    "learning_rate": "optim.base_lr",
    "blr": "optim.base_lr",
    "wd": "optim.weight_decay",
    "clip_grad_norm": "optim.clip_grad",
    "max_grad_norm": "optim.clip_grad",
    "gradient_clipping": "optim.clip_grad",
    "batch_size": "train.global_batch_size",
    "total_batch_size": "train.global_batch_size",
    "batch_size_per_gpu": "train.micro_batch_size",
    "steps": "train.max_steps",
    "iters": "train.max_steps",
    "num_epochs": "train.epochs",
    "data_path": "data.train",
    "data.path": "data.train",
    "data_dir": "data.train",
    "train_data": "data.train",
    "dataset": "data.train",
    "val_data": "data.val",
    "num_workers": "data.workers",
    "output_dir": "run_dir",
    "output": "run_dir",
    "out": "run_dir",
    "out_dir": "run_dir",
    "work_dir": "run_dir",
    "log_dir": "run_dir",
    "save_dir": "run_dir",
    "finetune": "weights",
    "pretrained": "weights",
    "checkpoint": "weights",
    "input_size": "model.img_size",
    "image_size": "model.img_size",
    "heads": "model.num_heads",
    "hidden_size": "model.embed_dim",
    "arch": "model.name",
    "model_name": "model.name",
    "bf16": "train.precision",
    "amp": "train.precision",
    "fp16": "train.precision",
    "gradient_checkpointing": "train.activation_checkpointing",
    "zero_stage": "deepspeed",
    "save_every": "checkpoint.every_steps",
    "save_freq": "checkpoint.every_steps",
    "print_freq": "train.log_every",
    "ema": "optim.ema_decay",
    "smoothing": "augment.label_smoothing",
    "reprob": "augment.erasing",
    "aa": "augment.rand_augment",
}
# Explanation for each option of other programs that has no key here.
EXPLAINED = {
    "gpu": "the launcher says how many processes there are; --gpu belongs to mae-scale plan",
    "gpus": "the launcher says how many processes there are; --gpus belongs to mae-scale plan",
    "nodes": "the launcher (torchrun, srun) says how many processes there are",
    "nproc_per_node": "it belongs to torchrun, before -m mae_scale",
    "device": "a GPU is used where there is one; MAE_SCALE_DEVICE=cpu computes on the CPU",
    "resume": "the same command with the same run_dir goes on by itself",
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
