"""``python -m megatron.commands`` is ``bloom``, also for launchers that start a module."""

from megatron.commands.main import main

if __name__ == "__main__":
    main()
