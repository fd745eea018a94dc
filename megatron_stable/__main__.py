"""`python -m megatron_stable` is the command line `megatron-stable`."""

from megatron_stable.commands.app import main

if __name__ == "__main__":
    main()
