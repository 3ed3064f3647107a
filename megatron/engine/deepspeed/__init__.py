"""The engine on DeepSpeed. Importing a module of this package needs DeepSpeed to be installed."""
