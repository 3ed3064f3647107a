"""From the flags of Megatron-DeepSpeed to a config of this project."""
