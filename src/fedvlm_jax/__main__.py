"""`python -m fedvlm_jax` is the `fedvlm` command."""

from fedvlm_jax.cli.main import main

if __name__ == "__main__":
    main()
