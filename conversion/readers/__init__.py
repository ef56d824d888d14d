"""From bytes to lazy tensors.

- tensors: tensors that are read when they are needed
- opening: opens a source; source: what that is; checkpoint_files: one file of it, read without unpickling code
- foreign_settings, links, damages: what is taken over of a source, what is refused, and how that is said
- hub: a source on the Hub
- training_folders: what training leaves behind; zero_checkpoints, zero_files: of DeepSpeed; distributed_checkpoints,
  distributed_metadata: of FSDP and torch.distributed.checkpoint
- adapters: LoRA adapters, merged on the way; quantised: what bitsandbytes wrote
"""
