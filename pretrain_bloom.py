"""``bloom train`` as a file, for launchers that start one."""

from megatron.commands.train import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
