"""Where weights come from.

- source: tensors of a source by name; checkpoint_files: one file of it, read without unpickling code
- raw_files: which files of the published training code make one model
- training_folders: what training leaves behind; zero_checkpoints, zero_files: of DeepSpeed; distributed_checkpoints,
  distributed_metadata: of FSDP and torch.distributed.checkpoint
- adapters: LoRA adapters, merged on the way
- llava_parts: what lies beside a checkpoint of the LLaVA code base
"""
