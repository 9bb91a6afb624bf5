"""`python -m tessera.cli`: the `tessera` command where its script is not on the path."""

from tessera.cli import main

if __name__ == "__main__":
    main()
